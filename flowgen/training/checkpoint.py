"""What older runs wrote otherwise, put into today's words when they are read."""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowgen.utils.errors import UserError
from flowgen.utils.metrics import COMPARED

FORMAT = 1  # of the checkpoints that are written; 1 starts with version 0.2.0
MOST_BYTES = 2**20  # of a configuration, which reading takes seconds of
OF_TRAINING = ("loss", "lr", "grad_norm", "images_per_second", "seconds", "memory_gib", "bits")
OF_IMAGES = ("images", "log_z", "log_z_error")
FIGURES = tuple(metric.name + ending for metric in COMPARED for ending in ("", "_error"))
NUMBERS = {*OF_TRAINING, *OF_IMAGES, *FIGURES}  # that others compute with
MAX_ABS_VALUE = 1e100  # beyond which no axis can be drawn
log = logging.getLogger("flowgen")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every row that a training could have written; the others, such as one that a crash cut short, are counted in a warning."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = [row for line in lines if (row := _parse_row(line)) is not None]
    if len(rows) < len(lines):
        log.warning(
            "%s: %d of %d lines were cut short or are no rows of a training, and are left out",
            path,
            len(lines) - len(rows),
            len(lines),
        )
    return rows


def _parse_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and is_row(row) else None


def is_row(row: dict[str, Any]) -> bool:
    """Whether a training could have written it."""
    step, split = row.get("step"), row.get("split")
    scalars = all(
        value is None or isinstance(value, bool | str) or is_number(value) for value in row.values()
    )
    numbers = all(
        value is None or is_number(value) for name, value in row.items() if name in NUMBERS
    )
    return (
        type(step) is int and 0 <= step < 2**53 and isinstance(split, str) and scalars and numbers
    )


def is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < MAX_ABS_VALUE  # type: ignore[arg-type]


KEYS = {"config", "step", "images_seen", "model", "ema", "optimizer", "progress"}
COUNTERS = {"failed", "skipped", "rewinds", "failed_at", "rewound_to", "lr_scale"}  # of failures


def write_checkpoint(state: dict[str, Any], path: Path, others: Iterable[Path] = ()) -> None:
    """Write aside, flush, rename: to each of `others` first and to `path` last, so that `path` never speaks of what is not there.

    Raises FlowgenError where the disk does not take it; what stood under these names stays.
    """
    import torch  # here, so that listing runs need not wait for it

    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(
            missing_ok=True
        )  # where a kill left it, it may be one of `others` by a second name
        with open(aside, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        for other in others:
            _second_name(aside, other)
        aside.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        aside.unlink(missing_ok=True)
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else "the disk is full or not writable"
        )
        cure = f"make room, then go on from the last good checkpoint with `flowgen resume {path.parent.parent}`"
        raise UserError(f"could not save {path} ({reason}): {cure}") from error


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
        raise UserError(f"{path} does not exist: `flowgen runs` lists the runs")
    try:
        if not path.is_file():
            raise OSError("a pipe would be waited for")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever the unpickler stumbles over
        raise UserError(
            f"{path} is cut short or no checkpoint of flowgen: name another run or checkpoint"
        ) from error
    if (
        not isinstance(state, dict)
        or not state.keys() >= KEYS
        or not isinstance(state["config"], dict)
    ):
        raise UserError(f"{path} is no checkpoint of flowgen: name another run or checkpoint")
    return checked(state, path)


