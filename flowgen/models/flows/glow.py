"""Glow: Kingma and Dhariwal, Generative Flow with Invertible 1x1 Convolutions (1807.03039)."""

import math
from collections.abc import Callable, Sequence

from flowgen.bijections import coupling, elementwise, linear, networks, reshape
from flowgen.bijections.base import Bijection, Chain
from flowgen.models.flows.builders import (
    choose,
    gaussianization,
    make_transform,
    multi_scale,
    num_cond_channels,
)
from flowgen.models.flows.flow import Flow
from flowgen.models.shapes import (
    MAX_DEPTH,
    Resolution,
    format_size,
    resolve_levels,
    split_shape,
    squeezed,
)
from flowgen.utils.errors import UserError, check_choice, check_whole

NETWORKS: dict[str, Callable[..., networks.Conditioner]] = {
    "conv": networks.ConvNetwork,
    "resnet": networks.ResNetwork,
    "gated": networks.GatedNetwork,
}
CONVOLUTIONS: dict[str, Callable[[int], linear.ChannelAffine]] = {
    "plu": linear.InvertibleConv1x1LU,
    "plain": linear.InvertibleConv1x1,
}


class Glow(Flow):
    """Glow: a multi-scale flow of invertible 1x1 convolutions and couplings.

    A level is a squeeze, `steps_per_level` steps of flow and, except for the last level, a split.
    A step of flow is ActNorm, an invertible 1x1 convolution and a coupling. Kingma and Dhariwal
    (1807.03039), section 3 and figure 2.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        levels: Number of levels (L in the paper). Each level starts with a squeeze, which halves
            height and width. None selects as many levels as the size allows, at most 4. For images
            of odd size this is 0: the flow then has a single level without a squeeze, and needs at
            least two channels.
        steps_per_level: Steps of flow in each level (K in the paper), or a list with one number per
            level.
        width: Channels of the coupling networks; 512 in the paper.
        network: Network of the couplings: "conv" is conv3x3, conv1x1, conv3x3, as in the paper.
            "resnet" has residual blocks. "gated" has gated dilated blocks, as in WaveNet.
        num_blocks: Blocks of network="resnet" or "gated".
        transform: "additive", "multiplicative", "affine" (as in the paper), "spline" or "mixture"
            (of logistics, as in Flow++).
        log_scale: How the log-scales of transform="affine", "multiplicative" and "mixture" are
            bounded: "bounded" (by an arc tangent), "sigmoid" (as in Glow's code) or "tanh".
        convolution: Parameterization of the 1x1 convolutions: "plu" (LU decomposition) or "plain".
        split_prior: Prior of the factored-out half of a split: "predicted" from the other half, or
            "standard" for N(0, I).
        base: Base of the last latents: "standard" for N(0, I), or "learned" for a Gaussian with
            learned means and standard deviations.
        final_actnorm: Add an ActNorm before the base.
        gaussianize: Start from the marginal distribution of the pixels if few values are frequent,
            as in digits.
        dequantization: "uniform", "variational" (a learned flow, as in Flow++) or
            "gaussian:STD" (noisy images).
        num_classes: Number of classes of a class-conditional model, or None.
        condition_networks: With classes, make the class an input of all networks; p(x) then takes
            one pass per class. Otherwise only the base depends on the class.

    Example:
        >>> import torch
        >>> model = Glow(image_shape=(3, 8, 8), bits=5, levels=2, steps_per_level=1, width=8)
        >>> images = torch.randint(32, (16, 3, 8, 8), dtype=torch.uint8)
        >>> model.initialize(images)
        >>> model.log_prob(images).shape
        torch.Size([16])
        >>> samples, log_prob = model.sample(4, temperature=0.7)
        >>> samples.shape
        torch.Size([4, 3, 8, 8])
    """

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        bits: int = 8,
        levels: int | None = None,
        steps_per_level: int | list[int] = 8,
        width: int = 64,
        network: str = "conv",
        num_blocks: int = 1,
        transform: str = "affine",
        log_scale: str = "bounded",
        convolution: str = "plu",
        split_prior: str = "predicted",
        base: str = "standard",
        final_actnorm: bool = True,
        gaussianize: bool = True,
        dequantization: str = "uniform",
        num_classes: int | None = None,
        condition_networks: bool = True,
    ):
        channels, resolution = split_shape(image_shape)
        check_whole(width=width)
        check_whole(high=MAX_DEPTH, num_blocks=num_blocks)
        check_choice(("bounded", "sigmoid", "tanh"), log_scale=log_scale)
        check_choice(("predicted", "standard"), split_prior=split_prior)
        check_choice(("standard", "learned"), base=base)
        make_convolution = choose("convolution", convolution, CONVOLUTIONS)
        make_network = choose("network", network, NETWORKS)
        block_arguments = [] if network == "conv" else [num_blocks]
        transform_fn = make_transform(transform, log_scale)
        cond_channels = num_cond_channels(num_classes, condition_networks)
        levels = resolve_levels(resolution, levels)
        if levels == 0 and channels < 2:
            raise UserError(
                f"Glow needs an even data.size for gray images, not {format_size(resolution)}"
            )
        depths = _expand_depths(steps_per_level, max(1, levels))

        def step(channels: int) -> list[Bijection]:
            in_channels = channels // 2 + cond_channels
            out_channels = transform_fn.num_params * (channels - channels // 2)
            return [
                linear.FusedAffine(linear.ActNorm(channels), make_convolution(channels)),
                coupling.Coupling(
                    make_network(in_channels, width, out_channels, *block_arguments), transform_fn
                ),
            ]

        def steps(index: int, channels: int) -> list[Bijection]:
            return [bijection for _ in range(depths[index]) for bijection in step(channels)]

        def level(index: int, channels: int, resolution: Resolution) -> list[Bijection]:
            return [reshape.Squeeze(), *steps(index, 4 * channels)]

        def last_level(channels: int, resolution: Resolution) -> list[Bijection]:
            scale = 2 if levels else 1  # images of odd size cannot be squeezed
            rows, columns = squeezed(resolution, scale)
            shape = (channels * scale**2, rows, columns)
            return [
                *(level(levels - 1, channels, resolution) if levels else steps(0, channels)),
                *([linear.ActNorm(shape[0])] if final_actnorm else []),
                reshape.Flatten(*shape),
                *([elementwise.Standardize(math.prod(shape))] if base == "learned" else []),
            ]

        def prior(channels: int) -> networks.Conditioner | None:
            in_channels = channels // 2 + cond_channels
            is_predicted = split_prior == "predicted"
            return networks.ZeroConv2d(in_channels, channels, 3) if is_predicted else None

        chain = Chain(
            *gaussianization(gaussianize, channels, bits),
            multi_scale(max(0, levels - 1), channels, resolution, level, last_level, prior),
        )
        super().__init__(chain, image_shape, bits, dequantization, num_classes, condition_networks)


def _expand_depths(steps_per_level: int | list[int], num_levels: int) -> list[int]:
    """Return the number of steps of flow of each level."""
    depths = (
        steps_per_level if isinstance(steps_per_level, list) else [steps_per_level] * num_levels
    )
    for depth in depths:
        check_whole(high=MAX_DEPTH, steps_per_level=depth)
    if len(depths) != num_levels:
        raise UserError(
            f"steps_per_level={depths} must have one number for each of {num_levels} levels, "
            "or be a single number"
        )
    return depths
