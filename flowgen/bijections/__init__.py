"""Invertible maps with tractable Jacobians: floor 1, which knows torch and nothing else."""

from flowgen.bijections.autoregressive import MADE, Autoregressive, Inverse, Reverse
from flowgen.bijections.base import Bijection, beside
from flowgen.bijections.chain import Chain, can_be_recomputed, inversion_error, save_memory
from flowgen.bijections.continuous import Continuous, Velocity
from flowgen.bijections.coupling import Coupling, MaskedCoupling, channelwise, checkerboard, stripes
from flowgen.bijections.elementwise import Equalize, Gaussianize, LogisticToNormal, Logit, Standardize
from flowgen.bijections.factor_out import FactorOut
from flowgen.bijections.layers import Network, ZeroConv2d
from flowgen.bijections.linear import ChannelAffine, Conv1x1, Folded, PLUConv1x1
from flowgen.bijections.memory import MEMORY
from flowgen.bijections.networks import ConvNetwork, DenseNetwork, GatedNetwork, RealNVPNetwork, ResNetwork
from flowgen.bijections.normalize import ActNorm, BatchNorm, batch_normalisations, estimate_statistics
from flowgen.bijections.reshape import Flatten, Permute, Roll, Squeeze
from flowgen.bijections.residual import Planar, Sylvester
from flowgen.bijections.tokens import Head, TokenAutoregressive, local_head
from flowgen.bijections.transformers import CausalTransformer, Transformer
from flowgen.bijections.transforms import (
    LOG_SCALES,
    TRANSFORMS,
    Additive,
    Affine,
    Guided,
    MixtureOfLogistics,
    Multiplicative,
    Spline,
    Transform,
    guided,
)

__all__ = [
    "LOG_SCALES",
    "MADE",
    "MEMORY",
    "TRANSFORMS",
    "ActNorm",
    "Additive",
    "Affine",
    "Autoregressive",
    "BatchNorm",
    "Bijection",
    "CausalTransformer",
    "Chain",
    "ChannelAffine",
    "Continuous",
    "Conv1x1",
    "ConvNetwork",
    "Coupling",
    "DenseNetwork",
    "Equalize",
    "FactorOut",
    "Flatten",
    "Folded",
    "GatedNetwork",
    "Gaussianize",
    "Guided",
    "Head",
    "Inverse",
    "LogisticToNormal",
    "Logit",
    "MaskedCoupling",
    "MixtureOfLogistics",
    "Multiplicative",
    "Network",
    "PLUConv1x1",
    "Permute",
    "Planar",
    "RealNVPNetwork",
    "ResNetwork",
    "Reverse",
    "Roll",
    "Spline",
    "Squeeze",
    "Standardize",
    "Sylvester",
    "TokenAutoregressive",
    "Transform",
    "Transformer",
    "Velocity",
    "ZeroConv2d",
    "batch_normalisations",
    "beside",
    "can_be_recomputed",
    "channelwise",
    "checkerboard",
    "estimate_statistics",
    "guided",
    "inversion_error",
    "local_head",
    "save_memory",
    "stripes",
]
