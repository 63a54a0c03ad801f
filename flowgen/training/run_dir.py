"""The folder of a run: configuration, metrics, log, plots, samples and checkpoints."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from flowgen.training.checkpoint import read_checkpoint, weights_hash, write_checkpoint
from flowgen.training.untrusted import is_metrics_row
from flowgen.utils.errors import UserError, check, log
from flowgen.utils.files import atomic_write
from flowgen.utils.metrics import COMPARED, MetricValue, nonfinite_to_none

SUBDIRECTORIES = ("checkpoints", "samples", "tensorboard")
SUFFIXES = {".gif", ".html", ".json", ".jsonl", ".log", ".part", ".png", ".pt", ".yaml"}


class Run:
    """The files of one run.

    Args:
        folder: Path of the folder, which may not exist yet.

    Attributes:
        folder: The path.
        config: Path of the configuration, `config.yaml`.
        metrics: Path of the metrics of training and validation, `metrics.jsonl`.
        evaluation: Path of the results of `flowgen evaluate`, `evaluation.json`.
        log: Path of the log, `train.log`.
        tensorboard: Folder of the event files of TensorBoard.
        curves: Path of the plotted metrics, `curves.png`.
        filters: Path of the picture of learned filters, `features.png`.
        last: Path of the newest checkpoint.
        best: Path of the checkpoint with the best validation metric.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "config.yaml"
        self.metrics = folder / "metrics.jsonl"
        self.evaluation = folder / "evaluation.json"
        self.log = folder / "train.log"
        self.tensorboard = folder / "tensorboard"
        self.curves = folder / "curves.png"
        self.filters = folder / "features.png"
        self.last = folder / "checkpoints" / "last.pt"
        self.best = folder / "checkpoints" / "best.pt"

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def check_contained(self) -> None:
        """Check that no file of the run is a link to another folder, or a pipe.

        Files elsewhere would be read or overwritten.

        Raises:
            UserError: If a file is a link to another folder or not a regular file.
        """
        own = [
            path
            for path in sorted(self.folder.glob("*"))
            if path.name in SUBDIRECTORIES or path.suffix in SUFFIXES
        ]
        nested = [sorted((self.folder / name).glob("*")) for name in SUBDIRECTORIES]
        for path in chain(own, *nested):
            check(
                path.resolve().is_relative_to(self.folder.resolve()),
                f"{path} is a link to a file outside of the run: "
                "replace it by a copy of that file, or delete it",
            )
            check(
                path.is_file() or path.is_dir() or not path.exists(),
                f"{path} is not a regular file: delete it",
            )

    def sample_grid(self, step: int) -> Path:
        """Return the path of the samples of an optimizer step; its folder exists."""
        path = self.folder / "samples" / f"step_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        return path

    def step_path(self, step: int) -> Path:
        """Return the path of the numbered checkpoint of an optimizer step."""
        return self.last.with_name(f"step_{step:08d}.pt")

    def save(self, state: dict[str, Any], *, is_best: bool = False, numbered: bool = False) -> None:
        """Save a checkpoint as `last.pt`.

        Args:
            state: The content.
            is_best: Save it as `best.pt` too.
            numbered: Save it under the number of its step too.
        """
        copies = {self.best: is_best, self.step_path(state["step"]): numbered}
        write_checkpoint(state, self.last, [path for path, is_due in copies.items() if is_due])

    def checkpoints(self) -> list[Path]:
        """Return the existing checkpoints: `last.pt`, the numbered ones in reverse, `best.pt`."""
        numbered = sorted(self.last.parent.glob("step_*.pt"), reverse=True)
        return [path for path in (self.last, *numbered, self.best) if path.exists()]

    def latest_valid_checkpoint(self, before: float = math.inf) -> dict[str, Any] | None:
        """Return the first readable checkpoint with a step < before, or None without checkpoints.

        The order is `last.pt`, the numbered ones from the newest to the oldest, `best.pt`. If no
        step is below `before`, return the readable one with the largest step.

        Raises:
            UserError: If all checkpoints are damaged.
        """
        valid = []
        for path in self.checkpoints():
            try:
                valid.append(read_checkpoint(path))
            except UserError as error:
                log.warning("%s", error)
            if valid and valid[-1]["step"] < before and path != self.best:
                return valid[-1]
        check(
            bool(valid) or not self.checkpoints(),
            f"no checkpoint of {self.folder} can be read: train again with another output_dir",
        )
        return max(valid, key=lambda state: (state["step"] < before, state["step"]), default=None)

    def write_metrics(self, step: int, split: str, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl; values that are not finite become null.

        Args:
            step: Step of the training.
            split: "train", "validation" or "test".
            row: Values by their names.
        """
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"step": step, "split": split, **nonfinite_to_none(row)}) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the valid rows of metrics.jsonl, and warn if others are skipped.

        A crash can cut the last line short.
        """
        lines = self.metrics.read_bytes().splitlines() if self.metrics.is_file() else []
        rows = [row for row in map(_parse_json, lines) if is_metrics_row(row)]
        if len(rows) < len(lines):
            log.warning(
                "%s: skipped %d of %d lines, which are incomplete or not metrics of a training",
                self.metrics,
                len(lines) - len(rows),
                len(lines),
            )
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Delete the rows after `step`, which a resumed run writes again."""
        if not self.metrics.exists():
            return
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        with atomic_write(self.metrics) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def has_ended(self) -> bool:
        """Return whether training has finished: its last step was evaluated on the test split."""
        rows = self.read_metrics()
        last_step = max((row["step"] for row in rows), default=0)
        return any(row["split"] == "test" and row["step"] == last_step for row in rows)

    def save_evaluation(self, checkpoint: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Save the metrics of a checkpoint for later commands."""
        row = {"weights": weights_hash(checkpoint), **metrics}
        with atomic_write(self.evaluation) as temporary:
            temporary.write_text(json.dumps(row) + "\n")

    def load_evaluation(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return the metrics that were saved for the weights of a checkpoint, or {}."""
        metrics = _parse_json(self.evaluation.read_bytes()) if self.evaluation.is_file() else {}
        valid = isinstance(metrics, dict) and is_metrics_row(
            metrics | {"step": checkpoint["step"], "split": "test"}
        )
        if not valid or metrics.pop("weights", None) != weights_hash(checkpoint):
            return {}
        return metrics

    def environment(self) -> str:
        """Return versions and hardware of the last process that trained, according to the log."""
        text = self.log.read_text(errors="replace") if self.log.is_file() else ""
        return next(reversed(re.findall("environment: (.*)", text)), "")


def _parse_json(text: bytes) -> Any:
    """Return the parsed value, or None if the text is not valid JSON."""
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):
        return None


def validation_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the validation split; without a validation split, of the test split."""
    return [row for row in rows if row["split"] == "validation"] or [
        row for row in rows if row["split"] == "test"
    ]


def result_metric(rows: list[dict[str, Any]]) -> MetricValue | None:
    """Return the result of a run.

    This is the test metric of a finished run, else the best metric on the validation split.
    """
    for metric in COMPARED:
        validations = [row for row in validation_rows(rows) if row.get(metric.name) is not None]
        if validations:
            tests = [
                row
                for row in rows
                if (row["split"], row["step"]) == ("test", validations[-1]["step"])
                and row.get(metric.name) is not None
            ]
            best = min(validations, key=lambda row: metric.cost(row[metric.name]))
            return MetricValue.from_row(tests[-1] if tests else best, metric)
    return None


def cached_artifact(
    run: Run,
    checkpoint: dict[str, Any],
    kind: str,
    settings: object,
    compute: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Return the result of a long computation on a checkpoint, from the run's folder if there.

    Args:
        run: Folder of the cache.
        checkpoint: Checkpoint whose weights are part of the key. Results of other weights are
            deleted.
        kind: Name of the computation.
        settings: Arguments of the computation, which are part of the key.
        compute: Computation, whose result contains numbers and tensors.
    """
    import torch

    weights = weights_hash(checkpoint)
    settings_hash = hashlib.blake2s(repr(settings).encode(), digest_size=4).hexdigest()
    path = run.folder / f"{kind}_{weights}_{settings_hash}.pt"
    with suppress(Exception):  # no file yet, or the unpickler raises anything on a damaged one
        return torch.load(path, weights_only=True)
    result = compute()
    # A folder of another user, or a full disk, which torch.save reports as RuntimeError.
    with suppress(OSError, RuntimeError):
        with atomic_write(path) as temporary:
            torch.save(result, temporary)
        for other in run.folder.glob(f"{kind}_{'[0-9a-f]' * 16}_{'[0-9a-f]' * 8}.pt"):
            if weights not in other.name:
                other.unlink()
    return result
