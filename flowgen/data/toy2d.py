"""Distributions in the plane, each point an "image" of two numbers."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowgen.data.dataset import SPLITS, ImageDataset, Split
from flowgen.utils.errors import check_choice, check_whole
from flowgen.utils.rendering import TOY2D_SHAPE

SPAN = 4.0  # the square [-4, 4] x [-4, 4] is what the levels divide


class Toy2D(ImageDataset):
    """`num_points` points for each split, drawn with a seed of their own: uint8 of shape (num_points, 2, 1, 1)."""

    def __init__(
        self,
        *,
        name: str,
        num_points: int,
        bits: int,
        random_flip: bool,
        binarization: str = "threshold",
    ):
        check_choice(SETS, name=name)
        check_whole(num_points=num_points)
        generator = torch.Generator().manual_seed(0)
        train, test, validation = (_levels(SETS[name](num_points, generator)) for _ in SPLITS)
        super().__init__(
            train, validation, test, bits=bits, random_flip=random_flip, binarization=binarization
        )


def _levels(points: Tensor) -> Split:
    return Split(
        ((points + SPAN) * (256 / (2 * SPAN)))
        .floor()
        .clamp(0, 255)
        .to(torch.uint8)
        .view(-1, *TOY2D_SHAPE)
    )


def moons(count: int, generator: torch.Generator) -> Tensor:
    """Two half circles, one in the other's arms."""
    angle = math.pi * torch.rand(count, generator=generator)
    upper = torch.rand(count, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return 1.8 * (
        torch.stack((x - 0.5, y - 0.25), 1) + 0.07 * torch.randn(count, 2, generator=generator)
    )


def rings(count: int, generator: torch.Generator) -> Tensor:
    """Four circles around one centre."""
    radius = 0.8 * (1 + torch.randint(4, (count,), generator=generator)) + 0.06 * torch.randn(
        count, generator=generator
    )
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    return radius[:, None] * torch.stack((angle.cos(), angle.sin()), 1)


def checkerboard(count: int, generator: torch.Generator) -> Tensor:
    """Eight of sixteen squares."""
    x = 4 * torch.rand(count, generator=generator) - 2
    row = torch.randint(2, (count,), generator=generator)
    y = torch.rand(count, generator=generator) + 2 * row + x.floor() % 2 - 2
    return 1.7 * torch.stack((x, y), 1)


def spirals(count: int, generator: torch.Generator) -> Tensor:
    """Two arms."""
    turn = 3 * math.pi * torch.rand(count, generator=generator).sqrt()
    arm = 2 * torch.randint(2, (count,), generator=generator) - 1
    point = (turn / (3 * math.pi) * 3.4)[:, None] * torch.stack((turn.cos(), turn.sin()), 1)
    return arm[:, None] * point + 0.08 * torch.randn(count, 2, generator=generator)


Draw = Callable[[int, torch.Generator], Tensor]
SETS: dict[str, Draw] = {
    "moons": moons,
    "rings": rings,
    "checkerboard": checkerboard,
    "spirals": spirals,
}
