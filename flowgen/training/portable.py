"""Trained models to pass on: one safetensors file with the weights, the configuration, and the figures of its evaluation."""

import json
from pathlib import Path
from typing import Any

from flowgen.errors import FlowgenError
from flowgen.training.checkpoint import checked, weights_of
from flowgen.training.formats import FORMAT

SUFFIX = ".safetensors"
ZOO = Path(__file__).parents[1] / "zoo"  # the models that the package brings


def zoo() -> list[str]:
    """What `--run` can name without any training: zoo/glow_mnist and its like."""
    return sorted(f"zoo/{path.stem}" for path in ZOO.glob(f"*{SUFFIX}"))


def zoo_file(name: str) -> Path:
    """Raises FlowgenError where the zoo has no such model."""
    if name not in zoo():
        raise FlowgenError(f"{name} is not in the zoo: choose one of {', '.join(zoo())}")
    return ZOO / f"{name.removeprefix('zoo/')}{SUFFIX}"


def write_portable(checkpoint: dict[str, Any], figures: dict[str, Any], command: str, path: Path, half: bool = False) -> None:
    """The averaged weights, where there are any, and what says where they come from; nothing of this machine's folders.

    `half` stores convolutions in half precision, to be judged as they are read again.
    """
    import torch
    from safetensors.torch import save_file

    data = {key: None if key == "root" else value for key, value in checkpoint["config"]["data"].items()}
    about = {
        "format": FORMAT,
        "config": checkpoint["config"] | {"out": None, "init": None, "data": data},
        "step": checkpoint["step"],
        "images_seen": checkpoint["images_seen"],
        "figures": {key: value for key, value in figures.items() if key != "run"},
        "command": command,
    }
    weights = {
        name: value.to(torch.float16 if half and value.dim() == 4 else value.dtype).contiguous().clone()
        for name, value in weights_of(checkpoint).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, metadata={"flowgen": json.dumps(about)})


def read_portable(path: Path) -> dict[str, Any]:
    """A checkpoint to use, though none to go on from: it holds no optimiser. Raises FlowgenError for what is none; no code can run."""
    return _read(path, weights=True)


def about_portable(path: Path) -> dict[str, Any]:
    """Its config, step, images_seen, figures and command, without its weights. Raises FlowgenError for what is none."""
    return _read(path, weights=False)


def _read(path: Path, weights: bool) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt" if weights else "np") as file:  # "pt" imports torch at once
            about = json.loads((file.metadata() or {})["flowgen"])
            json.dumps(about, ensure_ascii=False).encode()  # half a character could be neither shown nor passed on
            tensors = {name: file.get_tensor(name) for name in file.keys()} if weights else {}  # noqa: SIM118, it is no dict
    except FileNotFoundError as error:
        raise FlowgenError(f"{path} does not exist: `flowgen runs` lists the runs") from error
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise FlowgenError(f"{path} is cut short or no model of flowgen: name another run or file") from error
    known = {"config": dict, "step": int, "images_seen": int, "figures": dict, "command": str}
    if not isinstance(about, dict) or any(not isinstance(about.get(key), kind) for key, kind in known.items()):
        raise FlowgenError(f"{path} is no model of flowgen: name another run or file")
    untold = {"optimizer": {}, "metrics": {"best": 0.0, "seconds": 0.0}, "rescue": {}}
    return checked(about | untold | {"model": tensors, "ema": None}, path)
