"""NICE: Dinh, Krueger and Bengio, Non-linear Independent Components Estimation (1410.8516)."""

from collections.abc import Sequence

from flowgen.bijections.base import Bijection, Chain, Flip
from flowgen.bijections.coupling import Coupling
from flowgen.bijections.elementwise import LogisticToNormal, MarginalGaussianization, Standardize
from flowgen.bijections.networks import DenseNetwork
from flowgen.bijections.reshape import Flatten
from flowgen.bijections.univariate import TRANSFORMS
from flowgen.models.base import MAX_DEPTH, square_shape
from flowgen.models.flows.flow import Flow
from flowgen.utils.errors import check_choice, check_whole


class NICE(Flow):
    """Couplings of the flattened image whose halves take turns, a diagonal scale, a logistic base.

    Sections 3.2 to 3.4 and 5.1; a diagonal scale stands before the couplings too and starts from data. `conf/model/nice.yaml` says
    what each argument means.
    """

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        bits: int = 8,
        num_couplings: int = 4,
        width: int = 1000,
        num_layers: int = 5,
        transform: str = "additive",
        gaussianize: bool = True,
        dequantization: str = "uniform",
    ):
        channels, size = square_shape(image_shape)
        check_whole(bits=bits, width=width)
        check_whole(high=MAX_DEPTH, num_couplings=num_couplings, num_layers=num_layers)
        check_choice(TRANSFORMS, transform=transform)
        check_choice((True, False), gaussianize=gaussianize)
        numbers = channels * size**2
        univariate = TRANSFORMS[transform]("bounded")
        bijections: list[Bijection] = (
            [MarginalGaussianization(channels, 2**bits)] if gaussianize else []
        )
        bijections += [Flatten(channels, size, size), Standardize(numbers)]
        for _ in range(num_couplings):
            first, second = numbers - numbers // 2, numbers // 2
            bijections += [
                Coupling(
                    DenseNetwork(second, width, univariate.num_params * first, num_layers), univariate
                ),
                Flip(),
            ]
        super().__init__(
            Chain(*bijections, Standardize(numbers), LogisticToNormal()),
            image_shape,
            bits,
            dequantization,
        )
