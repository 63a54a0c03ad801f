"""Planar flows: Rezende and Mohamed (1505.05770); Sylvester flows: van den Berg, Hasenclever, Tomczak and Welling (1803.05649)."""

from collections.abc import Callable, Sequence

from flowgen.bijections.base import Bijection, Chain
from flowgen.bijections.elementwise import MarginalGaussianization, Standardize
from flowgen.bijections.reshape import Flatten
from flowgen.bijections.residual import Planar, Sylvester
from flowgen.models.base import MAX_DEPTH, square_shape
from flowgen.models.flows.flow import Flow
from flowgen.utils.errors import check_choice, check_whole


class PlanarFlow(Flow):
    """`flows` maps of the flattened image, each of which bends it along one direction; quick to score, its samples by a root each.

    The papers' flows lead from noise to latents; this one learns densities, and so has its closed form from the image to the noise.
    `conf/model/planar.yaml` says what each argument means.
    """

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        bits: int = 8,
        num_transforms: int = 32,
        gaussianize: bool = True,
        dequantization: str = "uniform",
    ):
        super().__init__(
            _chain(image_shape, bits, num_transforms, gaussianize, Planar),
            image_shape,
            bits,
            dequantization,
        )


class SylvesterFlow(Flow):
    """As PlanarFlow, but each map bends along `width` orthogonal directions. `conf/model/sylvester.yaml` says what each argument means."""

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        bits: int = 8,
        num_transforms: int = 16,
        width: int = 16,
        gaussianize: bool = True,
        dequantization: str = "uniform",
    ):
        check_whole(width=width)
        chain = _chain(
            image_shape,
            bits,
            num_transforms,
            gaussianize,
            lambda numbers: Sylvester(numbers, min(width, numbers)),
        )
        super().__init__(chain, image_shape, bits, dequantization)


def _chain(
    image_shape: Sequence[int],
    bits: int,
    num_transforms: int,
    gaussianize: bool,
    layer: Callable[[int], Bijection],
) -> Chain:
    channels, size = square_shape(image_shape)
    check_whole(bits=bits)
    check_whole(high=MAX_DEPTH, num_transforms=num_transforms)
    check_choice((True, False), gaussianize=gaussianize)
    numbers = channels * size**2
    bijections: list[Bijection] = (
        [MarginalGaussianization(channels, 2**bits)] if gaussianize else []
    )
    bijections += [
        Flatten(channels, size, size),
        Standardize(numbers),
        *(layer(numbers) for _ in range(num_transforms)),
        Standardize(numbers),
    ]
    return Chain(*bijections)
