"""Sizes of images and networks that the constructors of several models share and check."""

import math
from collections.abc import Sequence

from flowgen.utils.errors import UserError, check_number, check_whole

MAX_DEPTH = 1000  # layers, blocks or couplings; deeper models would take hours to build
MAX_LEVELS = 30
Resolution = tuple[int, int]  # height and width


def split_shape(image_shape: Sequence[int]) -> tuple[int, Resolution]:
    """Return the channels and the resolution (height, width) of an image shape."""
    channels, height, width = image_shape
    check_whole(channels=channels, height=height, width=width)
    return channels, (height, width)


def format_size(resolution: Resolution) -> str:
    """Return a resolution as the value of `data.size`: one number for squares."""
    height, width = resolution
    return str(height) if height == width else f"[{height},{width}]"


def choose_patch(resolution: Resolution, patch: int | None) -> int:
    """Return the height and width of the patches of a transformer.

    Args:
        resolution: Height and width of the images.
        patch: A divisor of both; None selects the largest of 4, 2 and 1 that divides both.
    """
    divisor = math.gcd(*resolution)
    if patch is None:
        return next(patch for patch in (4, 2, 1) if divisor % patch == 0)
    check_whole(patch=patch)
    if divisor % patch:
        raise UserError(
            f"patch={patch} does not divide images of size={format_size(resolution)}: "
            "choose a divisor, or null"
        )
    return patch


def check_transformer(
    num_layers: Sequence[int], width: int, num_heads: int, dropout: float
) -> None:
    """Raise a UserError if transformers cannot have these sizes; `num_layers` has one per block."""
    if not isinstance(num_layers, Sequence) or isinstance(num_layers, str) or not num_layers:
        raise UserError(
            "num_layers must be a list with one number per block, as in "
            f"model.num_layers=[2,2,4], not {num_layers!r}"
        )
    for depth in num_layers:
        check_whole(high=MAX_DEPTH, num_layers=depth)
    check_whole(width=width, num_heads=num_heads)
    check_number(dropout=dropout)
    if dropout >= 1:
        raise UserError(f"dropout must be below 1, not {dropout}")
    if width % num_heads:
        raise UserError(
            f"width={width} is not a multiple of num_heads={num_heads}: change one of them"
        )


def resolve_levels(resolution: Resolution, levels: int | None) -> int:
    """Return the number of times that a multi-scale flow halves the resolution of images.

    Args:
        resolution: Height and width of the images.
        levels: A number that both allow; None selects the largest one, at most 4.
    """
    divisor = math.gcd(*resolution)
    if levels is None:
        return next(levels for levels in (4, 3, 2, 1, 0) if divisor % 2**levels == 0)
    check_whole(high=MAX_LEVELS, levels=levels)
    if divisor % 2**levels:
        raise UserError(
            f"levels={levels} needs an image size that is a multiple of {2**levels}, not "
            f"{format_size(resolution)}: choose fewer levels"
        )
    return levels


def squeezed(resolution: Resolution, factor: int = 2) -> Resolution:
    """Return the resolution after `reshape.Squeeze(factor)`."""
    return resolution[0] // factor, resolution[1] // factor
