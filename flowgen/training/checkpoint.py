"""Checkpoint files: write, read, export to safetensors, and the zoo of trained models.

A checkpoint is a file of torch.save with the keys of `untrusted.REQUIRED`, read with
`weights_only=True`, so that pickled code never runs. torch is imported on first use: listing runs
does not need it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowgen.training.untrusted import FORMAT, validate_checkpoint
from flowgen.utils.errors import UserError, check
from flowgen.utils.files import atomic_write

EXPORT_SUFFIX = ".safetensors"
ZOO = Path(__file__).parents[1] / "zoo"  # trained models in the package
NOT_EXPORTED = {  # parts of a checkpoint that an export lacks
    "optimizer": {},
    "progress": {"best": 0.0, "seconds": 0.0},
    "nan_recovery": {},
}


def write_checkpoint(state: dict[str, Any], path: Path, links: Iterable[Path] = ()) -> None:
    """Write a checkpoint under several names.

    Every file is complete or keeps its previous content. `path` comes last:
    it is only updated once the others exist.

    Args:
        state: Content, without its format.
        path: Checkpoint file.
        links: Further names of the same file: hard links, or copies if the file system has none.

    Raises:
        UserError: If the disk is full or not writable.
    """
    import torch

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            with open(temporary, "wb") as file:
                torch.save({"format": FORMAT, **state}, file)
            for link in links:
                _link_or_copy(temporary, link)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or "the disk is full or not writable"
        raise UserError(
            f"could not save {path} ({reason}): free some space, then continue from the last "
            f"checkpoint with `flowgen resume {path.parent.parent}`"
        ) from error


def _link_or_copy(source: Path, target: Path) -> None:
    with atomic_write(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU and validate it.

    Raises:
        UserError: If the file is damaged, of another format, or not a checkpoint.
    """
    import torch

    check(  # reading a pipe would block
        path.is_file(),
        f"{path} does not exist or is not a file: `flowgen runs` lists the runs",
    )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises anything on a damaged file
        raise UserError(
            f"{path} is damaged or not a checkpoint of flowgen: choose another run or checkpoint"
        ) from error
    check(
        isinstance(state, dict) and isinstance(state.get("config"), dict),
        f"{path} is not a checkpoint of flowgen: choose another run or checkpoint",
    )
    return validate_checkpoint(state, path)


def eval_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the averaged weights of a checkpoint, or the trained ones if it has no average."""
    if checkpoint["ema"] is None:
        return checkpoint["model"]
    return {
        name.removeprefix("module."): value
        for name, value in checkpoint["ema"].items()
        if name.startswith("module.")
    }


def weights_hash(checkpoint: dict[str, Any]) -> str:
    """Return 16 hexadecimal digits that identify the evaluated weights of a checkpoint."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(eval_weights(checkpoint).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def zoo() -> list[str]:
    """Return the names of the included models, such as zoo/glow_mnist."""
    return sorted(f"zoo/{path.stem}" for path in ZOO.glob(f"*{EXPORT_SUFFIX}"))


def zoo_file(name: str) -> Path:
    """Return the file of an included model.

    Raises:
        UserError: If the zoo has no such model.
    """
    check(name in zoo(), f"{name} is not in the zoo: choose one of {', '.join(zoo())}")
    return ZOO / f"{name.removeprefix('zoo/')}{EXPORT_SUFFIX}"


def export_safetensors(
    checkpoint: dict[str, Any],
    metrics: dict[str, Any],
    command: str,
    path: Path,
    half: bool = False,
) -> None:
    """Write the evaluated weights, their configuration and their metrics to a safetensors file.

    No path of this machine is written.

    Args:
        checkpoint: Checkpoint from `read_checkpoint` or `read_safetensors`.
        metrics: Results of `flowgen evaluate`.
        command: Command that trained the model.
        path: File to write.
        half: Whether to store the weights of layers in half precision.
    """
    from safetensors.torch import save

    config = checkpoint["config"]
    data = {key: None if key == "root" else value for key, value in config["data"].items()}
    metadata = {
        "format": FORMAT,
        "config": config | {"data": data, "output_dir": None, "init_from": None},
        "step": checkpoint["step"],
        "images_seen": checkpoint["images_seen"],
        "metrics": {key: value for key, value in metrics.items() if key != "run"},
        "command": command,
    }
    weights = {
        name: (value.half() if half and _is_layer_weight(name, value) else value)
        .contiguous()
        .clone()
        for name, value in eval_weights(checkpoint).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(weights, metadata={"flowgen": json.dumps(metadata)}))


def _is_layer_weight(name: str, value: Any) -> bool:
    """Return whether this is the matrix or kernel of a layer, which tolerates rounding."""
    return value.dim() > 1 and name.endswith("weight")


def read_safetensors(path: Path, with_weights: bool = True) -> dict[str, Any]:
    """Read an exported model as a checkpoint without optimizer state. No code can run.

    Args:
        path: Safetensors file.
        with_weights: Whether to read the weights, for which torch is imported, or only the
            configuration, steps, metrics and command.

    Raises:
        UserError: If the file is damaged, of another format, or not an export of flowgen.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt" if with_weights else "np") as file:  # "pt" imports torch
            metadata = json.loads((file.metadata() or {})["flowgen"])
            json.dumps(metadata, ensure_ascii=False).encode()  # fails on lone surrogates
            names = file.keys() if with_weights else []
            weights = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: `flowgen runs` lists the runs") from error
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged or not a model of flowgen: choose another run or file"
        ) from error
    check(
        isinstance(metadata, dict)
        and isinstance(metadata.get("command"), str)
        # `validate_checkpoint` refuses the old figures.
        and bool(metadata.keys() & {"metrics", "figures"}),
        f"{path} is not a model of flowgen: choose another run or file",
    )
    return validate_checkpoint(metadata | NOT_EXPORTED | {"model": weights, "ema": None}, path)
