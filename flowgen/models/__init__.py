"""Likelihood-based models of images: floor 2."""

from flowgen.models.base import GenerativeModel
from flowgen.models.flow import Flow
from flowgen.models.glow import Glow
from flowgen.models.rbm import RBM

__all__ = ["RBM", "Flow", "GenerativeModel", "Glow"]
