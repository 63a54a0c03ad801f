"""Invertible maps with tractable log-determinants. They depend on torch alone.

Example:
    >>> import torch
    >>> from flowgen.bijections import ActNorm, Affine, Chain, ConvNetwork, Coupling
    >>> _ = torch.manual_seed(0)
    >>> flow = Chain(ActNorm(4), Coupling(ConvNetwork(2, 16, 4), Affine()))
    >>> x = torch.randn(5, 4, 8, 8)
    >>> z, log_det = flow(x)
    >>> torch.allclose(flow.inverse(z)[0], x, atol=1e-5)
    True
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "autoregressive": ("MADE", "Autoregressive", "TokenAutoregressive", "TokenHead"),
    "base": ("Bijection", "Chain", "Flip", "Invert", "set_activation_memory"),
    "batchnorm": ("BatchNorm", "update_bn"),
    "continuous": ("CNF", "VelocityField"),
    "coupling": ("Coupling", "MaskedCoupling", "channelwise", "checkerboard", "stripes"),
    "elementwise": (
        "EmpiricalCDF",
        "LogisticToNormal",
        "Logit",
        "MarginalGaussianization",
        "Standardize",
    ),
    "linear": ("ActNorm", "FusedAffine", "InvertibleConv1x1", "InvertibleConv1x1LU"),
    "networks": (
        "CausalTransformer",
        "Conditioner",
        "ConvNetwork",
        "DenseNetwork",
        "GatedNetwork",
        "RandomSource",
        "RealNVPNetwork",
        "ResNetwork",
        "Transformer",
        "ZeroConv2d",
    ),
    "reshape": ("FactorOut", "Flatten", "Permute", "Roll", "Squeeze"),
    "residual": ("Planar", "Sylvester"),
    "univariate": ("Additive", "Affine", "MixtureOfLogistics", "Scale", "Spline", "Transform"),
}
_EXPORTS = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
