"""Jet: Kolesnikov, Susano Pinto and Tschannen (2412.15129)."""

from collections.abc import Sequence
from itertools import cycle

from torch import Tensor

from flowgen.bijections import coupling, elementwise, linear, networks, reshape
from flowgen.bijections.base import Bijection, Chain
from flowgen.models.flows.builders import gaussianization, make_transform, num_cond_channels
from flowgen.models.flows.flow import Flow
from flowgen.models.shapes import (
    MAX_DEPTH,
    check_transformer,
    choose_patch,
    format_size,
    split_shape,
    squeezed,
)
from flowgen.utils.errors import UserError, check_choice, check_whole

SPATIAL_INTERVAL = 5  # every fifth coupling splits the patches, the others split their channels


class Jet(Flow):
    """Jet: couplings of image patches by transformers without a causal mask.

    Sampling and the likelihood both take one pass of each network. Kolesnikov et al., Jet: A Modern
    Transformer-Based Normalizing Flow (2412.15129), section 2.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        patch: Side length of the patches, the tokens of the transformers; None selects the largest
            of 4, 2 and 1 that divides height and width.
        num_couplings: Number of couplings. Every fifth one splits the patches, the others split the
            channels of each patch.
        num_layers: Layers of the transformer of each coupling.
        width: Width of the transformers, a multiple of `num_heads`.
        num_heads: Attention heads of the transformers.
        dropout: Dropout of the transformers, from 0 to 1.
        transform: "additive", "multiplicative", "affine" (as in the paper), "spline" or "mixture"
            (of logistics).
        permutation: Mixing of the channels of a patch before each coupling that splits them:
            "permutation" (as in the paper) or "plu" (ActNorm and an invertible 1x1 convolution).
        gaussianize: Start from the marginal distribution of the pixels if few values are frequent.
        dequantization: "uniform", "variational" or "gaussian:STD".
        num_classes: Number of classes of a class-conditional model, or None.
        condition_networks: With classes, make the class an input of all networks; p(x) then takes
            one pass per class. Otherwise only the base depends on the class.

    Example:
        >>> import torch
        >>> model = Jet(image_shape=(1, 4, 4), bits=5, patch=2, num_couplings=2, width=8)
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
        image_channels, resolution = split_shape(image_shape)
        check_whole(high=MAX_DEPTH, num_couplings=num_couplings)
        check_transformer([num_layers], width, num_heads, dropout)
        check_choice(("permutation", "plu"), permutation=permutation)
        transform_fn = make_transform(transform)
        patch = choose_patch(resolution, patch)
        channels = image_channels * patch**2
        rows, columns = squeezed(resolution, patch)
        num_tokens = rows * columns
        if channels < 2:
            raise UserError(
                f"Jet cannot split patches of one number in halves: choose a larger patch for "
                f"images of size={format_size(resolution)}"
            )
        masks = cycle(token_masks(channels, rows, columns))

        def network(in_channels: int, transformed: int) -> networks.Transformer:
            return networks.Transformer(
                num_tokens,
                in_channels + num_cond_channels(num_classes, condition_networks),
                width,
                transform_fn.num_params * transformed,
                num_heads,
                num_layers,
                dropout,
            )

        def step(index: int) -> list[Bijection]:
            if num_tokens > 1 and index % SPATIAL_INTERVAL == SPATIAL_INTERVAL - 1:
                return [
                    coupling.MaskedCoupling(network(channels, channels), transform_fn, next(masks))
                ]
            mixing = (
                reshape.Permute(channels)
                if permutation == "permutation"
                else linear.FusedAffine(
                    linear.ActNorm(channels), linear.InvertibleConv1x1LU(channels)
                )
            )
            conditioner = network(channels // 2, channels - channels // 2)
            return [mixing, coupling.Coupling(conditioner, transform_fn)]

        super().__init__(
            Chain(
                *gaussianization(gaussianize, image_channels, bits),
                reshape.Squeeze(patch),
                linear.ActNorm(channels),
                *(bijection for index in range(num_couplings) for bijection in step(index)),
                reshape.Flatten(channels, rows, columns),
                elementwise.Standardize(channels * num_tokens),
            ),
            image_shape,
            bits,
            dequantization,
            num_classes,
            condition_networks,
        )


def token_masks(channels: int, rows: int, columns: int) -> list[Tensor]:
    """Return masks of half of the patches: checkerboards, columns and rows, with their complements.

    A single row or column has no stripes.

    Args:
        channels: Channels of a patch.
        rows: Patches per column.
        columns: Patches per row.
    """
    masks = [coupling.checkerboard(channels, rows, columns, odd) for odd in (False, True)]
    if columns > 1:
        masks += [coupling.stripes(channels, rows, columns, odd) for odd in (False, True)]
    if rows > 1:
        stripes = [coupling.stripes(channels, columns, rows, odd) for odd in (False, True)]
        masks += [mask.transpose(1, 2) for mask in stripes]
    return masks
