"""Building blocks that the constructors of several flows share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from flowgen.bijections import elementwise, networks, reshape, univariate
from flowgen.bijections.base import Bijection, Chain
from flowgen.utils.errors import UserError, check_choice, check_number, check_whole

MAX_DEPTH = 1000  # layers, blocks or couplings; deeper models would take hours to build
MAX_LEVELS = 30
T = TypeVar("T")


def square_shape(image_shape: Sequence[int]) -> tuple[int, int]:
    """Return the channels and the resolution of square images.

    Args:
        image_shape: (channels, height, width), where height and width are equal.
    """
    channels, height, width = image_shape
    check_whole(channels=channels, height=height, width=width)
    if height != width:
        raise UserError(f"image_shape={list(image_shape)} is not square: choose one data.size")
    return channels, height


def choose(argument: str, value: str, options: Mapping[str, T]) -> T:
    """Return the option of an argument, as in `choose("network", "conv", NETWORKS)`."""
    check_choice(options, **{argument: value})
    return options[value]


def make_transform(name: str, log_scale: str = "bounded") -> univariate.Transform:
    """Return the univariate transform of a coupling or of an autoregressive bijection.

    Args:
        name: "additive", "multiplicative", "affine", "spline" or "mixture".
        log_scale: Parameterization of the log-scale, see `flowgen.bijections.univariate`.
    """
    return choose("transform", name, univariate.TRANSFORMS)(log_scale)


def gaussianization(enabled: bool, channels: int, bits: int) -> list[Bijection]:
    """Return the first bijection of a flow, a `MarginalGaussianization` if enabled, as a list."""
    check_whole(bits=bits)
    return [elementwise.MarginalGaussianization(channels, 2**bits)] if enabled else []


def flat_chain(
    image_shape: Sequence[int],
    bits: int,
    gaussianize: bool,
    make_layers: Callable[[int], Iterable[Bijection]],
) -> Chain:
    """Return a chain of layers for flattened images.

    Args:
        image_shape: (channels, height, width), where height and width are equal.
        bits: Bits per pixel value.
        gaussianize: Start with a `MarginalGaussianization`.
        make_layers: Function that returns the layers, given the dimension of the images.
    """
    channels, size = square_shape(image_shape)
    return Chain(
        *gaussianization(gaussianize, channels, bits),
        reshape.Flatten(channels, size, size),
        *make_layers(channels * size**2),
    )


def condition_size(num_classes: int | None, condition_networks: bool) -> int:
    """Return the number of condition channels that networks read: the classes, one-hot, or 0."""
    if num_classes is not None:
        check_whole(num_classes=num_classes)
    return num_classes if num_classes and condition_networks else 0


def choose_patch(size: int, patch: int | None) -> int:
    """Return the patch size of a transformer for images of `size` x `size` pixels.

    Args:
        size: Height and width of the images.
        patch: A divisor of `size`; None selects the largest of 4, 2 and 1 that divides it.
    """
    if patch is None:
        return next(patch for patch in (4, 2, 1) if size % patch == 0)
    check_whole(patch=patch)
    if size % patch:
        raise UserError(
            f"patch={patch} does not divide images of size={size}: choose a divisor, or null"
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


def resolve_levels(size: int, levels: int | None) -> int:
    """Return the number of times that a multi-scale flow halves images of `size` x `size` pixels.

    Args:
        size: Height and width of the images.
        levels: A number that the size allows; None selects the largest one, at most 4.
    """
    if levels is None:
        return next(levels for levels in (4, 3, 2, 1, 0) if size % 2**levels == 0)
    check_whole(high=MAX_LEVELS, levels=levels)
    if size % 2**levels:
        raise UserError(
            f"levels={levels} needs an image size that is a multiple of {2**levels}, not {size}: "
            "choose fewer levels"
        )
    return levels


def multi_scale(
    num_splits: int,
    channels: int,
    resolution: int,
    level: Callable[[int, int, int], list[Bijection]],
    last_level: Callable[[int, int], list[Bijection]],
    prior: Callable[[int], networks.Conditioner | None],
) -> Bijection:
    """Return a multi-scale flow from images to vectors. Real NVP (1605.08803), section 3.6.

    After each of the first `num_splits` levels, half of the channels are factored out as latents
    (FactorOut).

    Args:
        num_splits: Number of levels that end with a split.
        channels: Channels of the images.
        resolution: Height and width of the images.
        level: Builds the bijections of a level, from (C, R, R) to (4C, R/2, R/2), given its
            number, its input channels C and its resolution R.
        last_level: Builds the bijections after the last split, which end with a vector.
        prior: Builds the network that predicts the factored-out half from the other half, given the
            number of channels before the split; None stands for N(0, I).
    """
    # The order fixes the random numbers of the initial weights.
    levels = [level(n, channels << n, resolution >> n) for n in range(num_splits)]
    flow = Chain(*last_level(channels << num_splits, resolution >> num_splits))
    for index in reversed(range(num_splits)):
        flow = Chain(*levels[index], reshape.FactorOut(flow, prior(4 * channels << index)))
    return flow
