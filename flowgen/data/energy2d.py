"""Unnormalized densities in the plane, and points drawn from them."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flowgen.data.dataset import ImageDataset, Split
from flowgen.data.toy2d import SPAN
from flowgen.utils.errors import check_choice, check_whole
from flowgen.utils.rendering import TOY2D_SHAPE

CELLS = 256  # per side: one for each pair of 8-bit pixel values
NODES = 4  # quadrature nodes per side of a cell
MIXTURE_MEANS = ((-1.5, -1.5), (1.5, 1.5), (1.5, -1.5), (-1.5, 1.5))
MIXTURE_WEIGHTS = (0.4, 0.3, 0.2, 0.1)
MIXTURE_STD = 0.4


class Energy2D(ImageDataset):
    """Points of an unnormalized density exp(-U(x)) in the square [-4, 4] x [-4, 4].

    The square is divided into 2^bits x 2^bits pixel values. A cell is drawn with its probability,
    which is computed by quadrature. `flowgen.models.ReverseKL` trains with the density itself and
    needs no points, so that they are a test for it.

    Args:
        name: "u1" to "u4" (Rezende and Mohamed, 1505.05770, table 1), "ring" or "mixture".
        num_points: Number of points in each split.
        options: `bits` of `ImageDataset`. Its other options have no effect on points.

    Attributes:
        density: The name of the density.

    Example:
        >>> from flowgen.data import Energy2D
        >>> data = Energy2D(name="ring", num_points=100)
        >>> data.train.images.shape
        torch.Size([100, 2, 1, 1])
    """

    def __init__(self, *, name: str = "u1", num_points: int = 50000, **options: Any):
        check_choice(DENSITIES, name=name)
        check_whole(num_points=num_points)
        self.density = name
        weights = density_grid(name).unfold(0, NODES, NODES).unfold(1, NODES, NODES).sum((2, 3))
        generator = torch.Generator().manual_seed(0)
        cells = torch.multinomial(
            weights.flatten(), 3 * num_points, replacement=True, generator=generator
        )
        values = torch.stack((cells % CELLS, cells // CELLS), 1).to(torch.uint8)
        train, validation, test = map(Split, values.view(3, num_points, *TOY2D_SHAPE))
        super().__init__(train, validation, test, **options)


def density_grid(name: str) -> Tensor:
    """Return exp(-U) at the centers of a grid of the square, (rows, columns), in float64."""
    resolution = CELLS * NODES
    centers = 2 * SPAN * (torch.arange(resolution, dtype=torch.double) + 0.5) / resolution - SPAN
    # (x, y) with x varying fastest
    points = torch.cartesian_prod(centers, centers).flip(1)
    return (-DENSITIES[name](points)).exp().view(resolution, resolution)


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
    """Two arcs of a circle. This and the next three: (1505.05770), table 1."""
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


# Energies U(x) of points x (batch, 2), which return (batch,)
DENSITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "u1": u1,
    "u2": u2,
    "u3": u3,
    "u4": u4,
    "ring": ring,
    "mixture": mixture,
}
