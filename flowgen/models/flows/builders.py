"""Building blocks that the constructors of several flows share."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from flowgen.bijections import coupling, elementwise, networks, reshape, univariate
from flowgen.bijections.base import Bijection, Chain, Flip
from flowgen.models.shapes import Resolution, split_shape, squeezed
from flowgen.utils.errors import check, check_choice, check_whole

T = TypeVar("T")


def choose(argument: str, value: str, options: Mapping[str, T]) -> T:
    """Return the option of an argument, as in `choose("network", "conv", NETWORKS)`.

    Args:
        argument: Name of the argument, for the error message.
        value: Its value.
        options: The options by their names.
    """
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
    """Return the first bijection of a flow, a `MarginalGaussianization` if enabled, as a list.

    Args:
        enabled: Whether to use it.
        channels: Channels of the images.
        bits: Bits per pixel value.
    """
    check_whole(1, 8, bits=bits)
    return [elementwise.MarginalGaussianization(channels, 2**bits)] if enabled else []


def dense_couplings(
    dim: int, count: int, width: int, num_layers: int, transform: univariate.Transform
) -> Iterator[Bijection]:
    """Yield couplings of vectors with fully connected networks; the halves swap after each.

    Args:
        dim: Size of the vectors.
        count: Number of couplings.
        width: Units of each hidden layer.
        num_layers: Hidden layers of each network.
        transform: Transform of the second half.
    """
    check(dim > 1, "this model needs images of at least two values: choose a larger data.size")
    for _ in range(count):
        out_features = transform.num_params * (dim - dim // 2)
        network = networks.DenseNetwork(dim // 2, width, out_features, num_layers)
        yield coupling.Coupling(network, transform)
        yield Flip()


def flat_chain(
    image_shape: Sequence[int],
    bits: int,
    gaussianize: bool,
    make_layers: Callable[[int], Iterable[Bijection]],
) -> Chain:
    """Return a chain of layers for flattened images.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        gaussianize: Start with a `MarginalGaussianization`.
        make_layers: Function that returns the layers, given the dimension of the images.
    """
    channels, (height, width) = split_shape(image_shape)
    return Chain(
        *gaussianization(gaussianize, channels, bits),
        reshape.Flatten(channels, height, width),
        *make_layers(channels * height * width),
    )


def num_cond_channels(num_classes: int | None, condition_networks: bool) -> int:
    """Return the number of condition channels that networks read: the classes, one-hot, or 0.

    Args:
        num_classes: Number of classes, or None.
        condition_networks: Whether the class is an input of the networks.
    """
    if num_classes is not None:
        check_whole(num_classes=num_classes)
    return num_classes if num_classes and condition_networks else 0


def multi_scale(
    num_splits: int,
    channels: int,
    resolution: Resolution,
    level: Callable[[int, int, Resolution], list[Bijection]],
    last_level: Callable[[int, Resolution], list[Bijection]],
    prior: Callable[[int], networks.Conditioner | None],
) -> Bijection:
    """Return a multi-scale flow from images to vectors. Real NVP (1605.08803), section 3.6.

    After each of the first `num_splits` levels, half of the channels are factored out as latents
    (FactorOut).

    Args:
        num_splits: Number of levels that end with a split.
        channels: Channels of the images.
        resolution: Height and width of the images.
        level: Builds the bijections of a level, from (C, H, W) to (4C, H/2, W/2), given its
            number, its input channels C and its resolution (H, W).
        last_level: Builds the bijections after the last split, which end with a vector.
        prior: Builds the network that predicts the factored-out half from the other half, given the
            number of channels before the split; None stands for N(0, I).
    """
    # The order fixes the random numbers of the initial weights.
    levels = [level(n, channels << n, squeezed(resolution, 2**n)) for n in range(num_splits)]
    flow = Chain(*last_level(channels << num_splits, squeezed(resolution, 2**num_splits)))
    for index in reversed(range(num_splits)):
        flow = Chain(*levels[index], reshape.FactorOut(flow, prior(4 * channels << index)))
    return flow
