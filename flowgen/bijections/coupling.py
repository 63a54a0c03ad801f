"""Couplings: one half of the channels is transformed by what a network reads off the other half."""

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.bijections.base import Bijection
from flowgen.bijections.networks import Network


class Coupling(Bijection):
    """y_a = h(x_a; network(x_b)), y_b = x_b, with h invertible in its first argument.

    The network takes the second half of the channels and returns `parameters_per_channel` times as many as the first half has.
    """

    parameters_per_channel: int

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    @abstractmethod
    def transform(self, a: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """h(a) and its log-det, of shape (batch,)."""

    @abstractmethod
    def transform_inverse(self, a: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of h at `a` and its log-det, of shape (batch,)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=1)
        a, log_det = self.transform(a, self.network(b).to(x.dtype))
        return torch.cat([a, b], dim=1), log_det

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        a, b = z.chunk(2, dim=1)
        a, log_det = self.transform_inverse(a, self.network(b).to(z.dtype))
        return torch.cat([a, b], dim=1), log_det

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        self.network.initialize(x.chunk(2, dim=1)[1])
        return self(x)[0]


class AdditiveCoupling(Coupling):
    """y_a = x_a + t(x_b); the log-det is zero. NICE (1410.8516), section 3.2."""

    parameters_per_channel = 1

    def transform(self, a: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return a + parameters, a.new_zeros(len(a))

    def transform_inverse(self, a: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return a - parameters, a.new_zeros(len(a))


class AffineCoupling(Coupling):
    """y_a = exp(l(x_b)) x_a + t(x_b), log|det| = sum l. Real NVP (1605.08803), equations 4 and 6.

    `scale` names the function that turns the network's output into the log-scale l: see `LOG_SCALES`.
    """

    parameters_per_channel = 2

    def __init__(self, network: Network, scale: str = "bounded"):
        super().__init__(network)
        if scale not in LOG_SCALES:
            raise ValueError(f"unknown scale {scale!r}: choose one of {', '.join(LOG_SCALES)}")
        self.log_scale = LOG_SCALES[scale]

    def transform(self, a: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._log_scale_and_shift(parameters)
        return torch.addcmul(shift, a, log_scale.exp()), log_scale.flatten(1).sum(1)

    def transform_inverse(self, a: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._log_scale_and_shift(parameters)
        return (a - shift) * (-log_scale).exp(), -log_scale.flatten(1).sum(1)

    def _log_scale_and_shift(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = parameters.chunk(2, dim=1)
        return self.log_scale(raw), shift


def _bounded(raw: Tensor) -> Tensor:
    """2 (2/pi) atan(raw/2): between -2 and 2, and never flat."""
    return (4 / math.pi) * torch.atan(raw / 2)


def _sigmoid(raw: Tensor) -> Tensor:
    """log sigmoid(raw + 2), as in Glow's code; it can only shrink, so sampling divides by it."""
    return F.logsigmoid(raw + 2)


def _tanh(raw: Tensor) -> Tensor:
    """2 tanh(raw/2): between -2 and 2."""
    return 2 * torch.tanh(raw / 2)


LOG_SCALES: dict[str, Callable[[Tensor], Tensor]] = {"bounded": _bounded, "sigmoid": _sigmoid, "tanh": _tanh}
