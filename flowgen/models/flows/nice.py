"""NICE: Dinh, Krueger and Bengio, Non-linear Independent Components Estimation (1410.8516)."""

from collections.abc import Iterator, Sequence

from flowgen.bijections import elementwise
from flowgen.bijections.base import Bijection
from flowgen.models.flows.builders import dense_couplings, flat_chain, make_transform
from flowgen.models.flows.flow import Flow
from flowgen.models.shapes import MAX_DEPTH
from flowgen.utils.errors import check_whole


class NICE(Flow):
    """NICE: couplings of the flattened image, a diagonal scale, and a logistic base.

    Dinh et al. (1410.8516), sections 3.2 to 3.4 and 5.1. Unlike there, a diagonal scale that is
    initialized from data also precedes the couplings.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        num_couplings: Number of couplings, between which the halves swap roles.
        width: Units of each hidden layer.
        num_layers: Hidden layers of each coupling network.
        transform: "additive" (as in the paper), "multiplicative", "affine", "spline" or "mixture"
            (of logistics).
        gaussianize: Start from the marginal distribution of the pixels if few values are frequent.
        dequantization: "uniform", "variational" or "gaussian:STD".

    Example:
        >>> import torch
        >>> model = NICE(image_shape=(1, 4, 4), bits=5, num_couplings=2, width=8, num_layers=1)
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
        num_couplings: int = 4,
        width: int = 1000,
        num_layers: int = 5,
        transform: str = "additive",
        gaussianize: bool = True,
        dequantization: str = "uniform",
    ):
        check_whole(width=width)
        check_whole(high=MAX_DEPTH, num_couplings=num_couplings, num_layers=num_layers)
        transform_fn = make_transform(transform)

        def layers(dim: int) -> Iterator[Bijection]:
            yield elementwise.Standardize(dim)
            yield from dense_couplings(dim, num_couplings, width, num_layers, transform_fn)
            yield from (elementwise.Standardize(dim), elementwise.LogisticToNormal())

        super().__init__(
            flat_chain(image_shape, bits, gaussianize, layers), image_shape, bits, dequantization
        )
