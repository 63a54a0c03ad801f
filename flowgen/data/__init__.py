"""Data sets: images with fixed splits, preprocessing and batches."""

import importlib
from typing import Any

_MODULES = {
    "CIFAR10": "cifar10",
    "DownsampledImageNet": "imagenet",
    "ImageDataset": "dataset",
    "ImageFolder": "image_folder",
    "ImageStream": "preprocess",
    "MNIST": "mnist",
    "MNISTSample": "mnist",
    "SVHN": "svhn",
    "Split": "dataset",
    "Toy2D": "toy2d",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import the module of a class when the class is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
