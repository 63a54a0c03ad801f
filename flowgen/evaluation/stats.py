"""Means with their standard errors, and differences of what was measured on the same images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """The mean of `count` independent values and its standard error, 0 for a single value."""

    value: float
    error: float
    count: int

    def __str__(self) -> str:
        digits = 3 if self.error == 0 else max(0, 1 - math.floor(math.log10(self.error)))
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


def mean(values: Sequence[float]) -> Mean:
    """The mean m of n values, with s / sqrt(n) of the unbiased variance s^2 = sum (x - m)^2 / (n - 1)."""
    count = len(values)
    middle = math.fsum(values) / count
    squares = math.fsum((value - middle) ** 2 for value in values)
    return Mean(middle, math.sqrt(squares / (count - 1) / count) if count > 1 else 0.0, count)


def paired_difference(one: Sequence[float], other: Sequence[float]) -> Mean:
    """The mean of one[i] - other[i], both of the same image i: what the images have in common drops out of its error."""
    return mean([a - b for a, b in zip(one, other, strict=True)])
