"""Means with standard errors, paired differences, and the jackknife."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_GROUPS = 10  # of the jackknife


@dataclass(frozen=True)
class Mean:
    """Mean of `count` independent values with its standard error.

    The error of a single value is 0 and not printed, because it is not known.

    Example:
        >>> print(Mean(1.23456, 0.0123, 9))
        1.235 ± 0.012
    """

    value: float
    error: float
    count: int

    def __str__(self) -> str:
        if self.count == 1 or not math.isfinite(self.error):
            return f"{self.value:.3f}"
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


def jackknife_errors(
    statistics: Callable[..., Mapping[str, float]], *sets: Tensor, groups: int = NUM_GROUPS
) -> dict[str, float]:
    """Return standard errors of statistics of independent sets, by the delete-a-group jackknife.

    A set is divided at random into g groups. If t_i is a statistic without group i, with mean t,
    the variance that this set contributes is (g - 1) / g sum (t_i - t)^2 (Efron and Stein, The
    jackknife estimate of variance, 1981). Unlike the bootstrap, it repeats no point, which would
    change distances between neighbors.

    Args:
        statistics: Function that returns the statistics of the sets by name.
        *sets: Independent points of each set, (N, ...) with N of at least `groups`.
        groups: Number of groups g.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> points = torch.randn(1000)
        >>> errors = jackknife_errors(lambda x: {"mean": x.mean().item()}, points)
        >>> 0.5 < errors["mean"] / (1 / math.sqrt(1000)) < 2
        True
    """
    variances: dict[str, float] = defaultdict(float)
    generator = torch.Generator().manual_seed(0)
    for index, points in enumerate(sets):
        parts = torch.randperm(len(points), generator=generator).tensor_split(groups)
        values = [
            statistics(
                *sets[:index],
                points[torch.cat(parts[:group] + parts[group + 1 :])],
                *sets[index + 1 :],
            )
            for group in range(groups)
        ]
        for name in values[0]:
            error = mean([value[name] for value in values]).error
            variances[name] += ((groups - 1) * error) ** 2
    return {name: math.sqrt(variance) for name, variance in variances.items()}
