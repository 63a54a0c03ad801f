"""Metrics, and their values with unit, direction, error, split and kind of likelihood."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

Likelihood = Literal["exact", "bound", "estimate", "none"]


@dataclass(frozen=True)
class Metric:
    """A quantity that is measured.

    Args:
        name: Name in files and tables.
        unit: Unit of its values.
        higher_is_better: Direction of improvement, or None.

    Example:
        >>> BITS_PER_DIM.cost(2.0), LOG_LIKELIHOOD.cost(-86.0)
        (2.0, 86.0)
    """

    name: str
    unit: str = ""
    higher_is_better: bool | None = None

    def cost(self, value: float) -> float:
        """Return a number that is lower for better values, and infinite for NaN."""
        if math.isnan(value):
            return math.inf
        return -value if self.higher_is_better else value

    def bound_sign(self, likelihood: str | None) -> str:
        """Return "<= " or ">= ", to be printed before a value of this metric that is a bound.

        Args:
            likelihood: The kind of likelihood of the value. All but "bound" return "".

        Example:
            >>> BITS_PER_DIM.bound_sign("bound"), LOG_LIKELIHOOD.bound_sign("bound")
            ('<= ', '>= ')
        """
        if likelihood != "bound":
            return ""
        return ">= " if self.higher_is_better else "<= "


BITS_PER_DIM = Metric("bits_per_dim", "bits/dim", higher_is_better=False)
# Bits/dim of images with added Gaussian noise: not a likelihood of the images themselves.
NOISY_BITS_PER_DIM = Metric(
    "noisy_bits_per_dim", "bits/dim of images with noise", higher_is_better=False
)
LOG_LIKELIHOOD = Metric("log_likelihood", "nats", higher_is_better=True)  # mean over the images
# For models without a likelihood: distance between images and as many samples
FRECHET = Metric("frechet", "squared distance of principal components", higher_is_better=False)
# Metrics that rank runs. Models of binary images are compared in nats, which RBMs report too.
COMPARED = (LOG_LIKELIHOOD, BITS_PER_DIM, NOISY_BITS_PER_DIM, FRECHET)
LOG_PROBABILITY = Metric("log_probability", "nats", higher_is_better=True)  # of one image
# log P(unknown pixels | known pixels) of one image
CONDITIONAL_LOG_PROB = Metric("conditional_log_probability", "nats", higher_is_better=True)
LOG_Z = Metric("log_z", "nats")
EFFECTIVE_SAMPLE_SIZE = Metric("effective_sample_size", "samples", higher_is_better=True)
# log p(x) + log Z with an unknown log Z
UNNORMALIZED = Metric("unnormalized_log_probability", "nats", higher_is_better=True)
SAMPLE_METRICS = {  # of sample quality, without the prefix of the images: sample_, training_, test_
    metric.name: metric
    for metric in (
        FRECHET,
        Metric("coverage", "of the test images", higher_is_better=True),
        Metric("spread", "times that of the test images"),
        Metric("readable", higher_is_better=True),
        Metric("fid", higher_is_better=False),
        Metric("precision", higher_is_better=True),
        Metric("recall", higher_is_better=True),
    )
}


@dataclass(frozen=True)
class MetricValue:
    """Value of a metric.

    Args:
        metric: Metric that was measured.
        value: Value, in the unit of the metric.
        error: Standard error, or None if it is unknown.
        split: Split of the data set whose images were used, such as "test".
        likelihood: The kind of likelihood, or None for other metrics.

    Example:
        >>> print(MetricValue(BITS_PER_DIM, 3.5, 0.25, "test", "bound"))
        test bits_per_dim <= 3.500 ± 0.250
    """

    metric: Metric
    value: float
    error: float | None = None
    split: str | None = None
    likelihood: str | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any], metric: Metric) -> "MetricValue | None":
        """Return the value of `metric` in a row of metrics.jsonl, or None if it has no value.

        Example:
            >>> print(MetricValue.from_row({"bits_per_dim": 3.5, "split": "test"}, BITS_PER_DIM))
            test bits_per_dim 3.500
        """
        value = row.get(metric.name)
        if value is None:
            return None
        kind = recorded_likelihood(row) if metric in COMPARED else None
        return cls(metric, value, row.get(f"{metric.name}_error"), row.get("split"), kind)

    @property
    def sign(self) -> str:
        """The sign "<= " or ">= " of a bound, and "" of other values."""
        return self.metric.bound_sign(self.likelihood)

    def __str__(self) -> str:
        split = f"{self.split} " if self.split else ""
        error = f" ± {self.error:.3f}" if self.error else ""
        return f"{split}{self.metric.name} {self.sign}{self.value:.3f}{error}"


@dataclass(frozen=True)
class Metrics:
    """Values of several metrics of one model, by name.

    Args:
        measured: Values by the names of their metrics.
        facts: Further facts about the evaluation, such as the number of images.

    Example:
        >>> metrics = Metrics.of(MetricValue(BITS_PER_DIM, 3.5, 0.25), images=100)
        >>> metrics["bits_per_dim"].value
        3.5
        >>> metrics.row()
        {'bits_per_dim': 3.5, 'bits_per_dim_error': 0.25, 'images': 100}
    """

    measured: dict[str, MetricValue] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, *values: MetricValue, **facts: Any) -> "Metrics":
        """Return metrics with these values and facts."""
        return cls({value.metric.name: value for value in values}, facts)

    def __getitem__(self, name: str) -> MetricValue:
        return self.measured[name]

    def __or__(self, other: "Metrics") -> "Metrics":
        return Metrics(self.measured | other.measured, self.facts | other.facts)

    def on(self, split: str) -> "Metrics":
        """Return the same values, marked as measured on `split`."""
        return Metrics.of(
            *(replace(value, split=split) for value in self.measured.values()), **self.facts
        )

    def row(self) -> dict[str, Any]:
        """Return a flat dictionary for a file.

        It has NAME and NAME_error of each value, `likelihood`, the kind of the first value that
        has one, and the facts.
        """
        row: dict[str, Any] = {}
        for name, value in self.measured.items():
            row[name] = value.value
            if value.error is not None:
                row[f"{name}_error"] = value.error
            if value.likelihood is not None:
                row.setdefault("likelihood", value.likelihood)
        return row | self.facts


def beats_entropy_bound(value: MetricValue, entropy: float, dimensions: int) -> bool:
    """Return whether a likelihood is better than any distribution of the images can have.

    A difference of less than three standard errors does not count.

    Args:
        value: Value of bits/dim or log-likelihood; other metrics return False.
        entropy: Entropy of the images in bits per image.
        dimensions: Number of dimensions of an image.

    Example:
        >>> beats_entropy_bound(MetricValue(BITS_PER_DIM, 1.0), entropy=200.0, dimensions=100)
        True
    """
    margin = 3 * (value.error or 0.0)
    if value.metric == BITS_PER_DIM:
        return dimensions * (value.value + margin) < entropy
    return value.metric == LOG_LIKELIHOOD and margin - value.value < entropy * math.log(2)


def recorded_likelihood(row: Mapping[str, Any]) -> str | None:
    """Return the kind of likelihood that a row of metrics.jsonl records.

    Rows of older versions do not record it, but the likelihood of an RBM is exact if log Z has no
    error.

    Example:
        >>> recorded_likelihood({"log_z": 9.7, "log_z_error": 0.0})
        'exact'
    """
    recorded = row.get("likelihood")
    if recorded in get_args(Likelihood):
        return str(recorded)
    return "exact" if row.get("log_z_error") == 0 else None


def nonfinite_to_none(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with None in place of NaN and infinity, which JSON does not allow.

    Example:
        >>> nonfinite_to_none({"loss": math.nan, "step": 1})
        {'loss': None, 'step': 1}
    """
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
