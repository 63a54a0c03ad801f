"""Values of metrics: how they are written, read, compared and printed."""

import json
import math

import pytest

from flowgen.utils.metrics import (
    BITS_PER_DIM,
    LOG_LIKELIHOOD,
    Metric,
    Metrics,
    MetricValue,
    nonfinite_to_none,
)

RECONSTRUCTION_ERROR = Metric(
    "reconstruction_error", "squared error per pixel", higher_is_better=False
)


def test_a_value_survives_a_round_trip_through_a_file():
    """A metric whose own name ends in _error is not confused with a standard error."""
    bits = MetricValue(BITS_PER_DIM, 3.5, 0.25, "test")
    reconstruction = MetricValue(RECONSTRUCTION_ERROR, 0.1, None, "test")
    metrics = Metrics.of(bits, reconstruction, images=7)
    row = {"split": "test"} | json.loads(json.dumps(nonfinite_to_none(metrics.row())))
    assert row == {
        "split": "test",
        "bits_per_dim": 3.5,
        "bits_per_dim_error": 0.25,
        "reconstruction_error": 0.1,
        "images": 7,
    }
    assert MetricValue.from_row(row, BITS_PER_DIM) == bits
    assert MetricValue.from_row(row, RECONSTRUCTION_ERROR) == reconstruction
    assert MetricValue.from_row(row, LOG_LIKELIHOOD) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_null_in_files_and_not_read(value):
    row = nonfinite_to_none(Metrics.of(MetricValue(BITS_PER_DIM, value, math.inf)).row())
    assert row == {"bits_per_dim": None, "bits_per_dim_error": None}
    assert MetricValue.from_row(row, BITS_PER_DIM) is None


def test_better_values_have_a_lower_cost():
    assert BITS_PER_DIM.cost(1.0) < BITS_PER_DIM.cost(2.0)
    assert LOG_LIKELIHOOD.cost(-1.0) < LOG_LIKELIHOOD.cost(-2.0)
    assert BITS_PER_DIM.cost(math.nan) == LOG_LIKELIHOOD.cost(math.nan) == math.inf


def test_values_are_printed_with_split_and_error():
    metrics = Metrics.of(
        MetricValue(LOG_LIKELIHOOD, -86.25, 0.5), MetricValue(RECONSTRUCTION_ERROR, 0.125), images=7
    ).on("test")
    assert str(metrics["log_likelihood"]) == "test log_likelihood -86.250 ± 0.500"
    assert str(metrics["reconstruction_error"]).endswith(" 0.125")
    union = metrics | Metrics.of(MetricValue(BITS_PER_DIM, 1.0), bits=5)
    assert union.facts == {"images": 7, "bits": 5}


def test_evaluate_prints_every_value_with_error_and_unit(tiny_run, command):
    lines = command("evaluate", "--run", tiny_run)[1].splitlines()
    metrics = json.loads(command("evaluate", "--run", tiny_run, "--json")[1])
    printed = {line.split()[0]: line.split()[1:] for line in lines}
    assert printed["bits_per_dim"] == [
        "<=",
        f"{metrics['bits_per_dim']:.4f}",
        "±",
        f"{metrics['bits_per_dim_error']:.4f}",
        "bits/dim",
    ]
    assert printed["split"] == ["test"]
    assert printed["images"] == [str(metrics["images"])]
    assert "bits_per_dim_error" not in printed
    assert printed.keys() == metrics.keys() - {"bits_per_dim_error"}
