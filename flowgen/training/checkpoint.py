"""Checkpoints: dicts of plain data, written so that a crash leaves the old one whole, read so that no code can run."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowgen.errors import FlowgenError
from flowgen.training.formats import FORMAT, MOST_BYTES, renewed
from flowgen.training.rows import is_number, is_row

KEYS = {"config", "step", "images_seen", "model", "ema", "optimizer", "metrics"}
COUNTERS = {"failed", "skipped", "rewinds", "failed_at", "rewound_to", "lr_scale"}  # of failures


def write_checkpoint(state: dict[str, Any], path: Path, others: Iterable[Path] = ()) -> None:
    """Write aside, flush, rename: to each of `others` first and to `path` last, so that `path` never speaks of what is not there.

    Raises FlowgenError where the disk does not take it; what stood under these names stays.
    """
    import torch  # here, so that listing runs need not wait for it

    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)  # where a kill left it, it may be one of `others` by a second name
        with open(aside, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        for other in others:
            _second_name(aside, other)
        aside.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        aside.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "the disk is full or not writable"
        cure = f"make room, then go on from the last good checkpoint with `flowgen resume {path.parent.parent}`"
        raise FlowgenError(f"could not save {path} ({reason}): {cure}") from error


def _second_name(path: Path, other: Path) -> None:
    aside = other.with_name(other.name + ".part")
    aside.unlink(missing_ok=True)
    try:
        os.link(path, aside)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, aside)
    aside.replace(other)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises FlowgenError for what is none, or is cut short; pickled code never runs."""
    import torch

    if not path.exists():
        raise FlowgenError(f"{path} does not exist: `flowgen runs` lists the runs")
    try:
        if not path.is_file():
            raise OSError("a pipe would be waited for")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever the unpickler stumbles over
        raise FlowgenError(f"{path} is cut short or no checkpoint of flowgen: name another run or checkpoint") from error
    if not isinstance(state, dict) or not state.keys() >= KEYS or not isinstance(state["config"], dict):
        raise FlowgenError(f"{path} is no checkpoint of flowgen: name another run or checkpoint")
    return checked(state, path)


def checked(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """A checkpoint in today's words. Raises FlowgenError where it is of a later format, or holds what no training writes."""
    version = state.get("format", FORMAT)
    if type(version) is int and version > FORMAT:
        raise FlowgenError(f"{path} is of a later flowgen: update with `pip install -U flowgen`")
    try:
        _check_plain(state["config"])
        state = renewed(state)
        sound = type(version) is int and version >= 0 and _is_sound(state)
    except (AttributeError, KeyError, RecursionError, RuntimeError, TypeError, ValueError):
        sound = False
    if not sound:
        raise FlowgenError(f"{path} holds values that no training writes: name another run or checkpoint")
    return state


def _check_plain(config: Any) -> None:
    """Raise ValueError or TypeError where that is no plain data, holds half a character, which could not be written, or is too long.

    What a file says once it may repeat without end: only as much is looked at as a configuration may have.
    """
    length = 0
    for piece in json.JSONEncoder(ensure_ascii=False).iterencode(config):
        length += len(piece.encode())
        if length > MOST_BYTES:
            raise ValueError("too long")


def _is_sound(state: dict[str, Any]) -> bool:
    """Whether every part is of the kind that a training writes, or, of its figures, an evaluation."""

    def is_tensor(value: Any) -> bool:
        from torch import Tensor  # here, so that models without their weights are listed without it

        return isinstance(value, Tensor)

    def of_tensors(value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(key, str) and is_tensor(each) for key, each in value.items())

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**63

    def of_numbers(value: Any, names: set[str]) -> bool:
        return isinstance(value, dict) and value.keys() <= names and all(type(each) in (int, float) for each in value.values())

    config, metrics = state["config"], state["metrics"]
    return (
        all(isinstance(config.get(section), dict) for section in ("model", "data", "trainer"))
        and is_count(config.get("seed"))
        and is_number(config["trainer"]["sample_temperature"])
        and is_count(state["step"])
        and is_count(state["images_seen"])
        and of_tensors(state["model"])
        and (state["ema"] is None or of_tensors(state["ema"]))
        and isinstance(averages := state.get("averages", []), list)
        and all(of_tensors(each) for each in averages)
        and isinstance(state["optimizer"], dict)
        and isinstance(state.get("metric", ""), str)
        and of_numbers(metrics, {"best", "seconds", "without_gain", "chosen"})
        and is_count(metrics.get("without_gain", 0))
        and is_count(metrics.get("chosen", 0))
        and metrics.get("chosen", 0) < (len(averages) or 1)
        and not math.isnan(metrics["best"])
        and 0 <= metrics["seconds"] < math.inf
        and of_numbers(state["rescue"], COUNTERS)
        and is_row(state.get("figures", {}) | {"step": state["step"], "split": "test"})
    )


def digest_of(checkpoint: dict[str, Any]) -> str:
    """A short name of the weights of a checkpoint, the same for the same weights alone."""
    import torch

    found = hashlib.sha256()
    for name, value in sorted(weights_of(checkpoint).items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def weights_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The averaged weights of a checkpoint, or, where there are none, those that were trained."""
    if checkpoint["ema"] is None:
        return checkpoint["model"]
    return {name.removeprefix("module."): value for name, value in checkpoint["ema"].items() if name.startswith("module.")}
