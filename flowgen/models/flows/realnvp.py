"""Real NVP: Dinh, Sohl-Dickstein and Bengio, Density estimation using Real NVP (1605.08803)."""

from collections.abc import Sequence

from flowgen.bijections import coupling, elementwise, linear, networks, reshape
from flowgen.bijections.base import Bijection, Chain
from flowgen.bijections.univariate import Affine
from flowgen.models.flows.builders import make_transform, multi_scale
from flowgen.models.flows.flow import Flow
from flowgen.models.shapes import MAX_DEPTH, Resolution, resolve_levels, split_shape, squeezed
from flowgen.utils.errors import UserError, check_whole


class RealNVP(Flow):
    """Real NVP: a logit, and then a multi-scale flow of masked couplings with batch normalization.

    A level is three checkerboard couplings, a squeeze, three channel couplings and a split. Four
    checkerboard couplings follow the last level. Dinh et al. (1605.08803), sections 3.6 and 4.1.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        levels: Number of levels, each of which halves the resolution; None selects as many as the
            size allows, at most 4.
        width: Channels of the coupling networks; 32 in the paper, 64 for CIFAR-10.
        num_blocks: Residual blocks of the coupling networks; 2 to 8 in the paper.
        transform: "additive", "multiplicative", "affine" (as in the paper), "spline" or "mixture"
            (of logistics).
        alpha: The logit is that of alpha + (1 - 2 alpha) x, with 0 < alpha < 0.5.
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
        channels, resolution = split_shape(image_shape)
        check_whole(width=width)
        check_whole(high=MAX_DEPTH, num_blocks=num_blocks)
        if not 0 < alpha < 0.5:
            raise UserError(f"alpha must lie between 0 and 0.5, not {alpha!r}")
        # The log-scales of the paper's network are bounded already.
        transform_fn = Affine("plain") if transform == "affine" else make_transform(transform)
        make_network = networks.RealNVPNetwork if transform == "affine" else networks.ResNetwork

        def couplings(
            channels: int, resolution: Resolution, count: int, use_checkerboard: bool
        ) -> list[Bijection]:
            """Return couplings with alternating masks, each followed by batch normalization."""
            make_mask = (
                coupling.checkerboard
                if use_checkerboard and max(resolution) > 1
                else coupling.channelwise
            )
            bijections: list[Bijection] = []
            for index in range(count):
                mask = make_mask(channels, *resolution, index % 2 == 1)
                network = make_network(
                    channels, width, transform_fn.num_params * channels, num_blocks
                )
                bijections += [
                    coupling.MaskedCoupling(network, transform_fn, mask),
                    linear.BatchNorm(channels),
                ]
            return bijections

        def level(index: int, channels: int, resolution: Resolution) -> list[Bijection]:
            return [
                *couplings(channels, resolution, 3, use_checkerboard=True),
                reshape.Squeeze(),
                *couplings(4 * channels, squeezed(resolution), 3, use_checkerboard=False),
            ]

        def last_level(channels: int, resolution: Resolution) -> list[Bijection]:
            return [
                *couplings(channels, resolution, 4, use_checkerboard=True),
                reshape.Flatten(channels, *resolution),
            ]

        super().__init__(
            Chain(
                elementwise.Logit(alpha),
                multi_scale(
                    resolve_levels(resolution, levels),
                    channels,
                    resolution,
                    level,
                    last_level,
                    prior=lambda channels: None,
                ),
            ),
            image_shape,
            bits,
            dequantization,
        )
