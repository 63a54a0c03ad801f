"""What is measured, and measured values: with unit, direction, standard error, and the split that they are of."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Metric:
    """Something that is measured in `unit`; of two values the higher is the better one, or the lower, or (None) neither."""

    name: str
    unit: str = ""
    higher_is_better: bool | None = None

    def cost(self, value: float) -> float:
        """The lower, the better; what is no number is worst."""
        if math.isnan(value):
            return math.inf
        return -value if self.higher_is_better else value


BITS_PER_DIM = Metric("bits_per_dim", "bits/dim", higher_is_better=False)
NOISY_BITS_PER_DIM = Metric(
    "noisy_bits_per_dim", "bits/dim of images with noise", higher_is_better=False
)  # of images it is none
LOG_LIKELIHOOD = Metric("log_likelihood", "nats", higher_is_better=True)
COMPARED = (BITS_PER_DIM, NOISY_BITS_PER_DIM, LOG_LIKELIHOOD)  # by which runs are
LOG_PROBABILITY = Metric("log_probability", "nats", higher_is_better=True)
UNNORMALIZED = Metric(
    "unnormalised_log_probability", "nats", higher_is_better=True
)  # log p(x) + log Z, whose log Z is not known


@dataclass(frozen=True)
class MetricValue:
    """A value of a metric, with its standard error where that is known, and the split whose images it is of."""

    metric: Metric
    value: float
    error: float | None = None
    split: str | None = None

    def __str__(self) -> str:
        split, error = (
            f"{self.split} " if self.split else "",
            f" ± {self.error:.3f}" if self.error else "",
        )
        return f"{split}{self.metric.name} {self.value:.3f}{error}"


@dataclass(frozen=True)
class Metrics:
    """What was measured of a model at once, by name, and facts about how: of how many images, at how many bits."""

    measured: dict[str, MetricValue] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, *measured: MetricValue, **facts: Any) -> "Metrics":
        return cls({each.metric.name: each for each in measured}, facts)

    def __getitem__(self, name: str) -> MetricValue:
        return self.measured[name]

    def __or__(self, other: "Metrics") -> "Metrics":
        return Metrics(self.measured | other.measured, self.facts | other.facts)

    def on(self, split: str) -> "Metrics":
        return Metrics(
            {name: replace(each, split=split) for name, each in self.measured.items()}, self.facts
        )

    def row(self) -> dict[str, Any]:
        """As files have it: NAME and NAME_error of all that was measured, and the facts."""
        flat: dict[str, Any] = {}
        for name, each in self.measured.items():
            flat |= {name: each.value} | (
                {} if each.error is None else {f"{name}_error": each.error}
            )
        return flat | self.facts


def metric_from_row(row: Mapping[str, Any], metric: Metric) -> MetricValue | None:
    """A value of this metric in a row of a file, None where it has none."""
    value = row.get(metric.name)
    return (
        None
        if value is None
        else MetricValue(metric, value, row.get(f"{metric.name}_error"), row.get("split"))
    )


def beats_entropy_bound(measured: MetricValue, entropy: float, dimensions: int) -> bool:
    """Whether a likelihood of images, whose `entropy` is in bits an image, is better by three errors than that of any distribution."""
    margin = 3 * (measured.error or 0.0)
    if measured.metric == BITS_PER_DIM:
        return dimensions * (measured.value + margin) < entropy
    return measured.metric == LOG_LIKELIHOOD and margin - measured.value < entropy * math.log(2)


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """With None for what is not finite, since JSON has no word for it."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
