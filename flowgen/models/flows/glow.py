"""Glow: Kingma and Dhariwal, Generative Flow with Invertible 1x1 Convolutions (1807.03039)."""

from collections.abc import Sequence

from flowgen.bijections.base import Bijection, Chain
from flowgen.bijections.coupling import Coupling
from flowgen.bijections.elementwise import MarginalGaussianization, Standardize
from flowgen.bijections.linear import ActNorm, FusedAffine, InvertibleConv1x1, InvertibleConv1x1LU
from flowgen.bijections.networks import (
    Conditioner,
    ConvNetwork,
    GatedNetwork,
    ResNetwork,
    ZeroConv2d,
)
from flowgen.bijections.reshape import Flatten, Squeeze
from flowgen.bijections.univariate import TRANSFORMS
from flowgen.models.base import MAX_DEPTH, square_shape
from flowgen.models.flows.flow import Flow
from flowgen.models.flows.multiscale import largest_levels, multi_scale
from flowgen.utils.errors import UserError, check_choice, check_whole


class Glow(Flow):
    """Multi-scale Glow: `levels` times squeeze, `steps_per_level` steps and, but for the last, FactorOut.

    One step is ActNorm -> invertible 1x1 convolution -> coupling. `conf/model/glow.yaml` says what each argument means.
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
        channels, size = square_shape(image_shape)
        check_whole(bits=bits, width=width)
        check_choice(("conv", "resnet", "gated"), network=network)
        check_choice(TRANSFORMS, transform=transform)
        check_choice(("bounded", "sigmoid", "tanh"), log_scale=log_scale)
        check_choice(("plu", "plain"), convolution=convolution)
        check_choice(("predicted", "standard"), split_prior=split_prior)
        check_choice(("learned", "standard"), base=base)
        check_choice(
            (True, False),
            final_actnorm=final_actnorm,
            gaussianize=gaussianize,
            condition_networks=condition_networks,
        )
        levels = largest_levels(size, levels)
        if levels == 0 and channels < 2:
            raise UserError(
                f"grey images of size={size} cannot be halved, which Glow needs: give data.size an even value"
            )
        depths = _depths(steps_per_level, max(1, levels), num_blocks)
        seen = (
            num_classes if num_classes is not None and condition_networks else 0
        )  # channels of the condition

        def step(maps: int) -> tuple[Bijection, Bijection]:
            mix = InvertibleConv1x1LU(maps) if convolution == "plu" else InvertibleConv1x1(maps)
            univariate = TRANSFORMS[transform](log_scale)
            inside = _network(
                network, num_blocks, maps // 2 + seen, width, univariate.num_params * (maps - maps // 2)
            )
            return FusedAffine(ActNorm(maps), mix), Coupling(inside, univariate)

        def steps(number: int, maps: int) -> list[Bijection]:
            return [bijection for _ in range(depths[number - 1]) for bijection in step(maps)]

        def level(number: int, maps: int, side: int) -> list[Bijection]:
            return [Squeeze(), *steps(number, 4 * maps)]

        def top(maps: int, side: int) -> list[Bijection]:
            """The last level, which nothing leaves; without a squeeze where the size cannot be halved."""
            last = level(levels, maps, side) if levels else steps(1, maps)
            maps, side = (4 * maps, side // 2) if levels else (maps, side)
            last += [ActNorm(maps)] if final_actnorm else []
            return [
                *last,
                Flatten(maps, side, side),
                *([Standardize(maps * side**2)] if base == "learned" else []),
            ]

        def predicted(maps: int) -> Conditioner | None:
            return ZeroConv2d(maps // 2 + seen, maps, 3) if split_prior == "predicted" else None

        pixelwise = [MarginalGaussianization(channels, 2**bits)] if gaussianize else []
        bijection = Chain(
            *pixelwise, multi_scale(levels - 1, channels, size, level, top, predicted)
        )
        super().__init__(
            bijection, image_shape, bits, dequantization, num_classes, condition_networks
        )


def _depths(steps_per_level: int | list[int], levels: int, num_blocks: int) -> list[int]:
    """The steps of each level. Raises FlowgenError where they are not as many as levels, or where they or their `blocks` are too many."""
    check_whole(high=MAX_DEPTH, num_blocks=num_blocks)
    depths = steps_per_level if isinstance(steps_per_level, list) else [steps_per_level] * levels
    for depth in depths:
        check_whole(high=MAX_DEPTH, steps_per_level=depth)
    if len(depths) != levels:
        raise UserError(
            f"steps_per_level={depths} is not a number for each of {levels} levels: give so many, or one for all"
        )
    return depths


def _network(kind: str, num_blocks: int, reads: int, width: int, gives: int) -> Conditioner:
    """The network of a coupling, from `reads` channels to `gives`."""
    if kind == "conv":
        return ConvNetwork(reads, width, gives)
    return (ResNetwork if kind == "resnet" else GatedNetwork)(reads, width, gives, num_blocks)
