"""Restricted Boltzmann machines: the machine, its samplers, the negatives of its training, and its likelihood."""

from flowgen.models.rbm.model import METHODS, RBM

__all__ = ["METHODS", "RBM"]
