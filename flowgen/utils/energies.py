"""Unnormalized densities exp(-U(x)) in the square [-4, 4] x [-4, 4], and their integrals.

The energies u1 to u4 are those of Rezende and Mohamed, Variational Inference with Normalizing Flows
(1505.05770), table 1. All energies U take points x, (batch, 2), and return (batch,).
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from flowgen.utils.toy2d import TOY2D_SPAN as SPAN

CELLS = 256  # per side: one for each pair of 8-bit pixel values
NODES = 4  # quadrature nodes per side of a cell
MIXTURE_MEANS = ((-1.5, -1.5), (1.5, 1.5), (1.5, -1.5), (-1.5, 1.5))
MIXTURE_WEIGHTS = (0.4, 0.3, 0.2, 0.1)
MIXTURE_STD = 0.4


def density_grid(name: str) -> Tensor:
    """Return exp(-U) at the centers of a grid of the square, (rows, columns), in float64.

    The grid has NODES points for each pixel value in both directions, so 1024 x 1024 points.
    """
    resolution = CELLS * NODES
    centers = 2 * SPAN * (torch.arange(resolution, dtype=torch.double) + 0.5) / resolution - SPAN
    # (x, y) with x varying fastest
    points = torch.cartesian_prod(centers, centers).flip(1)
    return (-ENERGIES[name](points)).exp().view(resolution, resolution)


@cache
def quadrature_log_z(name: str) -> float:
    """Return log Z, where Z is the integral of exp(-U) over the square, by the midpoint rule.

    Example:
        >>> variance = MIXTURE_STD**2
        >>> round(quadrature_log_z("mixture"), 6) == round(math.log(2 * math.pi * variance), 6)
        True
    """
    return math.log(density_grid(name).mean().item() * (2 * SPAN) ** 2)


def u1(x: Tensor) -> Tensor:
    """Two arcs of a circle."""
    bumps = torch.stack((_square(x[:, 0] - 2, 0.6), _square(x[:, 0] + 2, 0.6)))
    return _square(_radius(x) - 2, 0.4) - (-bumps).logsumexp(0)


def u2(x: Tensor) -> Tensor:
    """A band along a sine wave."""
    return _square(x[:, 1] - _wave(x), 0.4)


def u3(x: Tensor) -> Tensor:
    """A band along a sine wave, and a second one that branches off and returns."""
    distance = x[:, 1] - _wave(x)
    branch = 3 * (-_square(x[:, 0] - 1, 0.6)).exp()
    bands = torch.stack((_square(distance, 0.35), _square(distance + branch, 0.35)))
    return -(-bands).logsumexp(0)


def u4(x: Tensor) -> Tensor:
    """A band along a sine wave that splits into two."""
    distance = x[:, 1] - _wave(x)
    branch = 3 * ((x[:, 0] - 1) / 0.3).sigmoid()
    bands = torch.stack((_square(distance, 0.4), _square(distance + branch, 0.35)))
    return -(-bands).logsumexp(0)


def ring(x: Tensor) -> Tensor:
    """A circle of radius 2."""
    return _square(_radius(x) - 2, 0.2)


def mixture(x: Tensor) -> Tensor:
    """Four Gaussians N(m_k, s^2 I) of different weights, with Z = 2 pi s^2."""
    means = x.new_tensor(MIXTURE_MEANS)
    weights = x.new_tensor(MIXTURE_WEIGHTS)
    squares = _square(x[:, None] - means, MIXTURE_STD).sum(2)
    return -(weights.log() - squares).logsumexp(1)


def _square(distance: Tensor, width: float) -> Tensor:
    return 0.5 * (distance / width).square()


def _wave(x: Tensor) -> Tensor:
    return (2 * math.pi * x[:, 0] / 4).sin()


def _radius(x: Tensor) -> Tensor:
    """Return |x|, with a finite gradient at 0."""
    return (x.square().sum(1) + 1e-12).sqrt()


ENERGIES: dict[str, Callable[[Tensor], Tensor]] = {
    "u1": u1,
    "u2": u2,
    "u3": u3,
    "u4": u4,
    "ring": ring,
    "mixture": mixture,
}
