"""Exact arithmetic for flows: numbers on a grid, and maps that exchange bits with a stack.

A number x is the integer X = round(2^K x). A map with a slope s would turn an interval of integers
into one that is s times as long, so it cannot be a bijection of integers alone. It becomes a
bijection of pairs (X, stack). With the slope as a fraction R / 2^h,

    r = pop(R);  T = R X + r;  push(T mod 2^h);  Y = floor(T / 2^h)

pops log2(R) bits and pushes h bits: the stack grows by exactly -log2(s), the change of the density.
The inverse map pops the remainder, recovers T = 2^h Y + remainder, and pushes r = T mod R. All of
this is arithmetic of integers, which gives the same result on every machine. Zhang et al., iFlow
(2111.00965), section 3.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flowgen.coding.stack import BitStack, CodingError, Integers

RATIO_BITS = 10  # of a slope R / 2^h; a relative error of 2^-11 costs 10^-7 bits
MAX_SHIFT = 20  # largest h; slopes below 2^-20 become 2^-20
PARAMETER_BITS = 12  # outputs of networks are rounded to 2^-12
SEGMENTS_BITS = 8  # curved maps are linear within segments of length 2^-8
EXTRA_BITS = 10  # values of a curved map have this many bits more than the grid
MIN_CHUNK = 64  # numbers that exchange bits at once; more numbers borrow more bits
MAX_SEARCH_STEPS = 2000  # largest error of the guess of an inverse, in segments
MAX_GRID = 1 << 31  # larger numbers could overflow
MARGIN = 2.0**-24  # the encoder refuses values this close to a rounding boundary
# Values are rounded by floor(value + OFFSET). An offset of 1/2 would put rounding boundaries at
# multiples of 1/2. Products of weights with few bits lie exactly there, and machines would differ.
OFFSET = 0.6317
OFFSET_STEP = 0.6180339887  # between two offsets: the golden ratio spreads them evenly in (0, 1)
MAX_OFFSETS = 32


class NearBoundaryError(CodingError):
    """A value that another machine might round to another integer."""


class Coder:
    """Invertible maps of integers, which push bits to a stack and pop bits from it.

    The integer X stands for the number X / 2^grid_bits. Inputs and outputs are int64 tensors of any
    shape. Every map takes `backward`: True applies the inverse map and restores the stack.

    Floats become integers only in `quantize`. Machines compute floats with differences of about
    10^-16, so they could disagree there about values near a boundary between two integers. The
    encoder therefore refuses such values and starts again with another `offset`, which moves all
    boundaries. A file holds the number of the offset of each batch.

    Args:
        stack: The stack.
        grid_bits: Bits after the binary point.

    Attributes:
        offset: The number that is added before rounding down, from 0 to 1.
        margin: Distance from a boundary below which `quantize` raises `NearBoundaryError`.
    """

    def __init__(self, stack: BitStack, grid_bits: int):
        self.stack = stack
        self.grid_bits = grid_bits
        self.segment_bits = grid_bits - SEGMENTS_BITS
        self.offset = OFFSET
        self.margin = 0.0

    def choose_offset(self, index: int) -> None:
        """Select one of the offsets 0..MAX_OFFSETS-1."""
        self.offset = (OFFSET + index * OFFSET_STEP) % 1

    # Floats and integers

    def quantize(self, values: Tensor, bits: int | Tensor) -> Tensor:
        """Round floats to integers: floor(2^bits values + offset).

        Args:
            values: Floats of any shape.
            bits: Number of bits after the binary point, one for all values or one for each.

        Raises:
            NearBoundaryError: If a value is closer to a boundary than `margin`.
            CodingError: If a value is not finite or too large.
        """
        factor = 2.0**bits if isinstance(bits, int) else torch.ones_like(bits) << bits
        scaled = values.double() * factor + self.offset
        if not scaled.numel():
            return scaled.long()
        if not scaled.abs().amax() < 2.0**60:  # also true of NaN
            raise CodingError("a value of a network is not finite")
        integers = scaled.floor()
        if self.margin:
            distance = 0.5 - (scaled - integers - 0.5).abs().amax()
            if distance < self.margin:
                raise NearBoundaryError("a value is close to a boundary of rounding")
        return integers.long()

    def quantize_parameters(self, values: Tensor) -> Tensor:
        """Round floats to multiples of 2^-PARAMETER_BITS."""
        return self.quantize(values, PARAMETER_BITS).double() * 2.0**-PARAMETER_BITS

    def to_grid(self, values: Tensor) -> Tensor:
        """Return floats as numbers of the grid."""
        return self.quantize(values, self.grid_bits)

    def to_float(self, x: Tensor) -> Tensor:
        """Return numbers of the grid as floats, exactly."""
        if x.numel() and x.abs().amax() >= MAX_GRID:
            raise CodingError("a number is too large for the grid")
        return x.double() * 2.0**-self.grid_bits

    # Uniform numbers

    def push(self, values: Tensor, sizes: Tensor) -> None:
        """Push values, each below its size."""
        self.stack.push(_flat(values), _flat(sizes))

    def pop(self, sizes: Tensor) -> Tensor:
        """Pop values, each below its size."""
        return torch.from_numpy(self.stack.pop(_flat(sizes))).view(sizes.shape)

    def push_bits(self, values: Tensor, bits: int) -> None:
        """Push values below 2^bits."""
        self.stack.push_bits(_flat(values), bits)

    def pop_bits(self, bits: int, shape: torch.Size) -> Tensor:
        """Pop values below 2^bits."""
        return torch.from_numpy(self.stack.pop_bits(bits, shape.numel())).view(shape)

    # Linear maps

    def exchange(
        self,
        x: Tensor,
        x_start: Tensor | int,
        y_start: Tensor | int,
        ratio: Tensor,
        shift: Tensor | int,
        backward: bool,
    ) -> Tensor:
        """Map each x to y_start + (x - x_start) ratio / 2^shift, or back.

        Args:
            x: Numbers; those of y if `backward`.
            x_start: A point of each map.
            y_start: The value of the map there.
            ratio: Numerator R of each slope R / 2^h, at least 1.
            shift: Exponent h of each slope.
            backward: Whether to apply the inverse map.

        Returns:
            The numbers y, or x if `backward`, with the shape of the input.
        """
        start = y_start if backward else x_start
        end = x_start if backward else y_start
        numbers = _flat(x - start)
        ratios = _flat(ratio.expand(x.shape))
        shifts = _flat(torch.as_tensor(shift).expand(x.shape))
        if len(numbers) and (abs(numbers).max() >= 1 << 40 or ratios.min() < 1):
            raise CodingError("a number is too large for the grid")
        exchange = self._unscale if backward else self._scale
        return torch.from_numpy(exchange(numbers, ratios, shifts)).view(x.shape) + end

    def _scale(self, x: Integers, ratios: Integers, shifts: Integers) -> Integers:
        y = x.copy()
        for part in chunks(len(x)):
            total = x[part] * ratios[part] + self.stack.pop(ratios[part])
            y[part] = total >> shifts[part]
            self.stack.push_bits(total - (y[part] << shifts[part]), shifts[part])
        return y

    def _unscale(self, y: Integers, ratios: Integers, shifts: Integers) -> Integers:
        x = y.copy()
        for part in reversed(chunks(len(y))):
            total = (y[part] << shifts[part]) + self.stack.pop_bits(shifts[part], len(y[part]))
            x[part] = total // ratios[part]
            self.stack.push(total - x[part] * ratios[part], ratios[part])
        return x

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor, backward: bool) -> Tensor:
        """Map x to scale x + shift, or back.

        Args:
            x: Numbers of the grid; those of the result if `backward`.
            scale: Positive floats.
            shift: Numbers of the grid.
            backward: Whether to apply the inverse map.
        """
        ratio, bits = self.to_ratio(scale)
        return self.exchange(x, 0, shift, ratio, bits, backward)

    def to_ratio(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return a positive scale as a fraction R / 2^h with R of RATIO_BITS bits.

        With other offsets than the first, R can have one bit more or less.
        """
        # 1 + floor(log2(scale)); 0.002 keeps exact powers of 2 away from a rounding boundary.
        magnitude = self.quantize(scale.double().log2() + (1.002 - OFFSET), 0)
        shift = (RATIO_BITS - magnitude).clamp(0, MAX_SHIFT)
        return self.quantize(scale, shift).clamp(min=1), shift

    # Curved maps

    def piecewise_linear(
        self,
        x: Tensor,
        node: Callable[[Tensor], Tensor],
        guess: Callable[[Tensor], Tensor],
        backward: bool,
        segment_bits: int | None = None,
    ) -> Tensor:
        """Map each x by an increasing function that is linear within segments, or back.

        Both directions compute the function at the ends of a segment only. The inverse starts
        from a guess, whose rounding errors do not matter.

        Args:
            x: Numbers; those of y if `backward`.
            node: Function from segments i to the values at their starts, both int64.
            guess: Function from values to approximate segments, both int64.
            backward: Whether to apply the inverse map.
            segment_bits: Logarithm to base 2 of the length of a segment; None: that of the coder.

        Returns:
            The numbers y, or x if `backward`, with the shape of the input.
        """
        bits = self.segment_bits if segment_bits is None else segment_bits
        if not backward:
            index = x >> bits
            value = node(index)
            return self.exchange(x, index << bits, value, node(index + 1) - value, bits, False)
        margin = self.margin
        self.margin = 0.0  # segments that the search only visits need no margin
        index = _search(x, node, guess(x))
        self.margin = margin
        value = node(index)
        return self.exchange(x, index << bits, value, node(index + 1) - value, bits, True)

    def monotone(
        self,
        x: Tensor,
        function: Callable[[Tensor], Tensor],
        inverse: Callable[[Tensor], Tensor],
        backward: bool,
    ) -> Tensor:
        """Map each x by an increasing function of floats, see `piecewise_linear`.

        Args:
            x: Numbers; those of y if `backward`.
            function: Increasing function of float64 tensors.
            inverse: Its inverse, which may be approximate.
            backward: Whether to apply the inverse map.
        """

        def node(index: Tensor) -> Tensor:
            start = self.to_float(index << self.segment_bits)
            # The index makes the values increase strictly, even where the function is flat.
            return self.quantize(function(start), self.grid_bits + EXTRA_BITS) + index

        def guess(y: Tensor) -> Tensor:
            x = inverse(self.to_float(y >> EXTRA_BITS)) * 2.0**SEGMENTS_BITS
            return x.nan_to_num(0.0).clamp(-(2.0**40), 2.0**40).floor().long()

        if backward:
            return self.piecewise_linear(
                (x << EXTRA_BITS) + self.pop_bits(EXTRA_BITS, x.shape), node, guess, True
            )
        y = self.piecewise_linear(x, node, guess, False)
        self.push_bits(y & ((1 << EXTRA_BITS) - 1), EXTRA_BITS)
        return y >> EXTRA_BITS


def _search(y: Tensor, node: Callable[[Tensor], Tensor], index: Tensor) -> Tensor:
    """Return the segment of each value y: node(index) <= y < node(index + 1)."""
    for _ in range(MAX_SEARCH_STEPS):
        too_high = y < node(index)
        too_low = y >= node(index + 1)
        if not (too_high.any() or too_low.any()):
            return index
        index = index - too_high.long() + too_low.long()
    raise CodingError("a value is outside the range of a map")


def chunk_size(count: int) -> int:
    """Return how many of `count` numbers exchange bits at once."""
    return max(MIN_CHUNK, count // 16)


def chunks(count: int) -> list[slice]:
    """Return the parts of `count` numbers that exchange bits at once."""
    size = chunk_size(count)
    return [slice(start, start + size) for start in range(0, count, size)]


def _flat(values: Tensor) -> Integers:
    numbers: Integers = values.reshape(-1).numpy()
    return numbers
