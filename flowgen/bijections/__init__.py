"""Invertible maps with tractable Jacobians: floor 1, which knows torch and nothing else."""

from flowgen.bijections.base import Bijection, Chain
from flowgen.bijections.coupling import LOG_SCALES, AdditiveCoupling, AffineCoupling, Coupling
from flowgen.bijections.elementwise import Equalize, Gaussianize, Logit, Standardize
from flowgen.bijections.factor_out import FactorOut
from flowgen.bijections.linear import ChannelAffine, Conv1x1, Folded, PLUConv1x1
from flowgen.bijections.networks import ConvNetwork, Network, ResNetwork, ZeroConv2d
from flowgen.bijections.normalize import ActNorm
from flowgen.bijections.reshape import Flatten, Squeeze

__all__ = [
    "LOG_SCALES",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Bijection",
    "Chain",
    "ChannelAffine",
    "Conv1x1",
    "ConvNetwork",
    "Coupling",
    "Equalize",
    "FactorOut",
    "Flatten",
    "Folded",
    "Gaussianize",
    "Logit",
    "Network",
    "PLUConv1x1",
    "ResNetwork",
    "Squeeze",
    "Standardize",
    "ZeroConv2d",
]
