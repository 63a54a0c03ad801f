"""flowgen: train, evaluate and use likelihood-based image models.

Example:
    >>> import flowgen
    >>> model = flowgen.create_model("glow", image_shape=(1, 8, 8), bits=5, levels=1, width=4)
    >>> model.image_shape, model.bits
    ((1, 8, 8), 5)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowgen.api import (
        create_model,
        evaluate,
        list_datasets,
        list_models,
        load,
        resume,
        score,
        train,
    )
    from flowgen.training.run_dir import Run
    from flowgen.utils.errors import UserError

__version__ = "0.2.0"
__all__ = [
    "Run",
    "UserError",
    "create_model",
    "evaluate",
    "list_datasets",
    "list_models",
    "load",
    "resume",
    "score",
    "train",
]
_MODULES = {"Run": "flowgen.training.run_dir", "UserError": "flowgen.utils.errors"}
_SUBPACKAGES = ("bijections", "coding", "data", "evaluation", "models", "training")


def __getattr__(name: str) -> Any:
    """Import the API and the subpackages on first use, so that `import flowgen` needs no torch."""
    if name in __all__:
        return getattr(importlib.import_module(_MODULES.get(name, "flowgen.api")), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"flowgen.{name}")
    raise AttributeError(f"module 'flowgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
