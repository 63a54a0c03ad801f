"""A run's folder: its configuration, metrics, log, pictures and checkpoints."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowgen.training.checkpoint import (
    is_row,
    read_checkpoint,
    read_rows,
    weights_hash,
    write_checkpoint,
)
from flowgen.utils.errors import UserError
from flowgen.utils.metrics import COMPARED, MetricValue, finite

FOLDERS = {"checkpoints", "samples", "tensorboard"}
SUFFIXES = {".gif", ".html", ".json", ".jsonl", ".log", ".part", ".png", ".pt", ".yaml"}
log = logging.getLogger("flowgen")


class Run:
    """The files of one run, by name; README says what each holds."""

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

    def check_contained(self) -> None:
        """Raise `FlowgenError` where one of its files is a pipe, or a link by which files elsewhere would be read or written."""
        place, files = (
            self.folder.resolve(),
            [
                path
                for path in _entries(self.folder)
                if path.name in FOLDERS or path.suffix in SUFFIXES
            ],
        )
        for path in [
            *files,
            *(below for folder in files if folder.name in FOLDERS for below in _entries(folder)),
        ]:
            if not path.resolve().is_relative_to(place):
                raise UserError(
                    f"{path} is a link that leads out of the run's folder: put there what it leads to, or delete it"
                )
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise UserError(f"{path} is no file, but a pipe or the like: delete it")

    def sample_grid(self, step: int) -> Path:
        path = self.folder / "samples" / f"step_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        return path

    def step_path(self, step: int) -> Path:
        return self.last.with_name(f"step_{step:08d}.pt")

    def save(self, state: dict[str, Any], *, best: bool = False, keep: bool = False) -> None:
        """Write `last.pt`, and name it `best.pt` or by its step too where asked."""
        write_checkpoint(
            state, self.last, [self.best] * best + [self.step_path(state["step"])] * keep
        )

    def checkpoints(self) -> list[Path]:
        """`last.pt`, the numbered ones from the latest on, `best.pt`."""
        numbered = sorted(self.last.parent.glob("step_*.pt"), reverse=True)
        return [path for path in (self.last, *numbered, self.best) if path.exists()]

    def latest_valid_checkpoint(self, before: float = math.inf) -> dict[str, Any] | None:
        """The latest readable checkpoint of a step below `before`, where there is such a one, else the latest of all.

        None where the run has none. Raises FlowgenError where all are damaged.
        """
        good = []
        for path in self.checkpoints():
            try:
                good.append(read_checkpoint(path))
            except UserError as error:
                log.warning("%s", error)
            if good and good[-1]["step"] < before and path != self.best:
                return good[-1]
        if not good and self.checkpoints():
            raise UserError(
                f"no checkpoint of {self.folder} can be read: train anew into another folder"
            )
        return max(good, key=lambda state: (state["step"] < before, state["step"]), default=None)

    def write_metrics(self, step: int, split: str, row: dict[str, Any]) -> None:
        """Append one line; what is not finite becomes null."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"step": step, "split": split, **finite(row)}) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows but what no training has written, such as one that a crash cut short."""
        return read_rows(self.metrics)

    def has_ended(self) -> bool:
        """Whether its training has come to its end, where the test split is judged, and has not been given more since."""
        rows = self.read_metrics()
        return any(
            row["split"] == "test" and row["step"] == max(each["step"] for each in rows)
            for row in rows
        )

    def save_evaluation(self, checkpoint: dict[str, Any], figures: dict[str, Any]) -> None:
        """Keep what an evaluation of these weights has found, for whoever loads them again."""
        atomic_write(
            self.evaluation, json.dumps({"weights": weights_hash(checkpoint), **figures}) + "\n"
        )

    def load_evaluation(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What `keep_evaluation` was given of these weights, {} where it was not."""
        try:
            cached_artifact = (
                json.loads(self.evaluation.read_text()) if self.evaluation.is_file() else {}
            )
        except (OSError, ValueError, RecursionError):
            return {}
        sound = isinstance(cached_artifact, dict) and is_row(
            cached_artifact | {"step": checkpoint["step"], "split": "test"}
        )
        return (
            cached_artifact
            if sound and cached_artifact.pop("weights", None) == weights_hash(checkpoint)
            else {}
        )

    def environment(self) -> str:
        """What it was trained on, as its log has it."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []
        return next(
            (
                line.partition("environment: ")[2]
                for line in reversed(lines)
                if "environment: " in line
            ),
            "",
        )

    def truncate_metrics(self, step: int) -> None:
        """Drop the metrics later than `step`, which a resumed run writes again."""
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        atomic_write(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


class NoRun(Run):
    """Of a process that leaves the files to another one."""

    def save(self, state: dict[str, Any], *, best: bool = False, keep: bool = False) -> None:
        pass

    def truncate_metrics(self, step: int) -> None:
        pass


def atomic_write(path: Path, text: str) -> None:
    """So that a crash leaves the old file whole."""
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(text)
    aside.replace(path)


def validation_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows by which a training was steered: of the validation split, or of the test split in runs that had no other."""
    split = "validation" if any(row["split"] == "validation" for row in rows) else "test"
    return [row for row in rows if row["split"] == split]


def best_metric(rows: list[dict[str, Any]]) -> MetricValue | None:
    """Of a run that has ended what was measured on the test split; before that, the best on the validation split."""
    for metric in COMPARED:
        steered = [
            (row["step"], found)
            for row in validation_rows(rows)
            if (found := MetricValue.from_row(row, metric))
        ]
        if steered:
            last = [row for row in rows if row["split"] == "test" and row["step"] == steered[-1][0]]
            ended = [found for row in last if (found := MetricValue.from_row(row, metric))]
            return (
                ended[-1]
                if ended
                else min(
                    (found for _, found in steered), key=lambda found: metric.cost(found.value)
                )
            )
    return None


def cached_artifact(
    run: Run,
    checkpoint: dict[str, Any],
    kind: str,
    settings: object,
    find: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """What `find` finds of these weights under these `settings`: numbers and tensors, in a file of the run's folder from then on.

    Those of this `kind` that were found of other weights make room for it.
    """
    import torch  # here, because listing runs must not wait for it

    weights, how = (
        weights_hash(checkpoint),
        hashlib.blake2s(repr(settings).encode(), digest_size=4).hexdigest(),
    )
    path = run.folder / f"{kind}_{weights}_{how}.pt"
    with suppress(
        Exception
    ):  # none yet, or one that is damaged, over which the unpickler may stumble in any way
        return torch.load(path, weights_only=True)
    found, aside = find(), path.with_name(f"{path.name}.part")
    with suppress(
        OSError, RuntimeError
    ):  # a folder that is not ours to write to, or a full disk, which torch.save reports as the latter
        try:
            torch.save(found, aside)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        for older in run.folder.iterdir():
            if (
                re.fullmatch(rf"{kind}_[0-9a-f]{{16}}_[0-9a-f]{{8}}\.pt", older.name)
                and weights not in older.name
            ):
                older.unlink()
    return found
