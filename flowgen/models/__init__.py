"""Likelihood-based models of images: normalizing flows and restricted Boltzmann machines.

Names are imported on first use, so that one model does not import all others.
"""

# ruff: noqa: F401

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowgen.models.base import (
        Capability,
        ClassConditional,
        EvalConfig,
        GenerativeModel,
        InpaintingResult,
        LinearMeasurement,
        SupportsInpainting,
        SupportsMCMC,
        SupportsTokenSampling,
    )
    from flowgen.models.flows.flow import Flow
    from flowgen.models.flows.flow_matching import FlowMatching
    from flowgen.models.flows.glow import Glow
    from flowgen.models.flows.jet import Jet
    from flowgen.models.flows.maf import IAF, MAF
    from flowgen.models.flows.nice import NICE
    from flowgen.models.flows.planar import PlanarFlow, SylvesterFlow
    from flowgen.models.flows.realnvp import RealNVP
    from flowgen.models.flows.tarflow import TarFlow
    from flowgen.models.rbm.rbm import RBM

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
_SUBPACKAGES = ("base", "flows", "rbm")
__all__ = [*_MODULES, *_SUBPACKAGES]


def __getattr__(name: str) -> object:
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
