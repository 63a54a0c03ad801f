"""What is measured, and measured values: with unit, direction, standard error, and the split that they are of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """Something that is measured in `unit`; of two values the higher is the better one, or the lower, or (None) neither."""

    name: str
    unit: str = ""
    higher_is_better: bool | None = None


BITS_PER_DIM = Metric("bits_per_dim", "bits/dim", higher_is_better=False)
LOG_LIKELIHOOD = Metric("log_likelihood", "nats", higher_is_better=True)
LOG_PROBABILITY = Metric("log_probability", "nats", higher_is_better=True)
UNNORMALISED = Metric("unnormalised_log_probability", "nats", higher_is_better=True)  # log p(x) + log Z, whose log Z is not known
