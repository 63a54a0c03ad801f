"""Restricted Boltzmann machines: model, samplers, negative phases and estimates of log Z."""

from importlib import import_module
from typing import Any

_MODULES = {
    "RBM": "rbm",
    "CD": "negative_phase",
    "PCD": "negative_phase",
    "MeanField": "negative_phase",
    "NegativePhase": "negative_phase",
    "Tempering": "negative_phase",
}
__all__ = ["CD", "PCD", "RBM", "MeanField", "NegativePhase", "Tempering"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
