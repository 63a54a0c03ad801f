"""The rows of metrics.jsonl, checked as they are read: whoever uses them need not ask where they come from."""

import json
import logging
from pathlib import Path
from typing import Any

from flowgen.measures import COMPARED

OF_TRAINING = ("loss", "lr", "grad_norm", "images_per_second", "seconds", "memory_gib", "bits")
OF_IMAGES = ("images", "log_z", "log_z_error")
FIGURES = tuple(metric.name + ending for metric in COMPARED for ending in ("", "_error"))
NUMBERS = {*OF_TRAINING, *OF_IMAGES, *FIGURES}  # that others compute with
LARGEST = 1e100  # beyond which no axis can be drawn
log = logging.getLogger("flowgen")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every row that a training could have written; the others, such as one that a crash cut short, are counted in a warning."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = [row for line in lines if (row := _read(line)) is not None]
    if len(rows) < len(lines):
        log.warning(
            "%s: %d of %d lines were cut short or are no rows of a training, and are left out", path, len(lines) - len(rows), len(lines)
        )
    return rows


def _read(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and is_row(row) else None


def is_row(row: dict[str, Any]) -> bool:
    """Whether a training could have written it."""
    step, split = row.get("step"), row.get("split")
    scalars = all(value is None or isinstance(value, bool | str) or is_number(value) for value in row.values())
    numbers = all(value is None or is_number(value) for name, value in row.items() if name in NUMBERS)
    return type(step) is int and 0 <= step < 2**53 and isinstance(split, str) and scalars and numbers


def is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST  # type: ignore[arg-type]
