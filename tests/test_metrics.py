"""Measured values: how they are written, read and compared."""

import json
import math

import pytest

from flowgen.utils.metrics import (
    BITS_PER_DIM,
    LOG_LIKELIHOOD,
    Metric,
    Metrics,
    MetricValue,
    finite,
    metric_from_row,
)

ERROR = Metric("reconstruction_error", "squared error per pixel", higher_is_better=False)


def test_a_value_is_read_as_it_was_written():
    """A metric whose own name ends as errors do is told from an error."""
    bits, error = (
        MetricValue(BITS_PER_DIM, 3.5, 0.25, "test"),
        MetricValue(ERROR, 0.1, None, "test"),
    )
    row = {"split": "test"} | json.loads(
        json.dumps(finite(Metrics.of(bits, error, images=7).row()))
    )
    assert row == {
        "split": "test",
        "bits_per_dim": 3.5,
        "bits_per_dim_error": 0.25,
        "reconstruction_error": 0.1,
        "images": 7,
    }
    assert metric_from_row(row, BITS_PER_DIM) == bits and metric_from_row(row, ERROR) == error
    assert metric_from_row(row, LOG_LIKELIHOOD) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_files_and_is_not_read(value):
    row = finite(Metrics.of(MetricValue(BITS_PER_DIM, value, math.inf)).row())
    assert (
        row == {"bits_per_dim": None, "bits_per_dim_error": None}
        and metric_from_row(row, BITS_PER_DIM) is None
    )


def test_the_better_value_costs_less():
    assert BITS_PER_DIM.cost(1.0) < BITS_PER_DIM.cost(2.0) and LOG_LIKELIHOOD.cost(
        -1.0
    ) < LOG_LIKELIHOOD.cost(-2.0)
    assert BITS_PER_DIM.cost(math.nan) == LOG_LIKELIHOOD.cost(math.nan) == math.inf


def test_values_are_told_with_split_and_error():
    found = Metrics.of(
        MetricValue(LOG_LIKELIHOOD, -86.25, 0.5), MetricValue(ERROR, 0.125), images=7
    ).on("test")
    assert str(found["log_likelihood"]) == "test log_likelihood -86.250 ± 0.500" and str(
        found["reconstruction_error"]
    ).endswith(" 0.125")
    assert (found | Metrics.of(MetricValue(BITS_PER_DIM, 1.0), draws=2)).facts == {
        "images": 7,
        "draws": 2,
    }


def test_evaluate_prints_every_value_with_error_and_unit(tiny_run, command):
    lines = command("evaluate", "--run", tiny_run)[1].splitlines()
    figures = json.loads(command("evaluate", "--run", tiny_run, "--json")[1])
    told = {line.split()[0]: line.split()[1:] for line in lines}
    assert told["bits_per_dim"] == [
        f"{figures['bits_per_dim']:.4f}",
        "+-",
        f"{figures['bits_per_dim_error']:.4f}",
        "bits/dim",
    ]
    assert (
        told["split"] == ["test"]
        and told["images"] == [str(figures["images"])]
        and "bits_per_dim_error" not in told
    )
    assert told.keys() == figures.keys() - {"bits_per_dim_error"}
