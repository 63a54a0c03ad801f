"""Planar and Sylvester flows."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from flowgen.bijections import elementwise, residual
from flowgen.bijections.base import Bijection, Chain
from flowgen.models.flows.builders import flat_chain
from flowgen.models.flows.flow import Flow
from flowgen.models.shapes import MAX_DEPTH
from flowgen.utils.errors import check_whole


class PlanarFlow(Flow):
    """Planar flow: residual transforms that bend the flattened image along one direction each.

    In the paper the flow leads from noise to latents; here it is used for density estimation, so
    the closed form leads from the image to the noise, and a sample takes one root per transform.
    Rezende and Mohamed, Variational Inference with Normalizing Flows (1505.05770), section 4.1.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        num_transforms: Number of transforms.
        gaussianize: Start from the marginal distribution of the pixels if few values are frequent.
        dequantization: "uniform", "variational" or "gaussian:STD".

    Example:
        >>> import torch
        >>> model = PlanarFlow(image_shape=(2, 1, 1), num_transforms=2)
        >>> images = torch.randint(256, (16, 2, 1, 1), dtype=torch.uint8)
        >>> model.initialize(images)
        >>> model.log_prob(images).shape
        torch.Size([16])
    """

    is_compressible: ClassVar[bool] = False

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
            _residual_chain(image_shape, bits, num_transforms, gaussianize, residual.Planar),
            image_shape,
            bits,
            dequantization,
        )


class SylvesterFlow(Flow):
    """Sylvester flow: a planar flow whose transforms bend along `width` orthogonal directions each.

    Van den Berg, Hasenclever, Tomczak and Welling, Sylvester Normalizing Flows for Variational
    Inference (1803.05649), section 3.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        num_transforms: Number of transforms.
        width: Hidden units of each transform, at most the dimension of the image.
        gaussianize: Start from the marginal distribution of the pixels if few values are frequent.
        dequantization: "uniform", "variational" or "gaussian:STD".

    Example:
        >>> import torch
        >>> model = SylvesterFlow(image_shape=(2, 1, 1), num_transforms=2)
        >>> images = torch.randint(256, (16, 2, 1, 1), dtype=torch.uint8)
        >>> model.initialize(images)
        >>> model.log_prob(images).shape
        torch.Size([16])
    """

    is_compressible: ClassVar[bool] = False

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
        super().__init__(
            _residual_chain(
                image_shape,
                bits,
                num_transforms,
                gaussianize,
                lambda dim: residual.Sylvester(dim, min(width, dim)),
            ),
            image_shape,
            bits,
            dequantization,
        )


def _residual_chain(
    image_shape: Sequence[int],
    bits: int,
    num_transforms: int,
    gaussianize: bool,
    make_layer: Callable[[int], Bijection],
) -> Chain:
    """Return a chain of residual layers, where `make_layer` takes the dimension of the images."""
    check_whole(high=MAX_DEPTH, num_transforms=num_transforms)

    def layers(dim: int) -> list[Bijection]:
        return [
            elementwise.Standardize(dim),
            *(make_layer(dim) for _ in range(num_transforms)),
            elementwise.Standardize(dim),
        ]

    return flat_chain(image_shape, bits, gaussianize, layers)
