"""flowgen: likelihood-based image models, trained, judged and used from one command line."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from flowgen.models.base import GenerativeModel

__version__ = "0.1.0"


def load(run: "str | Path", device: str = "cpu") -> "GenerativeModel":
    """The model of a run folder, a checkpoint file or a name under `outputs/`, ready to use.

    It is in evaluation mode, with the averaged (EMA) weights where there are any. Raises `FlowgenError` where `run` is none.
    """
    from flowgen.config.loading import (
        load_model,  # torch takes seconds to import, and `flowgen --help` must not wait for it
    )

    return load_model(run, device)


def __getattr__(name: str) -> object:
    """`flowgen.models` and its like on first use."""
    import importlib

    if name in ("bijections", "data", "models", "training"):
        return importlib.import_module(f"flowgen.{name}")
    raise AttributeError(f"module 'flowgen' has no attribute {name!r}")
