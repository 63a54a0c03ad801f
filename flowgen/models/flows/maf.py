"""Masked and inverse autoregressive flows."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

from flowgen.bijections import autoregressive, elementwise, linear
from flowgen.bijections.base import Bijection, Flip, Invert
from flowgen.models.flows.builders import flat_chain, make_transform
from flowgen.models.flows.flow import Flow
from flowgen.models.shapes import MAX_DEPTH
from flowgen.utils.errors import check_whole


class MAF(Flow):
    """Masked autoregressive flow of the flattened image, with batch normalization.

    The likelihood takes one pass of each network, a sample one pass per dimension. Papamakarios,
    Pavlakou and Murray, Masked Autoregressive Flow for Density Estimation (1705.07057), section 3.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        num_transforms: Autoregressive transforms, each in the reverse order of the previous one.
        width: Units of each hidden layer.
        num_layers: Hidden layers of each network.
        transform: "additive", "multiplicative", "affine" (as in the paper), "spline" or "mixture"
            (of logistics).
        gaussianize: Start from the marginal distribution of the pixels if few values are frequent.
        dequantization: "uniform", "variational" or "gaussian:STD".

    Example:
        >>> import torch
        >>> model = MAF(image_shape=(1, 4, 4), bits=5, num_transforms=2, width=8, num_layers=1)
        >>> images = torch.randint(32, (16, 1, 4, 4), dtype=torch.uint8)
        >>> model.initialize(images)
        >>> model.log_prob(images).shape
        torch.Size([16])
    """

    inverted: ClassVar[bool] = False

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
        check_whole(width=width)
        check_whole(high=MAX_DEPTH, num_transforms=num_transforms, num_layers=num_layers)
        transform_fn = make_transform(transform)

        def layers(dim: int) -> Iterator[Bijection]:
            yield linear.BatchNorm(dim)
            for _ in range(num_transforms):
                bijection = autoregressive.Autoregressive(
                    autoregressive.MADE(dim, width, num_layers, transform_fn.num_params),
                    transform_fn,
                )
                yield Invert(bijection) if self.inverted else bijection
                yield from (linear.BatchNorm(dim), Flip())
            yield elementwise.Standardize(dim)

        super().__init__(
            flat_chain(image_shape, bits, gaussianize, layers), image_shape, bits, dequantization
        )


class IAF(MAF):
    """Inverse autoregressive flow: MAF with inverted transforms.

    A sample takes one pass of each network, the likelihood one pass per dimension. Kingma et al.,
    Improving Variational Inference with Inverse Autoregressive Flow (1606.04934), section 3.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        num_transforms: Autoregressive transforms, each in the reverse order of the previous one.
        width: Units of each hidden layer.
        num_layers: Hidden layers of each network.
        transform: "additive", "multiplicative", "affine" (as in the paper), "spline" or "mixture"
            (of logistics).
        gaussianize: Start from the marginal distribution of the pixels if few values are frequent.
        dequantization: "uniform", "variational" or "gaussian:STD".

    Example:
        >>> import torch
        >>> model = IAF(image_shape=(1, 4, 4), bits=5, num_transforms=1, width=8)
        >>> images = torch.randint(32, (16, 1, 4, 4), dtype=torch.uint8)
        >>> model.initialize(images)
        >>> model.sample(2)[0].shape
        torch.Size([2, 1, 4, 4])
    """

    inverted = True

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        bits: int = 8,
        num_transforms: int = 2,
        width: int = 128,
        num_layers: int = 1,
        transform: str = "affine",
        gaussianize: bool = True,
        dequantization: str = "uniform",
    ):
        super().__init__(
            image_shape=image_shape,
            bits=bits,
            num_transforms=num_transforms,
            width=width,
            num_layers=num_layers,
            transform=transform,
            gaussianize=gaussianize,
            dequantization=dequantization,
        )
