"""Likelihood-based models of images: floor 2."""

from flowgen.models.base import GenerativeModel
from flowgen.models.flow import Flow
from flowgen.models.glow import Glow
from flowgen.models.maf import IAF, MAF
from flowgen.models.nice import NICE
from flowgen.models.rbm import RBM
from flowgen.models.realnvp import RealNVP

__all__ = ["IAF", "MAF", "NICE", "RBM", "Flow", "GenerativeModel", "Glow", "RealNVP"]
