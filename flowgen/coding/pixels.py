"""Pixel values and points of the grid: dequantization as a bijection of integers.

The interval [0, 1) is a line of 2^32 positions, and each pixel value has an interval of them. A
position inside it is the dequantization noise, popped from the stack. The decoder finds the pixel
value of a position, and pushes the noise back.
"""

import zlib

import torch
from torch import Tensor

from flowgen.bijections.base import Bijection, Chain
from flowgen.bijections.elementwise import Logit, MarginalGaussianization
from flowgen.coding.coder import OFFSET, SEGMENTS_BITS, Coder, chunks
from flowgen.coding.layers import code
from flowgen.coding.normal import pop_normal, push_normal, to_uniform
from flowgen.models.flows.dequantization import VariationalDequantizer
from flowgen.models.flows.flow import Flow

LINE_BITS = 32  # positions on the line; fewer would cost bits for rare pixel values
TABLE_BITS = 30  # tables of floats have this precision
LOGIT_RANGE = 16  # of the table of the logit


class PixelCoder:
    """Conversion of images to numbers of the grid by popping noise, and back.

    Args:
        flow: The flow in float64.

    Attributes:
        rest: The bijections of the flow after the one that this class replaces.
    """

    def __init__(self, flow: Flow):
        first, self.rest = split_first(flow)
        self.logit = first if isinstance(first, Logit) else None
        channels = flow.image_shape[0]
        cumulative = (torch.arange(flow.bins + 1).double() / flow.bins).expand(channels, -1)
        if isinstance(first, MarginalGaussianization) and first.active:
            self.logit = first.logit
            cumulative = first.equalize.share.double().cumsum(1)
            cumulative = cumulative / cumulative[:, -1:]
            cumulative = torch.cat((torch.zeros(channels, 1).double(), cumulative), 1)
        self.edges = _round(cumulative)  # of the intervals of each channel (channels, bins + 1)
        self.edges[:, 0] = 0
        self.edges[:, -1] = 1 << LINE_BITS
        self.nodes = None if self.logit is None else _sigmoid_table(self.logit)
        self.dequantizer = flow.dequantizer

    def checksum(self) -> int:
        """Return a checksum of the tables, which depend on the model."""
        tables = [self.edges.reshape(-1), *([] if self.nodes is None else [self.nodes])]
        return zlib.crc32(torch.cat(tables).numpy().astype("<i8").tobytes())

    def dequantize(self, images: Tensor, coder: Coder) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pop the noise of images.

        Returns:
            Numbers of the grid, the points (images + noise) / bins in floats, and the standard
            normal numbers behind the noise if the dequantization is variational.
        """
        variational = isinstance(self.dequantizer, VariationalDequantizer)
        start, size = self._intervals(images)
        normal = noise = None
        if variational:
            normal = pop_normal(coder, images.shape)
            condition = self.dequantizer.condition(images, torch.float64)  # type: ignore[operator]
            noise = code(self._noise_flow, normal, condition, coder, False).reshape(-1)
        position = torch.empty_like(start)
        x = torch.empty_like(start)
        for part in chunks(len(start)):
            # Both steps for one part at a time, because a position borrows 32 bits.
            offset = (
                coder.pop(size[part])
                if noise is None
                else to_uniform(coder, noise[part], size[part], False)
            )
            position[part] = start[part] + offset
            x[part] = self._from_line(coder, position[part])
        share = ((position - start).double() + 0.5) / size.double()
        points = (images.double() + share.view(images.shape)) / (self.edges.shape[1] - 1)
        return x.view(images.shape), points, normal

    def quantize_points(self, x: Tensor, coder: Coder) -> Tensor:
        """Return the images of numbers of the grid, and push their noise."""
        variational = isinstance(self.dequantizer, VariationalDequantizer)
        shape = x.shape
        channel = torch.arange(shape[1]).view(-1, 1, 1).expand(shape).reshape(-1)
        numbers = x.reshape(-1)
        noise = torch.empty_like(numbers)
        values = torch.empty_like(numbers)
        for part in reversed(chunks(len(numbers))):
            position = self._to_line(coder, numbers[part])
            edges = self.edges[channel[part]]
            value = torch.searchsorted(edges, position[:, None], right=True)[:, 0] - 1
            start = edges.gather(1, value[:, None])[:, 0]
            size = edges.gather(1, value[:, None] + 1)[:, 0] - start
            values[part] = value
            if variational:
                noise[part] = to_uniform(coder, position - start, size, True)
            else:
                coder.push(position - start, size)
        images = values.to(torch.uint8).view(shape)
        if variational:
            condition = self.dequantizer.condition(images, torch.float64)  # type: ignore[operator]
            normal = code(self._noise_flow, noise.view(shape), condition, coder, True)
            push_normal(coder, normal)
        return images

    @property
    def _noise_flow(self) -> torch.nn.Module:
        return self.dequantizer.bijection  # type: ignore[return-value]

    def _intervals(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return start and size of the interval of every pixel, flattened."""
        channel = torch.arange(len(self.edges)).view(-1, 1, 1)
        values = images.long()
        start = self.edges[channel, values]
        return start.reshape(-1), (self.edges[channel, values + 1] - start).reshape(-1)

    def _from_line(self, coder: Coder, position: Tensor) -> Tensor:
        """Map positions to the grid: the logit, or division by 2^(LINE_BITS - grid_bits)."""
        if self.nodes is None:
            low_bits = LINE_BITS - coder.grid_bits
            coder.push_bits(position & ((1 << low_bits) - 1), low_bits)
            return position >> low_bits
        return coder.piecewise_linear(position, self._node, self._guess, True)

    def _to_line(self, coder: Coder, x: Tensor) -> Tensor:
        if self.nodes is None:
            low_bits = LINE_BITS - coder.grid_bits
            position = (x << low_bits) + coder.pop_bits(low_bits, x.shape)
        else:
            position = coder.piecewise_linear(x, self._node, self._guess, False)
        return position.clamp(0, (1 << LINE_BITS) - 1)

    def _node(self, index: Tensor) -> Tensor:
        """Return the position of the start of segment `index` of the grid."""
        assert self.nodes is not None
        half = len(self.nodes) // 2
        return self.nodes[(index + half).clamp(0, 2 * half)]

    def _guess(self, position: Tensor) -> Tensor:
        assert self.logit is not None
        share = (position.double() + 0.5) * 2.0**-LINE_BITS
        return (self.logit(share[:, None])[0][:, 0] * 2**SEGMENTS_BITS).floor().long()


def split_first(
    flow: Flow,
) -> tuple[MarginalGaussianization | Logit | None, list[Bijection]]:
    """Return the bijection of [0, 1) that a `PixelCoder` replaces, if any, and the others."""
    assert isinstance(flow.bijection, Chain)
    parts: list[Bijection] = list(flow.bijection.bijections)  # type: ignore[arg-type]
    if isinstance(parts[0], MarginalGaussianization | Logit):
        return parts[0], parts[1:]
    return None, parts


def _sigmoid_table(logit: Logit) -> Tensor:
    """Return the inverse of a logit at multiples of 2^-SEGMENTS_BITS, as positions."""
    half = LOGIT_RANGE << SEGMENTS_BITS
    z = torch.arange(-half, half + 1).double() / 2**SEGMENTS_BITS
    return _round(logit.inverse(z[:, None])[0][:, 0].clamp(0, 1))


def _round(share: Tensor) -> Tensor:
    """Return shares of the line as positions, rounded to 2^-TABLE_BITS."""
    rounded = (share * 2.0**TABLE_BITS + OFFSET).floor().long()
    return rounded.clamp(0, 1 << TABLE_BITS) << (LINE_BITS - TABLE_BITS)
