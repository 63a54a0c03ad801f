"""Invertible maps of single numbers, whose parameters a network gives: what a coupling or an autoregressive flow applies."""

from collections.abc import Callable

from flowgen.bijections.transforms.affine import Additive, Affine, Multiplicative
from flowgen.bijections.transforms.base import LOG_SCALES, Transform
from flowgen.bijections.transforms.guidance import Guided, guided
from flowgen.bijections.transforms.mixture import MixtureOfLogistics
from flowgen.bijections.transforms.spline import Spline

__all__ = [
    "LOG_SCALES",
    "TRANSFORMS",
    "Additive",
    "Affine",
    "Guided",
    "MixtureOfLogistics",
    "Multiplicative",
    "Spline",
    "Transform",
    "guided",
]

TRANSFORMS: dict[str, Callable[[str], Transform]] = {  # by the name that a configuration gives them, with that of the scale
    "additive": lambda scale: Additive(),
    "multiplicative": Multiplicative,
    "affine": Affine,
    "spline": lambda scale: Spline(),
    "mixture": lambda scale: MixtureOfLogistics(scale=scale),
}
