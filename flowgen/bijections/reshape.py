"""Bijections that only move values: their log-det is zero."""

import torch
from torch import Tensor

from flowgen.bijections.base import Bijection


class Squeeze(Bijection):
    """Trade space for channels: (B, C, H, W) -> (B, 4C, H/2, W/2), or, by another `factor` f than 2, (B, f^2 C, H/f, W/f).

    Each block of f x f pixels becomes one pixel, as here of 2x2:

        1 2 | 5 6
        3 4 | 7 8    ->    [1 2 3 4] [5 6 7 8]

    The output is laid out channels-last, which the convolutions behind it run fastest on. Real NVP (1605.08803), section 3.6.
    """

    recoverable = True

    def __init__(self, factor: int = 2):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        blocks = x.unflatten(3, (-1, self.factor)).unflatten(2, (-1, self.factor))  # (B, C, H/f, f, W/f, f)
        squeezed = blocks.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return squeezed.permute(0, 3, 1, 2), x.new_zeros(len(x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        blocks = z.permute(0, 2, 3, 1).unflatten(3, (-1, self.factor, self.factor))  # (B, H/f, W/f, C, f, f)
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
