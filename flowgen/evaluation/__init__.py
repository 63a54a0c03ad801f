"""Evaluation of generative models: sample quality, out-of-distribution scores, interpolation."""

from importlib import import_module
from typing import Any

_MODULES = {
    "AUROC": "ood",
    "OODDetector": "ood",
    "auroc": "ood",
    "png_complexity": "ood",
    "Classifier": "sample_quality",
    "PrincipalComponents": "sample_quality",
    "coverage": "sample_quality",
    "fid_metrics": "sample_quality",
    "flow_report": "sample_quality",
    "frechet_distance": "sample_quality",
    "measure_sample_quality": "sample_quality",
    "train_classifier": "sample_quality",
    "interpolate_pairs": "interpolation",
    "lerp": "interpolation",
    "slerp": "interpolation",
    "step_sizes": "interpolation",
    "unevenness": "interpolation",
    "Directions": "latent_directions",
    "compute_moments": "latent_directions",
    "fit_directions": "latent_directions",
    "move_along": "latent_directions",
    "Mean": "stats",
    "mean": "stats",
    "paired_difference": "stats",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
