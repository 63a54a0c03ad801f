"""Normalizing flows: recipes of bijections."""

from flowgen.models.flows.flow import Flow
from flowgen.models.flows.flow_matching import FlowMatching
from flowgen.models.flows.glow import Glow
from flowgen.models.flows.jet import Jet
from flowgen.models.flows.maf import IAF, MAF
from flowgen.models.flows.nice import NICE
from flowgen.models.flows.planar import PlanarFlow, SylvesterFlow
from flowgen.models.flows.realnvp import RealNVP
from flowgen.models.flows.tarflow import TarFlow

__all__ = ["IAF", "MAF", "NICE", "Flow", "FlowMatching", "Glow", "Jet", "PlanarFlow", "RealNVP", "SylvesterFlow", "TarFlow"]
