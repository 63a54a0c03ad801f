"""Normalizing flows: recipes of bijections."""

from flowgen.models.flows.flow import Flow
from flowgen.models.flows.glow import Glow
from flowgen.models.flows.maf import IAF, MAF
from flowgen.models.flows.nice import NICE
from flowgen.models.flows.realnvp import RealNVP

__all__ = ["IAF", "MAF", "NICE", "Flow", "Glow", "RealNVP"]
