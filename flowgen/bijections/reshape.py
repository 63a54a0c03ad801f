"""Bijections that only move values: their log-det is zero."""

from torch import Tensor

from flowgen.bijections.base import Bijection


class Squeeze(Bijection):
    """Trade space for channels: (B, C, H, W) -> (B, 4C, H/2, W/2).

    Each 2x2 block of pixels becomes one pixel:

        1 2 | 5 6
        3 4 | 7 8    ->    [1 2 3 4] [5 6 7 8]

    The output is laid out channels-last, which the convolutions behind it run fastest on. Real NVP (1605.08803), section 3.6.
    """

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        blocks = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, H/2, 2, W/2, 2)
        squeezed = blocks.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return squeezed.permute(0, 3, 1, 2), x.new_zeros(len(x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        blocks = z.permute(0, 2, 3, 1).unflatten(3, (-1, 2, 2))  # (B, H/2, W/2, C, 2, 2)
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
