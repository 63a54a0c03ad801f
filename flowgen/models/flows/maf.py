"""Masked and inverse autoregressive flows."""

from collections.abc import Sequence
from typing import ClassVar

from flowgen.bijections.autoregressive import MADE, Autoregressive
from flowgen.bijections.base import Bijection, Chain, Flip, Invert
from flowgen.bijections.elementwise import Standardize
from flowgen.bijections.linear import BatchNorm
from flowgen.bijections.reshape import Flatten
from flowgen.models.flows.builders import MAX_DEPTH, gaussianization, make_transform, square_shape
from flowgen.models.flows.flow import Flow
from flowgen.utils.errors import check_whole


class MAF(Flow):
    """Masked autoregressive flow of the flattened image, with batch normalization.

    The likelihood takes one pass of each network, a sample one pass per dimension. Papamakarios,
    Pavlakou and Murray, Masked Autoregressive Flow for Density Estimation (1705.07057), section 3.

    Args:
        image_shape: (channels, height, width), with height equal to width.
        bits: bits per pixel value.
        num_transforms: autoregressive transforms, each in the reverse order of the previous one.
        width: units of each hidden layer.
        num_layers: hidden layers of each network.
        transform: "additive", "multiplicative", "affine" (as in the paper), "spline" or "mixture"
            (of logistics).
        gaussianize: start from the marginal distribution of the pixels if few values are frequent.
        dequantization: "uniform", "variational" or "gaussian:DEVIATION".

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
        channels, size = square_shape(image_shape)
        check_whole(width=width)
        check_whole(high=MAX_DEPTH, num_transforms=num_transforms, num_layers=num_layers)
        univariate = make_transform(transform)
        dim = channels * size**2
        bijections: list[Bijection] = [
            *gaussianization(gaussianize, channels, bits),
            Flatten(channels, size, size),
            BatchNorm(dim),
        ]
        for _ in range(num_transforms):
            network = MADE(dim, width, num_layers, univariate.num_params)
            autoregressive: Bijection = Autoregressive(network, univariate)
            if self.inverted:
                autoregressive = Invert(autoregressive)
            bijections += [autoregressive, BatchNorm(dim), Flip()]
        bijections.append(Standardize(dim))
        super().__init__(Chain(*bijections), image_shape, bits, dequantization)


class IAF(MAF):
    """Inverse autoregressive flow: MAF with inverted transforms.

    A sample takes one pass of each network, the likelihood one pass per dimension. Kingma et al.,
    Improving Variational Inference with Inverse Autoregressive Flow (1606.04934), section 3.

    Args:
        image_shape: (channels, height, width), with height equal to width.
        bits: bits per pixel value.
        num_transforms: autoregressive transforms, each in the reverse order of the previous one.
        width: units of each hidden layer.
        num_layers: hidden layers of each network.
        transform: "additive", "multiplicative", "affine" (as in the paper), "spline" or "mixture"
            (of logistics).
        gaussianize: start from the marginal distribution of the pixels if few values are frequent.
        dequantization: "uniform", "variational" or "gaussian:DEVIATION".

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
