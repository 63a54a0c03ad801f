"""Real NVP for images: Dinh, Sohl-Dickstein and Bengio, Density estimation using Real NVP (1605.08803)."""

from collections.abc import Sequence

from torch import Tensor

from flowgen.bijections.base import Bijection, Chain
from flowgen.bijections.batchnorm import BatchNorm
from flowgen.bijections.coupling import MaskedCoupling, channelwise, checkerboard
from flowgen.bijections.elementwise import Logit
from flowgen.bijections.networks import RealNVPNetwork, ResNetwork
from flowgen.bijections.reshape import Flatten, Squeeze
from flowgen.bijections.univariate import TRANSFORMS
from flowgen.models.base import MAX_DEPTH, square_shape
from flowgen.models.flows.flow import Flow
from flowgen.models.flows.multiscale import largest_levels, multi_scale
from flowgen.utils.errors import check_choice, check_number, check_whole


class RealNVP(Flow):
    """Logit, then at each level three checkerboard couplings, squeeze, three channel couplings, FactorOut; four checkerboards at the end.

    Section 3.6 and 4.1. `conf/model/realnvp.yaml` says what each argument means.
    """

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        bits: int = 8,
        levels: int | None = None,
        width: int = 32,
        num_blocks: int = 2,
        transform: str = "affine",
        alpha: float = 0.05,
        dequantization: str = "uniform",
    ):
        channels, size = square_shape(image_shape)
        check_whole(width=width, bits=bits)
        check_whole(high=MAX_DEPTH, num_blocks=num_blocks)
        check_choice(TRANSFORMS, transform=transform)
        check_number(alpha=alpha)
        levels = largest_levels(size, levels)

        def couplings(maps: int, side: int, board: bool, count: int) -> list[Bijection]:
            """Couplings whose masks take turns, each followed by batch normalisation."""
            chain: list[Bijection] = []
            for number in range(count):
                kind = checkerboard if board and side > 1 else channelwise
                chain += [couple(maps, kind(maps, side, side, number % 2 == 1)), BatchNorm(maps)]
            return chain

        def couple(maps: int, mask: Tensor) -> MaskedCoupling:
            if transform == "affine":  # as in the paper
                return MaskedCoupling(
                    RealNVPNetwork(maps, width, 2 * maps, num_blocks),
                    TRANSFORMS["affine"]("plain"),
                    mask,
                )
            univariate = TRANSFORMS[transform]("bounded")
            return MaskedCoupling(
                ResNetwork(maps, width, univariate.num_params * maps, num_blocks), univariate, mask
            )

        def level(number: int, maps: int, side: int) -> list[Bijection]:
            return [
                *couplings(maps, side, True, 3),
                Squeeze(),
                *couplings(4 * maps, side // 2, False, 3),
            ]

        def top(maps: int, side: int) -> list[Bijection]:
            return [*couplings(maps, side, True, 4), Flatten(maps, side, side)]

        multi = multi_scale(levels, channels, size, level, top, prior=lambda maps: None)
        super().__init__(Chain(Logit(alpha), multi), image_shape, bits, dequantization)
