"""Couplings: some of the numbers are transformed by what a network reads off the others."""

import torch
from torch import Tensor

from flowgen.bijections.base import Bijection, concat_condition
from flowgen.bijections.batchnorm import batch_norm_layers
from flowgen.bijections.networks import Conditioner, has_dropout
from flowgen.bijections.univariate import Transform


class Coupling(Bijection):
    """y_a = h(x_a; network(x_b, condition)), y_b = x_b, where a is the first half of the channels and b the second.

    The network returns `transform.count` times as many channels as a has. Real NVP (1605.08803), section 3.2.
    """

    def __init__(self, network: Conditioner, transform: Transform):
        super().__init__()
        self.network = network
        self.transform = transform

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=1)
        a, log_slope = self.transform.forward(
            a, self.network(concat_condition(b, condition)).to(x.dtype)
        )
        return torch.cat([a, b], dim=1), log_slope.flatten(1).sum(1)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = z.chunk(2, dim=1)
        a, log_slope = self.transform.inverse(
            a, self.network(concat_condition(b, condition)).to(z.dtype)
        )
        return torch.cat([a, b], dim=1), log_slope.flatten(1).sum(1)

    @property
    def supports_reversible(self) -> bool:
        return (
            self.transform.supports_reversible
            and not batch_norm_layers(self.network)
            and not has_dropout(self.network)
        )

    def invert_and_recompute(
        self, z: Tensor, condition: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """By one pass of the network, whose input comes out as it went in."""
        a, b = z.detach().chunk(2, dim=1)
        b.requires_grad_()
        parameters = self.network(concat_condition(b, condition)).to(z.dtype)
        with torch.no_grad():
            a, _ = self.transform.inverse(a, parameters)
        a.requires_grad_()
        y, log_slope = self.transform.forward(a, parameters)
        return (a, b), torch.cat([y, b], dim=1), log_slope.flatten(1).sum(1)

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        self.network.initialize(concat_condition(x.chunk(2, dim=1)[1], condition))
        return self(x, condition)[0]


class MaskedCoupling(Bijection):
    """y = h(x; network(mask x, condition)) where the mask is 0, y = x where it is 1. Real NVP (1605.08803), sections 3.4 and 3.5.

    `mask` is (channels, height, width); the network returns `transform.count` times as many channels as x has.
    """

    mask: Tensor

    def __init__(self, network: Conditioner, transform: Transform, mask: Tensor):
        super().__init__()
        self.network = network
        self.transform = transform
        self.register_buffer("mask", mask.bool().contiguous(), persistent=False)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_slope = self.transform.forward(x, self._read_off(x, condition))
        return torch.where(self.mask, x, y), torch.where(self.mask, 0.0, log_slope).flatten(1).sum(
            1
        )

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_slope = self.transform.inverse(z, self._read_off(z, condition))
        return torch.where(self.mask, z, x), torch.where(self.mask, 0.0, log_slope).flatten(1).sum(
            1
        )

    def _read_off(self, x: Tensor, condition: Tensor | None) -> Tensor:
        return self.network(concat_condition(torch.where(self.mask, x, 0.0), condition)).to(x.dtype)

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        self.network.initialize(concat_condition(torch.where(self.mask, x, 0.0), condition))
        return self(x, condition)[0]


def checkerboard(channels: int, height: int, width: int, odd: bool) -> Tensor:
    """1 where row + column is even, or odd, in every channel."""
    return ((torch.arange(height)[:, None] + torch.arange(width)) % 2 == int(odd)).expand(
        channels, -1, -1
    )


def channelwise(channels: int, height: int, width: int, second: bool) -> Tensor:
    """1 in the first half of the channels, or in the second."""
    half = torch.arange(channels) < channels // 2
    return (~half if second else half)[:, None, None].expand(-1, height, width)


def stripes(channels: int, height: int, width: int, odd: bool) -> Tensor:
    """1 in even columns, or in odd ones; in every channel."""
    return (torch.arange(width) % 2 == int(odd)).expand(channels, height, -1)
