"""Standard normal numbers on a stack: popping draws one, pushing stores one.

The number passes through its distribution function, which makes it uniform, and the result is
pushed. Between -5 and 5 the distribution function is a table of integers. The table of the distance
d beyond 5 is approximate: the probability of a larger distance is exp(-5 d - d^2 / 2), which needs
only `exp` and is 1.2 times too large at d = 1. A number beyond 5 has a probability of 6e-7.
"""

import zlib
from functools import cached_property

import torch
from torch import Tensor

from flowgen.coding.coder import OFFSET, Coder, chunk_size
from flowgen.coding.stack import CodingError

UNIFORM_BITS = 30  # of a uniform number
TABLE_SEGMENTS_BITS = 5  # the tables have nodes at multiples of 2^-5
CENTER = 5  # half of the width of the central table
TAIL_LENGTH = 59  # beyond, the probability of the tail is below 2^-2900
NOISE_RANGE = 64  # half of the width of the table of `to_uniform`


class NormalTables:
    """Integer tables of the normal distribution function, the same on every machine.

    Attributes:
        tail_mass: Integer probability of either tail, of 2^UNIFORM_BITS.
    """

    @cached_property
    def tail_mass(self) -> int:
        return int(_round(torch.special.ndtr(torch.tensor(-float(CENTER)).double())))

    @cached_property
    def center(self) -> Tensor:
        """Distribution function at the nodes from -CENTER to CENTER, strictly increasing."""
        half = CENTER << TABLE_SEGMENTS_BITS
        nodes = torch.arange(-half, half + 1)
        share = torch.special.ndtr(nodes.double() / 2**TABLE_SEGMENTS_BITS)
        share = (share - share[0]) / (share[-1] - share[0])
        total = 2**UNIFORM_BITS
        mass = total - 2 * self.tail_mass - 2 * half
        table = self.tail_mass + _round(share * mass / total) + torch.arange(2 * half + 1)
        table[0] = self.tail_mass
        table[-1] = total - self.tail_mass
        return table

    @cached_property
    def tail(self) -> Tensor:
        """Approximate distribution function of the distance from CENTER, given a tail."""
        distance = (
            torch.arange((TAIL_LENGTH << TABLE_SEGMENTS_BITS) + 1).double() / 2**TABLE_SEGMENTS_BITS
        )
        share = 1 - (-CENTER * distance - distance.square() / 2).exp()
        total = 2**UNIFORM_BITS
        mass = total - len(distance)
        table = _round(share * mass / total) + torch.arange(len(distance))
        table[0] = 0
        table[-1] = total
        return table

    @cached_property
    def noise(self) -> Tensor:
        """Distribution function at the nodes from -NOISE_RANGE to NOISE_RANGE."""
        half = NOISE_RANGE << TABLE_SEGMENTS_BITS
        nodes = torch.arange(-half, half + 1)
        table = _round(torch.special.ndtr(nodes.double() / 2**TABLE_SEGMENTS_BITS))
        table[0] = 0
        table[-1] = 2**UNIFORM_BITS
        return table

    def checksum(self) -> int:
        """Return a checksum of all tables."""
        tables = torch.cat((self.center, self.tail, self.noise))
        return zlib.crc32(tables.numpy().astype("<i8").tobytes())


TABLES = NormalTables()


def _round(share: Tensor) -> Tensor:
    return (share * 2.0**UNIFORM_BITS + OFFSET).floor().long()


