"""Guidance: what is likely given a class, and unlikely without one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from flowgen.bijections.transforms.affine import Affine
from flowgen.bijections.transforms.base import Transform


class Guided(Transform):
    """The affine maps of two Gaussians N(mean, deviation^2) as that of one, proportional to N_c^(1 + w) / N_u^w.

    The first half of the batch has the parameters given a class, c, the second half those without, u; both halves are mapped alike. With
    s = min((deviation_c / deviation_u)^2, 1), which keeps it a Gaussian, and n = 1 + w - w s, its deviation is deviation_c / sqrt(n) and
    its mean ((1 + w) mean_c - w s mean_u) / n. STARFlow (2506.06276), section 3.4.
    """

    def __init__(self, affine: Affine, weight: float):
        self.affine, self.weight, self.count = affine, weight, affine.count
        self.plain = Affine("plain")

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self.plain.forward(x, self._guide(parameters))

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self.plain.inverse(y, self._guide(parameters))

    def _guide(self, parameters: Tensor) -> Tensor:
        raw, shift = parameters.chunk(2, dim=1)
        log_scale = self.affine.log_scale(raw)  # of y = exp(l) x + t; the Gaussian of x has deviation exp(-l) and mean -t exp(-l)
        of_class, of_none = log_scale.chunk(2)
        mean, mean_of_none = (-shift * (-log_scale).exp()).chunk(2)
        weight, share = self.weight, (2 * (of_none - of_class)).exp().clamp(max=1)
        precision = 1 + weight - weight * share
        mean = ((1 + weight) * mean - weight * share * mean_of_none) / precision
        log_scale = of_class + precision.log() / 2
        return torch.cat((log_scale, -mean * log_scale.exp()), 1).repeat(2, *[1] * (parameters.dim() - 1))


class HasTransform(Protocol):
    transform: Transform


@contextmanager
def guided(holders: Sequence[HasTransform], weight: float) -> Iterator[None]:
    """While the context lasts, the affine transforms of `holders` are `Guided`."""
    before = [holder.transform for holder in holders]
    try:
        for holder, transform in zip(holders, before, strict=True):
            assert isinstance(transform, Affine)
            holder.transform = Guided(transform, weight)
        yield
    finally:
        for holder, transform in zip(holders, before, strict=True):
            holder.transform = transform
