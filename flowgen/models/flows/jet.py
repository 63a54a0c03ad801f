"""Jet: Kolesnikov, Susano Pinto and Tschannen, A Modern Transformer-Based Normalizing Flow (2412.15129)."""

from collections.abc import Sequence
from itertools import cycle

from torch import Tensor

from flowgen.bijections.base import Bijection, Chain
from flowgen.bijections.coupling import Coupling, MaskedCoupling, checkerboard, stripes
from flowgen.bijections.elementwise import MarginalGaussianization, Standardize
from flowgen.bijections.linear import ActNorm, FusedAffine, InvertibleConv1x1LU
from flowgen.bijections.networks import Transformer
from flowgen.bijections.reshape import Flatten, Permute, Squeeze
from flowgen.bijections.univariate import TRANSFORMS
from flowgen.models.base import MAX_DEPTH, square_shape
from flowgen.models.flows.flow import Flow
from flowgen.models.flows.tarflow import check_transformers, patch_size
from flowgen.utils.errors import UserError, check_choice, check_whole

SPATIAL = (
    5  # one coupling in so many transforms half of the patches, the others half of every patch
)


class Jet(Flow):
    """Patches, then couplings whose networks are transformers without a mask; as quick to sample as to score.

    `conf/model/jet.yaml` says what each argument means.
    """

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        bits: int = 8,
        patch: int | None = None,
        num_couplings: int = 10,
        num_layers: int = 1,
        width: int = 64,
        num_heads: int = 2,
        dropout: float = 0.0,
        transform: str = "affine",
        permutation: str = "plu",
        gaussianize: bool = True,
        dequantization: str = "uniform",
        num_classes: int | None = None,
        condition_networks: bool = True,
    ):
        channels, size = square_shape(image_shape)
        check_whole(bits=bits)
        check_whole(high=MAX_DEPTH, num_couplings=num_couplings)
        check_transformers([num_layers], width, num_heads, dropout)
        check_choice(TRANSFORMS, transform=transform)
        check_choice(("permutation", "plu"), permutation=permutation)
        check_choice((True, False), gaussianize=gaussianize, condition_networks=condition_networks)
        patch = patch_size(size, patch)
        maps, side = channels * patch**2, size // patch
        if maps < 2:
            raise UserError(
                f"patches of one number cannot be halved, which Jet needs: choose another patch for images of size={size}"
            )
        seen = num_classes if num_classes is not None and condition_networks else 0
        univariate = TRANSFORMS[transform]("bounded")
        masks = cycle(token_masks(maps, side) if side > 1 else [])

        def network(reads: int, transformed: int) -> Transformer:
            return Transformer(
                side**2,
                reads + seen,
                width,
                univariate.num_params * transformed,
                num_heads,
                num_layers,
                dropout,
            )

        def step(number: int) -> list[Bijection]:
            if side > 1 and number % SPATIAL == SPATIAL - 1:
                return [MaskedCoupling(network(maps, maps), univariate, next(masks))]
            mix = (
                Permute(maps)
                if permutation == "permutation"
                else FusedAffine(ActNorm(maps), InvertibleConv1x1LU(maps))
            )
            return [mix, Coupling(network(maps // 2, maps - maps // 2), univariate)]

        bijections: list[Bijection] = (
            [MarginalGaussianization(channels, 2**bits)] if gaussianize else []
        )
        bijections += [
            Squeeze(patch),
            ActNorm(maps),
            *(bijection for number in range(num_couplings) for bijection in step(number)),
        ]
        bijections += [Flatten(maps, side, side), Standardize(channels * size**2)]
        super().__init__(
            Chain(*bijections),
            image_shape,
            bits,
            dequantization,
            num_classes,
            condition_networks,
        )


def token_masks(maps: int, side: int) -> list[Tensor]:
    """Halves of the patches: a checkerboard, columns and rows, each with its inverse."""
    columns = [stripes(maps, side, side, odd) for odd in (False, True)]
    return [
        *(checkerboard(maps, side, side, odd) for odd in (False, True)),
        *columns,
        *(mask.transpose(1, 2) for mask in columns),
    ]
