"""Distributions of points in the plane. Each point is an image of two channels and one pixel."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowgen.data.dataset import ImageDataset
from flowgen.data.splits import Split
from flowgen.utils.errors import check_choice, check_whole
from flowgen.utils.toy2d import TOY2D_SHAPE
from flowgen.utils.toy2d import TOY2D_SPAN as SPAN


class Toy2D(ImageDataset):
    """Points of a distribution in the plane, drawn with a fixed seed.

    The square [-4, 4] x [-4, 4] is divided into 2^bits x 2^bits pixel values.

    Args:
        name: "moons", "rings", "checkerboard" or "spirals".
        num_points: Number of points in each split.
        options: `bits` of `ImageDataset`. Its other options have no effect on points.

    Example:
        >>> from flowgen.data import Toy2D
        >>> data = Toy2D(name="rings", num_points=100)
        >>> data.train.images.shape
        torch.Size([100, 2, 1, 1])
    """

    def __init__(self, *, name: str = "moons", num_points: int = 50000, **options: Any):
        check_choice(DISTRIBUTIONS, name=name)
        check_whole(num_points=num_points)
        generator = torch.Generator().manual_seed(0)
        points = torch.stack([DISTRIBUTIONS[name](num_points, generator) for _ in range(3)])
        values = ((points + SPAN) * (256 / (2 * SPAN))).floor().clamp(0, 255).to(torch.uint8)
        # They are drawn in this order; changing it would change every split.
        train, test, validation = map(Split, values.view(3, num_points, *TOY2D_SHAPE))
        super().__init__(train, validation, test, **options)


def moons(count: int, generator: torch.Generator) -> Tensor:
    """Draw points of two interleaved half circles, (count, 2)."""
    angle = math.pi * torch.rand(count, generator=generator)
    upper = torch.rand(count, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    points = torch.stack((x - 0.5, y - 0.25), 1)
    return 1.8 * (points + 0.07 * torch.randn(count, 2, generator=generator))


def rings(count: int, generator: torch.Generator) -> Tensor:
    """Draw points of four circles around one center, (count, 2)."""
    ring = 1 + torch.randint(4, (count,), generator=generator)
    radius = 0.8 * ring + 0.06 * torch.randn(count, generator=generator)
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    return radius[:, None] * torch.stack((angle.cos(), angle.sin()), 1)


def checkerboard(count: int, generator: torch.Generator) -> Tensor:
    """Draw points of eight of sixteen squares, (count, 2)."""
    x = 4 * torch.rand(count, generator=generator) - 2
    row = torch.randint(2, (count,), generator=generator)
    y = torch.rand(count, generator=generator) + 2 * row + x.floor() % 2 - 2
    return 1.7 * torch.stack((x, y), 1)


def spirals(count: int, generator: torch.Generator) -> Tensor:
    """Draw points of a spiral with two arms, (count, 2)."""
    turn = 3 * math.pi * torch.rand(count, generator=generator).sqrt()
    arm = 2 * torch.randint(2, (count,), generator=generator) - 1
    points = torch.stack((turn.cos(), turn.sin()), 1) * (turn / (3 * math.pi) * 3.4)[:, None]
    return arm[:, None] * points + 0.08 * torch.randn(count, 2, generator=generator)


DISTRIBUTIONS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "moons": moons,
    "rings": rings,
    "checkerboard": checkerboard,
    "spirals": spirals,
}
