"""Masked autoregressive flow: Papamakarios, Pavlakou and Murray (1705.07057), and its mirror image."""

from collections.abc import Sequence

from flowgen.bijections.autoregressive import MADE, Autoregressive
from flowgen.bijections.base import Bijection, Chain, Flip, Invert
from flowgen.bijections.batchnorm import BatchNorm
from flowgen.bijections.elementwise import MarginalGaussianization, Standardize
from flowgen.bijections.reshape import Flatten
from flowgen.bijections.univariate import TRANSFORMS
from flowgen.models.base import MAX_DEPTH, square_shape
from flowgen.models.flows.flow import Flow
from flowgen.utils.errors import check_choice, check_whole


class MAF(Flow):
    """`flows` times an autoregressive map of the flattened image, batch normalisation and a reversal; quick to score, slow to sample.

    `conf/model/maf.yaml` says what each argument means.
    """

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        bits: int = 8,
        num_transforms: int = 5,
        width: int = 512,
        num_layers: int = 2,
        transform: str = "affine",
        gaussianize: bool = True,
        dequantization: str = "uniform",
    ):
        channels, size = square_shape(image_shape)
        check_whole(bits=bits, width=width)
        check_whole(high=MAX_DEPTH, num_transforms=num_transforms, num_layers=num_layers)
        check_choice(TRANSFORMS, transform=transform)
        check_choice((True, False), gaussianize=gaussianize)
        numbers = channels * size**2
        bijections: list[Bijection] = (
            [MarginalGaussianization(channels, 2**bits)] if gaussianize else []
        )
        bijections += [Flatten(channels, size, size), BatchNorm(numbers)]
        for _ in range(num_transforms):
            how = TRANSFORMS[transform]("bounded")
            bijections += [
                self.direct(Autoregressive(MADE(numbers, width, num_layers, how.num_params), how)),
                BatchNorm(numbers),
                Flip(),
            ]
        super().__init__(
            Chain(*bijections, Standardize(numbers)), image_shape, bits, dequantization
        )

    @staticmethod
    def direct(autoregressive: Bijection) -> Bijection:
        return autoregressive


class IAF(MAF):
    """The mirror image of MAF: quick to sample, slow to score. Kingma et al. (1606.04934)."""

    @staticmethod
    def direct(autoregressive: Bijection) -> Bijection:
        return Invert(autoregressive)