def checked(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Validate a checkpoint.

    Raises:
        UserError: for another format, and for values that no training writes.
    """
    version = state.get("format")
    if version is None or (type(version) is int and version > FORMAT):
        age = "an older" if version is None else "a later"
        raise UserError(
            f"{path} was written by {age} version of flowgen, which this one cannot read"
        )
    try:
        _check_plain(state["config"])
        sound = version == FORMAT and type(version) is int and _is_sound(state)
    except (AttributeError, KeyError, RecursionError, RuntimeError, TypeError, ValueError):
        sound = False
    if not sound:
        raise UserError(
            f"{path} holds values that no training writes: name another run or checkpoint"
        )
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
        return isinstance(value, dict) and all(
            isinstance(key, str) and is_tensor(each) for key, each in value.items()
        )

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**63

    def of_numbers(value: Any, names: set[str]) -> bool:
        return (
            isinstance(value, dict)
            and value.keys() <= names
            and all(type(each) in (int, float) for each in value.values())
        )

    config, metrics = state["config"], state["progress"]
    return (
        all(isinstance(config.get(section), dict) for section in ("model", "data", "trainer"))
        and isinstance(config.get("evaluation", {}), dict)
        and all(isinstance(config[key].get("_target_", ""), str) for key in ("model", "data"))
        and is_count(config.get("seed"))
        and is_number(config["trainer"]["sample_temperature"])
        and is_count(state["step"])
        and is_count(state["images_seen"])
        and of_tensors(state["model"])
        and (state["ema"] is None or of_tensors(state["ema"]))
        and isinstance(averages := state.get("emas", []), list)
        and all(of_tensors(each) for each in averages)
        and isinstance(state["optimizer"], dict)
        and isinstance(state.get("metric", ""), str)
        and of_numbers(metrics, {"best", "seconds", "evals_since_best", "best_ema"})
        and is_count(metrics.get("evals_since_best", 0))
        and is_count(metrics.get("best_ema", 0))
        and metrics.get("best_ema", 0) < (len(averages) or 1)
        and not math.isnan(metrics["best"])
        and 0 <= metrics["seconds"] < math.inf
        and of_numbers(state["nan_recovery"], COUNTERS)
        and is_row(state.get("metrics", {}) | {"step": state["step"], "split": "test"})
    )


def weights_hash(checkpoint: dict[str, Any]) -> str:
    """A short name of the weights of a checkpoint, the same for the same weights alone."""
    import torch

    found = hashlib.sha256()
    for name, value in sorted(eval_weights(checkpoint).items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def eval_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The averaged weights of a checkpoint, or, where there are none, those that were trained."""
    if checkpoint["ema"] is None:
        return checkpoint["model"]
    return {
        name.removeprefix("module."): value
        for name, value in checkpoint["ema"].items()
        if name.startswith("module.")
    }


SUFFIX = ".safetensors"
ZOO = Path(__file__).parents[1] / "zoo"  # the models that the package brings


def zoo() -> list[str]:
    """What `--run` can name without any training: zoo/glow_mnist and its like."""
    return sorted(f"zoo/{path.stem}" for path in ZOO.glob(f"*{SUFFIX}"))


def zoo_file(name: str) -> Path:
    """Raises FlowgenError where the zoo has no such model."""
    if name not in zoo():
        raise UserError(f"{name} is not in the zoo: choose one of {', '.join(zoo())}")
    return ZOO / f"{name.removeprefix('zoo/')}{SUFFIX}"


def export_safetensors(
    checkpoint: dict[str, Any],
    figures: dict[str, Any],
    command: str,
    path: Path,
    half: bool = False,
) -> None:
    """The averaged weights, where there are any, and what says where they come from; nothing of this machine's folders.

    `half` stores convolutions in half precision, to be judged as they are read again.
    """
    import torch
    from safetensors.torch import save_file

    data = {
        key: None if key == "root" else value for key, value in checkpoint["config"]["data"].items()
    }
    about = {
        "format": FORMAT,
        "config": checkpoint["config"] | {"output_dir": None, "init_from": None, "data": data},
        "step": checkpoint["step"],
        "images_seen": checkpoint["images_seen"],
        "metrics": {key: value for key, value in figures.items() if key != "run"},
        "command": command,
    }
    weights = {
        name: value.to(torch.float16 if half and value.dim() == 4 else value.dtype)
        .contiguous()
        .clone()
        for name, value in eval_weights(checkpoint).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, metadata={"flowgen": json.dumps(about)})


def read_safetensors(path: Path) -> dict[str, Any]:
    """A checkpoint to use, though none to go on from: it holds no optimiser. Raises FlowgenError for what is none; no code can run."""
    return _read(path, weights=True)


def read_portable_metadata(path: Path) -> dict[str, Any]:
    """Its config, step, images_seen, figures and command, without its weights. Raises FlowgenError for what is none."""
    return _read(path, weights=False)


def _read(path: Path, weights: bool) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt" if weights else "np") as file:  # "pt" imports torch at once
            about = json.loads((file.metadata() or {})["flowgen"])
            json.dumps(
                about, ensure_ascii=False
            ).encode()  # half a character could be neither shown nor passed on
            tensors = {name: file.get_tensor(name) for name in file.keys()} if weights else {}  # noqa: SIM118, it is no dict
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: `flowgen runs` lists the runs") from error
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is cut short or no model of flowgen: name another run or file"
        ) from error
    known = {"config": dict, "step": int, "images_seen": int, "metrics": dict, "command": str}
    if not isinstance(about, dict) or any(
        not isinstance(about.get(key), kind) for key, kind in known.items()
    ):
        raise UserError(f"{path} is no model of flowgen: name another run or file")
    untold = {"optimizer": {}, "progress": {"best": 0.0, "seconds": 0.0}, "nan_recovery": {}}
    return checked(about | untold | {"model": tensors, "ema": None}, path)
