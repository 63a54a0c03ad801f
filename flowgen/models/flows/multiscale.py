"""The multi-scale architecture: at every level half of the numbers become latent and the image is halved."""

from collections.abc import Callable

from flowgen.bijections.base import Bijection, Chain
from flowgen.bijections.networks import Conditioner
from flowgen.bijections.reshape import FactorOut
from flowgen.utils.errors import UserError, check_whole


def largest_levels(size: int, levels: int | None) -> int:
    """`levels`, or, where that is None, as many halvings as images of this size allow, at most 4 and none for an odd size.

    Raises FlowgenError where they are too many.
    """
    if levels is None:
        return next(levels for levels in (4, 3, 2, 1, 0) if size % 2**levels == 0)
    check_whole(high=30, levels=levels)
    if size % 2**levels:
        raise UserError(
            f"levels={levels} needs images whose size is a multiple of {2**levels}, not {size}: choose fewer levels"
        )
    return levels


def multi_scale(
    splits: int,
    channels: int,
    size: int,
    level: Callable[[int, int, int], list[Bijection]],
    top: Callable[[int, int], list[Bijection]],
    prior: Callable[[int], Conditioner | None],
    number: int = 1,
) -> Bijection:
    """From an image (B, channels, size, size) to one vector, by as many FactorOuts as `splits`. Real NVP (1605.08803), section 3.6.

    `level(number, channels, size)` turns the image that enters level `number`, from 1, into (B, 4 channels, size / 2, size / 2); of its
    channels `prior(4 channels)` says how the half that leaves is predicted. `top(channels, size)` ends with a vector.
    """
    if number > splits:
        return Chain(*top(channels, size))
    here, predict = level(number, channels, size), prior(4 * channels)
    rest = multi_scale(splits, 2 * channels, size // 2, level, top, prior, number + 1)
    return Chain(*here, FactorOut(rest, predict))