def push_normal(coder: Coder, x: Tensor) -> None:
    """Push numbers of the grid as standard normal numbers."""
    values = x.reshape(-1)
    size = chunk_size(len(values))
    edge = CENTER << coder.grid_bits
    for start in reversed(range(0, len(values), size)):
        part = values[start : start + size]
        uniform = torch.empty_like(part)
        below = part < -edge
        far = below | (part >= edge)
        if far.any():
            distance = torch.where(below, -edge - 1 - part, part - edge)[far]
            coder.push_bits(_through_table(coder, distance, TABLES.tail, 0, False), UNIFORM_BITS)
            side = coder.pop(torch.full_like(distance, TABLES.tail_mass))
            mirrored = 2**UNIFORM_BITS - 1 - side
            uniform[far] = torch.where(below[far], side, mirrored)
        if not far.all():
            first = -CENTER << TABLE_SEGMENTS_BITS
            uniform[~far] = _through_table(coder, part[~far], TABLES.center, first, False)
        coder.push_bits(uniform, UNIFORM_BITS)


def pop_normal(coder: Coder, shape: torch.Size) -> Tensor:
    """Pop standard normal numbers of the grid."""
    values = torch.empty(shape.numel(), dtype=torch.int64)
    size = chunk_size(len(values))
    edge = CENTER << coder.grid_bits
    for start in range(0, len(values), size):
        part = values[start : start + size]
        uniform = coder.pop_bits(UNIFORM_BITS, part.shape)
        below = uniform < TABLES.tail_mass
        mirrored = 2**UNIFORM_BITS - 1 - uniform
        far = below | (mirrored < TABLES.tail_mass)
        if not far.all():
            first = -CENTER << TABLE_SEGMENTS_BITS
            part[~far] = _through_table(coder, uniform[~far], TABLES.center, first, True)
        if far.any():
            side = torch.where(below, uniform, mirrored)[far]
            coder.push(side, torch.full_like(side, TABLES.tail_mass))
            position = coder.pop_bits(UNIFORM_BITS, side.shape)
            distance = _through_table(coder, position, TABLES.tail, 0, True)
            part[far] = torch.where(below[far], -edge - 1 - distance, distance + edge)
    return values.view(shape)


def _through_table(coder: Coder, x: Tensor, table: Tensor, first: int, backward: bool) -> Tensor:
    """Map numbers of the grid to uniform numbers by a table, or back.

    Args:
        coder: The coder, which holds the stack.
        x: Numbers of the grid, or uniform numbers if `backward`.
        table: Strictly increasing values at the nodes.
        first: Index of the first node.
        backward: Whether to invert the map.
    """
    bits = coder.grid_bits - TABLE_SEGMENTS_BITS
    index = torch.searchsorted(table, x, right=True) - 1 if backward else (x >> bits) - first
    if index.min() < 0 or index.max() >= len(table) - 1:
        raise CodingError("a latent is outside the range of the code")
    value = table[index]
    return coder.exchange(
        x, (index + first) << bits, value, table[index + 1] - value, bits, backward
    )


def to_uniform(coder: Coder, x: Tensor, sizes: Tensor, backward: bool) -> Tensor:
    """Map numbers of the grid to Phi(x) below each size, rounded down, or back.

    Args:
        coder: The coder, which holds the stack.
        x: Numbers of the grid, or values below their sizes if `backward`.
        sizes: Sizes above the number of segments.
        backward: Whether to invert the map.
    """
    half = NOISE_RANGE << TABLE_SEGMENTS_BITS

    def node(index: Tensor) -> Tensor:
        position = (index + half).clamp(0, 2 * half)
        return ((TABLES.noise[position] * (sizes - 2 * half)) >> UNIFORM_BITS) + position

    def guess(value: Tensor) -> Tensor:
        share = ((value.double() + 0.5) / sizes.double()).clamp(1e-15, 1 - 1e-15)
        index = (torch.special.ndtri(share) * 2**TABLE_SEGMENTS_BITS).floor().long()
        return index.clamp(-half, half - 1)

    if not backward and (x.abs() >> coder.grid_bits).max() >= NOISE_RANGE - 1:
        raise CodingError("the noise is outside the range of the code")
    return coder.piecewise_linear(x, node, guess, backward, coder.grid_bits - TABLE_SEGMENTS_BITS)
