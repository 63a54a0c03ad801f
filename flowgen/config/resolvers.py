"""What `conf/` asks for while it is composed."""

from hashlib import blake2s
from pathlib import Path
from typing import Any

DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, and WSL's to either

UNNAMED = ("out", "resume", "data.root", "trainer.device")  # in the names of a sweep's folders: they say where, not what
LONGEST = 200  # bytes of a folder's name; file systems take 255


def trainer_here() -> str:
    """What trainer=auto is on this machine: `gpu` where torch can use one, else `cpu`."""
    if not any(Path(driver).exists() for driver in DRIVERS):
        return "cpu"  # without torch, which takes seconds to import, and for which help need not wait
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def choice(group: str, *, _root_: Any) -> str:
    """What was chosen for a group: `glow` for model=glow."""
    from hydra.core.hydra_config import HydraConfig

    composed = _root_.hydra if "hydra" in _root_ else HydraConfig.get()  # a sweep has but the first, a job but the second
    return str(composed.runtime.choices[group])


def folder_name(swept: list[str], *, _root_: Any) -> str:
    """One folder for each run of a sweep, side by side, by what tells them apart: `experiment=a-b,seed=1`.

    Where that is too long, by what is swept over and a hash of all.
    """
    pairs = sorted(str(word).partition("=")[::2] for word in _root_.hydra.overrides.task)
    named = [(key, value) for key, value in pairs if key in swept or (key not in UNNAMED and value != "null")]
    full, short = (
        ",".join(f"{key}={value}".replace("/", "-").replace("'", "") for key, value in chosen)
        for chosen in (named, [pair for pair in named if pair[0] in swept])
    )
    digest = blake2s(full.encode(), digest_size=4).hexdigest()
    return full if len(full.encode()) <= LONGEST else f"{short[: LONGEST // 2]},{digest}"


def register_resolvers() -> None:
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("flowgen.trainer", trainer_here, replace=True)
    OmegaConf.register_new_resolver("flowgen.choice", choice, replace=True)
    OmegaConf.register_new_resolver("flowgen.folder", folder_name, replace=True)
