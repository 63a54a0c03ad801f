"""Shifts and scales of single numbers."""

import torch
from torch import Tensor

from flowgen.bijections.transforms.base import LOG_SCALES, Transform


class Additive(Transform):
    """y = x + t. NICE (1410.8516), section 3.2."""

    count = 1
    recoverable = True

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return x + parameters, torch.zeros_like(x)

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return y - parameters, torch.zeros_like(y)


class Multiplicative(Transform):
    """y = exp(l) x. NICE (1410.8516), section 3.2."""

    count = 1
    recoverable = True

    def __init__(self, scale: str = "bounded"):
        self.log_scale = LOG_SCALES[scale]

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale(parameters)
        return x * log_scale.exp(), log_scale

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale(parameters)
        return y * (-log_scale).exp(), -log_scale


class Affine(Transform):
    """y = exp(l) x + t; `scale` names the function that turns a raw parameter into l. Real NVP (1605.08803), equation 4."""

    count = 2
    recoverable = True

    def __init__(self, scale: str = "bounded"):
        self.log_scale = LOG_SCALES[scale]

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = parameters.chunk(2, dim=1)
        log_scale = self.log_scale(raw)
        return torch.addcmul(shift, x, log_scale.exp()), log_scale

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = parameters.chunk(2, dim=1)
        log_scale = self.log_scale(raw)
        return (y - shift) * (-log_scale).exp(), -log_scale
