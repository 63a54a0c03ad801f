"""Likelihood-based models of images: floor 2."""

from flowgen.models.abilities import Ability, Classifies, Completes, Completion, DrawsTokens, RunsChains
from flowgen.models.base import Evaluation, GenerativeModel
from flowgen.models.flows import IAF, MAF, NICE, Flow, FlowMatching, Glow, Jet, PlanarFlow, RealNVP, SylvesterFlow, TarFlow
from flowgen.models.linear import Known, Linear
from flowgen.models.rbm import RBM

__all__ = [
    "IAF",
    "MAF",
    "NICE",
    "RBM",
    "Ability",
    "Classifies",
    "Completes",
    "Completion",
    "DrawsTokens",
    "Evaluation",
    "Flow",
    "FlowMatching",
    "GenerativeModel",
    "Glow",
    "Jet",
    "Known",
    "Linear",
    "PlanarFlow",
    "RealNVP",
    "RunsChains",
    "SylvesterFlow",
    "TarFlow",
]
