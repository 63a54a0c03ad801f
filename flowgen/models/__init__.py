"""Likelihood-based models of images: normalizing flows and restricted Boltzmann machines.

Names are imported on first use, so that one model does not import all others.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "Capability": "base",
    "ClassConditional": "base",
    "EvalConfig": "base",
    "GenerativeModel": "base",
    "InpaintingResult": "base",
    "LinearMeasurement": "base",
    "SupportsInpainting": "base",
    "SupportsMCMC": "base",
    "SupportsTokenSampling": "base",
    "Flow": "flows.flow",
    "FlowMatching": "flows.flow_matching",
    "Glow": "flows.glow",
    "Jet": "flows.jet",
    "IAF": "flows.maf",
    "MAF": "flows.maf",
    "NICE": "flows.nice",
    "PlanarFlow": "flows.planar",
    "SylvesterFlow": "flows.planar",
    "RealNVP": "flows.realnvp",
    "TarFlow": "flows.tarflow",
    "RBM": "rbm.rbm",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
