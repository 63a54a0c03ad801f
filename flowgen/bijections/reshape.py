"""Bijections that only move values: their log-det is zero."""

import torch
from torch import Tensor

from flowgen.bijections.base import Bijection, concat_condition
from flowgen.bijections.networks import Conditioner


class Squeeze(Bijection):
    """Trade space for channels: (B, C, H, W) -> (B, 4C, H/2, W/2), or, by another `factor` f than 2, (B, f^2 C, H/f, W/f).

    Each block of f x f pixels becomes one pixel, as here of 2x2:

        1 2 | 5 6
        3 4 | 7 8    ->    [1 2 3 4] [5 6 7 8]

    The output is laid out channels-last, which the convolutions behind it run fastest on. Real NVP (1605.08803), section 3.6.
    """

    supports_reversible = True

    def __init__(self, factor: int = 2):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        blocks = x.unflatten(3, (-1, self.factor)).unflatten(
            2, (-1, self.factor)
        )  # (B, C, H/f, f, W/f, f)
        squeezed = blocks.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return squeezed.permute(0, 3, 1, 2), x.new_zeros(len(x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        blocks = z.permute(0, 2, 3, 1).unflatten(
            3, (-1, self.factor, self.factor)
        )  # (B, H/f, W/f, C, f, f)
        return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3), z.new_zeros(len(z))


class Flatten(Bijection):
    """Lay an image of the given shape (C, H, W) out as one vector: (B, C, H, W) -> (B, C*H*W)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x.new_zeros(len(x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.unflatten(1, self.shape), z.new_zeros(len(z))


class Roll(Bijection):
    """An image moved down and to the right by some pixels; what leaves at one edge comes back at the other."""

    def __init__(self, pixels: int):
        super().__init__()
        self.pixels = pixels

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.roll((self.pixels, self.pixels), (2, 3)), x.new_zeros(len(x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.roll((-self.pixels, -self.pixels), (2, 3)), z.new_zeros(len(z))


class Permute(Bijection):
    """Channels in a random order, which stays as it was drawn."""

    order: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("order", torch.randperm(channels))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x[:, self.order], x.new_zeros(len(x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z[:, self.order.argsort()], z.new_zeros(len(z))


class FactorOut(Bijection):
    """Half of the channels leave, the other half goes on through `inner`: (B, C, H, W) -> (B, C*H*W).

    Without a network the leaving half is latent as it is. With one it is standardised by the Gaussian that the network predicts
    from the half that stays and the condition: z = (x_out - mean) exp(-log_deviation). The vector is [inner's latent, leaving half].
    Real NVP (1605.08803), section 3.6; Glow (1807.03039), section 3.
    """

    def __init__(self, inner: Bijection, network: Conditioner | None = None):
        super().__init__()
        self.inner = inner
        self.network = network

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        stays, leaves = x.chunk(2, dim=1)
        leaves, change = self._standardize(leaves, stays, condition)
        z, log_det = self.inner(stays, condition)
        return torch.cat([z, leaves.flatten(1)], dim=1), log_det + change

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inner_z, leaves = z.chunk(2, dim=1)  # each half of the channels holds half of the numbers
        stays, log_det = self.inner.inverse(inner_z, condition)
        leaves = leaves.view(stays.shape)
        if self.network is not None:
            mean, log_deviation = self._gaussian(self.network, concat_condition(stays, condition))
            leaves = torch.addcmul(mean, leaves, log_deviation.exp())
            log_det = log_det + log_deviation.flatten(1).sum(1)
        return torch.cat([stays, leaves], dim=1), log_det

    def _standardize(
        self, leaves: Tensor, stays: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.network is None:
            return leaves, leaves.new_zeros(len(leaves))
        mean, log_deviation = self._gaussian(self.network, concat_condition(stays, condition))
        return (leaves - mean) * (-log_deviation).exp(), -log_deviation.flatten(1).sum(1)

    @staticmethod
    def _gaussian(network: Conditioner, seen: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(
            seen.device.type, enabled=False
        ):  # a prior is part of the likelihood: no bfloat16
            mean, log_deviation = network(seen).chunk(2, dim=1)
        return mean, log_deviation

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        stays, leaves = x.chunk(2, dim=1)
        if self.network is not None:
            self.network.initialize(concat_condition(stays, condition))
        leaves, _ = self._standardize(leaves, stays, condition)
        return torch.cat([self.inner.initialize(stays, condition), leaves.flatten(1)], dim=1)
