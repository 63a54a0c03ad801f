"""Real NVP: Dinh, Sohl-Dickstein and Bengio, Density estimation using Real NVP (1605.08803)."""

from collections.abc import Sequence

from torch import Tensor

from flowgen.bijections.base import Bijection, Chain
from flowgen.bijections.coupling import MaskedCoupling, channelwise, checkerboard
from flowgen.bijections.elementwise import Logit
from flowgen.bijections.linear import BatchNorm
from flowgen.bijections.networks import RealNVPNetwork, ResNetwork
from flowgen.bijections.reshape import Flatten, Squeeze
from flowgen.bijections.univariate import Affine
from flowgen.models.flows.builders import (
    MAX_DEPTH,
    make_transform,
    multi_scale,
    num_levels,
    square_shape,
)
from flowgen.models.flows.flow import Flow
from flowgen.utils.errors import UserError, check_whole


class RealNVP(Flow):
    """Real NVP: a logit, and then a multi-scale flow of masked couplings with batch normalization.

    A level is three checkerboard couplings, a squeeze, three channel couplings and a split. Four
    checkerboard couplings follow the last level. Dinh et al. (1605.08803), sections 3.6 and 4.1.

    Args:
        image_shape: (channels, height, width), with height equal to width.
        bits: bits per pixel value.
        levels: number of levels, each of which halves the resolution; None selects as many as the
            size allows, at most 4.
        width: channels of the coupling networks; 64 in the paper.
        num_blocks: residual blocks of the coupling networks; 4 to 8 in the paper.
        transform: "additive", "multiplicative", "affine" (as in the paper), "spline" or "mixture"
            (of logistics).
        alpha: the logit is that of alpha + (1 - 2 alpha) x, with 0 < alpha < 0.5.
        dequantization: "uniform" or "variational".

    Example:
        >>> import torch
        >>> model = RealNVP(image_shape=(1, 4, 4), bits=5, levels=1, width=8, num_blocks=1)
        >>> images = torch.randint(32, (16, 1, 4, 4), dtype=torch.uint8)
        >>> model.initialize(images)
        >>> model.log_prob(images).shape
        torch.Size([16])
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
        check_whole(width=width)
        check_whole(high=MAX_DEPTH, num_blocks=num_blocks)
        if not 0 < alpha < 0.5:
            raise UserError(f"alpha must lie between 0 and 0.5, not {alpha!r}")
        univariate = make_transform(transform)

        def coupling(channels: int, mask: Tensor) -> MaskedCoupling:
            if transform == "affine":
                # The log-scales of the paper's network are bounded already.
                network = RealNVPNetwork(channels, width, 2 * channels, num_blocks)
                return MaskedCoupling(network, Affine("plain"), mask)
            resnet = ResNetwork(channels, width, univariate.num_params * channels, num_blocks)
            return MaskedCoupling(resnet, univariate, mask)

        def couplings(
            channels: int, resolution: int, count: int, use_checkerboard: bool
        ) -> list[Bijection]:
            """Return couplings with alternating masks, each followed by batch normalization."""
            make_mask = checkerboard if use_checkerboard and resolution > 1 else channelwise
            bijections: list[Bijection] = []
            for index in range(count):
                mask = make_mask(channels, resolution, resolution, index % 2 == 1)
                bijections += [coupling(channels, mask), BatchNorm(channels)]
            return bijections

        def level(index: int, channels: int, resolution: int) -> list[Bijection]:
            return [
                *couplings(channels, resolution, 3, use_checkerboard=True),
                Squeeze(),
                *couplings(4 * channels, resolution // 2, 3, use_checkerboard=False),
            ]

        def last_level(channels: int, resolution: int) -> list[Bijection]:
            return [
                *couplings(channels, resolution, 4, use_checkerboard=True),
                Flatten(channels, resolution, resolution),
            ]

        flow = multi_scale(
            num_levels(size, levels), channels, size, level, last_level, prior=lambda channels: None
        )
        super().__init__(Chain(Logit(alpha), flow), image_shape, bits, dequantization)
