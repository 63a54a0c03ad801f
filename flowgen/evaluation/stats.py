"""Means with standard errors, and paired differences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """Mean of `count` independent values with its standard error, 0 for a single value.

    Example:
        >>> print(Mean(1.23456, 0.0123, 9))
        1.235 ± 0.012
    """

    value: float
    error: float
    count: int

    def __str__(self) -> str:
        # Two significant digits of the error.
        digits = 3 if self.error == 0 else max(0, 1 - math.floor(math.log10(self.error)))
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


def mean(values: Sequence[float]) -> Mean:
    """Return the mean m of n values with the standard error s / sqrt(n).

    s^2 = sum (x - m)^2 / (n - 1) is the unbiased variance.

    Example:
        >>> print(mean([1.0, 2.0, 3.0]))
        2.00 ± 0.58
    """
    count = len(values)
    center = math.fsum(values) / count
    squares = math.fsum((value - center) ** 2 for value in values)
    error = math.sqrt(squares / (count - 1) / count) if count > 1 else 0.0
    return Mean(center, error, count)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Mean:
    """Return the mean of first[i] - second[i], two values of the same image i.

    Variation that the images share cancels, so that the error is smaller than that of two
    independent means.

    Example:
        >>> print(paired_difference([1.0, 12.0, 5.0], [0.5, 11.5, 4.5]))
        0.500 ± 0.000
    """
    return mean([a - b for a, b in zip(first, second, strict=True)])
