"""Invertible maps with tractable log-dets. They need torch only, and `CNF` torchdiffeq.

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

_MODULES = {  # module of each exported name
    "ActNorm": "linear",
    "Additive": "univariate",
    "Affine": "univariate",
    "Amortized": "amortized",
    "Autoregressive": "autoregressive",
    "BatchNorm": "linear",
    "Bijection": "base",
    "CNF": "continuous",
    "CausalTransformer": "networks",
    "Chain": "base",
    "Conditioner": "networks",
    "ConvNetwork": "networks",
    "Coupling": "coupling",
    "DenseNetwork": "networks",
    "EmpiricalCDF": "elementwise",
    "FactorOut": "reshape",
    "Flatten": "reshape",
    "Flip": "base",
    "FusedAffine": "linear",
    "GatedNetwork": "networks",
    "Invert": "base",
    "InvertibleConv1x1": "linear",
    "InvertibleConv1x1LU": "linear",
    "LogisticToNormal": "elementwise",
    "Logit": "elementwise",
    "MADE": "autoregressive",
    "MarginalGaussianization": "elementwise",
    "MaskedCoupling": "coupling",
    "MixtureOfLogistics": "univariate",
    "Permute": "reshape",
    "Planar": "residual",
    "RandomSource": "networks",
    "RealNVPNetwork": "networks",
    "ResNetwork": "networks",
    "Roll": "reshape",
    "Scale": "univariate",
    "Spline": "univariate",
    "Squeeze": "reshape",
    "Standardize": "elementwise",
    "Sylvester": "residual",
    "TokenAutoregressive": "autoregressive",
    "TokenHead": "autoregressive",
    "Transform": "univariate",
    "Transformer": "networks",
    "VelocityField": "continuous",
    "ZeroConv2d": "networks",
    "channelwise": "coupling",
    "checkerboard": "coupling",
    "set_activation_memory": "base",
    "stripes": "coupling",
    "update_bn": "linear",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
