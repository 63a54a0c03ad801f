"""The convolutional encoder and decoder of a variational autoencoder."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowgen.bijections.networks import NormalizedConv2d, ResidualBlock, Sequential

MIN_SIDE = 7  # the height and the width of the smallest feature map, if images are larger
INITIAL_OUTPUT_SCALE = 0.1  # of the weights of the last layer


class Layout(NamedTuple):
    """Levels of the networks for images of one size.

    Attributes:
        group: Side length of the squares of pixels that a level groups into channels: 2, or 1 if
            height or width is less than 2 `MIN_SIDE`.
        levels: Number of levels.
        size: Height and width of the smallest feature map.
    """

    group: int
    levels: int
    size: tuple[int, int]

    @classmethod
    def of(cls, height: int, width: int) -> "Layout":
        """Return the layout for images: two levels for 28x28 and 32x32, three for 64x64."""
        halvings = max(0, int(math.log2(min(height, width) / MIN_SIDE)))
        factor = 2**halvings
        size = (math.ceil(height / factor), math.ceil(width / factor))
        return cls(2 if halvings else 1, max(1, halvings), size)


def conv_encoder(
    image_shape: tuple[int, int, int], width: int, num_blocks: int, outputs: int
) -> Sequential:
    """Return a network from images (batch, channels, height, width) to (batch, outputs).

    Each level groups 2x2 pixels into channels, then applies a convolution and `num_blocks` residual
    blocks. The first level has `width` channels, all others have twice as many. Images whose size
    is not a multiple of the groups are padded with zeros.

    Args:
        image_shape: (channels, height, width).
        width: Channels of the first level.
        num_blocks: Residual blocks of each level.
        outputs: Outputs per image.
    """
    channels, height, image_width = image_shape
    layout = Layout.of(height, image_width)
    rows, columns = layout.size
    factor = layout.group**layout.levels

    def layers() -> Iterator[nn.Module]:
        yield nn.ZeroPad2d((0, factor * columns - image_width, 0, factor * rows - height))
        in_channels = channels
        for level in range(layout.levels):
            yield nn.PixelUnshuffle(layout.group)
            out_channels = _level_channels(level, width)
            yield NormalizedConv2d(in_channels * layout.group**2, out_channels, 3)
            yield from (ResidualBlock(out_channels) for _ in range(num_blocks))
            in_channels = out_channels
        yield nn.ReLU()
        yield nn.Flatten()
        yield _scale_output(nn.Linear(in_channels * rows * columns, outputs))

    return Sequential(*layers())


def conv_decoder(
    image_shape: tuple[int, int, int], width: int, num_blocks: int, latent_dim: int, outputs: int
) -> Sequential:
    """Return a network from vectors (batch, latent_dim) to (batch, outputs, height, width).

    It mirrors `conv_encoder`. The last convolution computes the outputs of the pixels of a group.

    Args:
        image_shape: (channels, height, width).
        width: Channels of the level with the highest resolution.
        num_blocks: Residual blocks of each level.
        latent_dim: Numbers per vector.
        outputs: Outputs per pixel.
    """
    _, height, image_width = image_shape
    layout = Layout.of(height, image_width)
    rows, columns = layout.size

    def layers() -> Iterator[nn.Module]:
        in_channels = _level_channels(layout.levels - 1, width)
        yield nn.Linear(latent_dim, in_channels * rows * columns)
        yield nn.Unflatten(1, (in_channels, rows, columns))
        for level in reversed(range(layout.levels)):
            in_channels = _level_channels(level, width)
            yield from (ResidualBlock(in_channels) for _ in range(num_blocks))
            yield nn.ReLU()
            if level:
                out_channels = layout.group**2 * _level_channels(level - 1, width)
                yield NormalizedConv2d(in_channels, out_channels, 3)
                yield nn.PixelShuffle(layout.group)
        last = nn.Conv2d(in_channels, layout.group**2 * outputs, 3, padding="same")
        yield _scale_output(last)
        yield nn.PixelShuffle(layout.group)
        yield Crop(height, image_width)

    return Sequential(*layers())


@torch.no_grad()
def set_output_bias(decoder: Sequential, bias: Tensor) -> None:
    """Set the bias of the outputs of a `conv_decoder`, (outputs,), equal for all pixels."""
    for layer in decoder.layers:
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            layer.bias.copy_(bias.repeat_interleave(len(layer.bias) // len(bias)))


class Crop(nn.Module):
    """Keep the upper left part of images."""

    def __init__(self, height: int, width: int):
        super().__init__()
        self.height = height
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : self.height, : self.width]


def _level_channels(level: int, width: int) -> int:
    return width if level == 0 else 2 * width


@torch.no_grad()
def _scale_output(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    layer.weight.mul_(INITIAL_OUTPUT_SCALE)
    return layer
