"""Normalisations that start from data."""

import torch
from torch import Tensor, nn

from flowgen.bijections.linear import ChannelAffine


class ActNorm(ChannelAffine):
    """y = exp(log_scale) x + shift per channel, log|det| = H W sum(log_scale).

    `initialize` sets both so that every channel of its output has zero mean and unit variance. The logarithm is kept, not the
    scale: a scale can cross zero. Glow (1807.03039), section 3.1.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.diag(self.log_scale.exp()), self.shift, self.log_scale.sum()

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(x.transpose(0, 1).flatten(1), dim=1)
        self.log_scale.copy_(-deviation.clamp(min=1e-6).log())  # a channel that never varies must not blow up
        self.shift.copy_(-mean * self.log_scale.exp())
        return self(x)[0]
