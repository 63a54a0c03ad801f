"""Trained models to pass on: one safetensors file with the weights, the configuration, and the figures of its evaluation."""

import json
from pathlib import Path
from typing import Any

from flowgen.errors import FlowgenError
from flowgen.training.checkpoint import weights_of

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
    config = checkpoint["config"] | {"out": None, "data": data}
    about = {"config": config, "step": checkpoint["step"], "images_seen": checkpoint["images_seen"], "figures": figures, "command": command}
    weights = {
        name: value.to(torch.float16 if half and value.dim() == 4 else value.dtype).contiguous().clone()
        for name, value in weights_of(checkpoint).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, metadata={"flowgen": json.dumps(about)})


def read_portable(path: Path) -> dict[str, Any]:
    """A checkpoint to use, though none to go on from: it holds no optimiser. Raises FlowgenError for what is none; no code can run."""
    about, weights = _read(path, weights=True)
    return about | {"model": weights, "ema": None}


def about_portable(path: Path) -> dict[str, Any]:
    """Its config, step, images_seen, figures and command, without its weights. Raises FlowgenError for what is none."""
    return _read(path, weights=False)[0]


def _read(path: Path, weights: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt" if weights else "np") as file:  # "pt" imports torch at once
            about = json.loads((file.metadata() or {})["flowgen"])
            tensors = {name: file.get_tensor(name) for name in file.keys()} if weights else {}  # noqa: SIM118, it is no dict
    except FileNotFoundError as error:
        raise FlowgenError(f"{path} does not exist: `flowgen runs` lists the runs") from error
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise FlowgenError(f"{path} is cut short or no model of flowgen: name another run or file") from error
    known = {"config": dict, "step": int, "images_seen": int, "figures": dict, "command": str}
    if not isinstance(about, dict) or any(not isinstance(about.get(key), kind) for key, kind in known.items()):
        raise FlowgenError(f"{path} is no model of flowgen: name another run or file")
    return about, tensors
