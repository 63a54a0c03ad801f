"""Checks of files that somebody else may have written: checkpoints, exports and metrics."""

import json
import math
from collections.abc import Callable
from itertools import accumulate, product
from pathlib import Path
from typing import Any

from flowgen.utils.errors import check
from flowgen.utils.metrics import COMPARED, SAMPLE_METRICS

FORMAT = 1  # version of the file format; version 0.2.0 of flowgen started with 1
MAX_CONFIG_BYTES = 2**20  # of a configuration; larger ones take seconds to read
MAX_COUNT = 2**63
MAX_STEP = 2**53  # in metrics.jsonl: JSON numbers are float64
MAX_ABS_VALUE = 1e100  # of a metric; no axis can show more
NUMERIC_METRICS = {  # keys of metrics that commands compute with
    "loss",
    "lr",
    "grad_norm",
    "images_per_second",
    "seconds",
    "memory_gib",
    "bits",
    "images",
    "log_z",
    "log_z_error",
    *(metric.name for metric in COMPARED),
    *(f"{metric.name}_error" for metric in COMPARED),
    "sample_count",
    "sample_temperature",
    *(
        f"{prefix}_{name}{suffix}"
        for prefix, name, suffix in product(
            ("sample", "training", "test"), SAMPLE_METRICS, ("", "_error")
        )
    ),
}
PROGRESS_KEYS = {"best", "seconds", "evals_since_best", "best_ema"}
NAN_RECOVERY_KEYS = {"failed", "skipped", "rewinds", "failed_at", "rewound_to", "lr_scale"}


def validate_checkpoint(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the checkpoint if its format and all of its values are valid.

    Raises:
        UserError: Otherwise.
    """
    version = state.get("format")
    check(
        version is not None and not state.keys() & {"rescue", "figures"},  # before version 0.2.0
        f"{path} was written by a version of flowgen before 0.2.0, whose format is not "
        "supported: train the model again, or use that version",
    )
    check(
        type(version) is not int or version <= FORMAT,
        f"{path} was written by a later version of flowgen: upgrade flowgen to read it",
    )
    try:
        valid = type(version) is int and version == FORMAT and _is_valid(state)
    except (AttributeError, KeyError, RecursionError, RuntimeError, TypeError, ValueError):
        valid = False
    check(
        valid, f"{path} contains values that no training writes: choose another run or checkpoint"
    )
    return state


def _is_small(config: Any) -> bool:
    """Return whether the configuration is plain data of a bounded size.

    A few bytes of a pickle can repeat one list millions of times. Encoding in pieces stops early,
    and fails on lone surrogates, which could not be written to a file.
    """
    pieces = json.JSONEncoder(ensure_ascii=False).iterencode(config)
    sizes = accumulate(len(piece.encode()) for piece in pieces)
    return all(size <= MAX_CONFIG_BYTES for size in sizes)


def is_number(value: object) -> bool:
    """Return whether a value is a number that can be plotted."""
    return type(value) in (int, float) and abs(value) < MAX_ABS_VALUE  # type: ignore[arg-type]


def is_metrics_row(row: Any) -> bool:
    """Return whether training could have written this row of metrics."""
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and 0 <= row["step"] < MAX_STEP
        and isinstance(row.get("split"), str)
        and all(
            value is None
            or is_number(value)
            or (isinstance(value, bool | str) and name not in NUMERIC_METRICS)
            for name, value in row.items()
        )
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_COUNT


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and _is_tensor(tensor) for name, tensor in value.items()
    )


def _is_tensor(value: Any) -> bool:
    from torch import Tensor  # not needed for the metadata of an export

    return isinstance(value, Tensor)


def _is_config(value: Any) -> bool:
    return (
        _is_small(value)
        and all(isinstance(value.get(section), dict) for section in ("model", "data", "trainer"))
        and _is_count(value.get("seed"))
        and is_number(value["trainer"]["sample_temperature"])
        and isinstance(value.get("evaluation", {}), dict)
        and all(isinstance(value[key].get("_target_", ""), str) for key in ("model", "data"))
    )


def _is_progress(value: Any) -> bool:
    return (
        _has_numbers(value, PROGRESS_KEYS)
        and _is_count(value.get("evals_since_best", 0))
        and _is_count(value.get("best_ema", 0))
        and not math.isnan(value["best"])
        and 0 <= value["seconds"] < math.inf
    )


def _has_numbers(value: Any, names: set[str]) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() <= names
        and all(type(number) in (int, float) for number in value.values())
    )


def _is_mode(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("precision"), str)
        and value.get("compiled") in (True, False, None)
    )


REQUIRED: dict[str, Callable[[Any], bool]] = {  # parts of every checkpoint, with their checks
    "config": _is_config,
    "step": _is_count,
    "images_seen": _is_count,
    "model": _is_weights,
    "ema": lambda value: value is None or _is_weights(value),
    "optimizer": lambda value: isinstance(value, dict),
    "progress": _is_progress,
    "nan_recovery": lambda value: _has_numbers(value, NAN_RECOVERY_KEYS),
}


def _is_valid(state: dict[str, Any]) -> bool:
    """Return whether every part has the type and range that training and evaluation write."""
    emas = state.get("emas", [])
    return (
        all(is_valid(state[key]) for key, is_valid in REQUIRED.items())
        and isinstance(emas, list)
        and all(map(_is_weights, emas))
        and state["progress"].get("best_ema", 0) < max(1, len(emas))
        and isinstance(state.get("metric", ""), str)
        and ("mode" not in state or _is_mode(state["mode"]))
        and is_metrics_row(state.get("metrics", {}) | {"step": state["step"], "split": "test"})
    )
