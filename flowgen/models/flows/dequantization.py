"""Noise within the levels, which turns them into a density's points."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowgen.bijections.chain import Chain
from flowgen.bijections.coupling import MaskedCoupling, channelwise, checkerboard
from flowgen.bijections.networks import ConvNetwork, RandomSource
from flowgen.bijections.univariate import Affine
from flowgen.utils.errors import check_choice

STEPS, WIDTH = 4, 32
END = 1 - 2**-16  # where a level of 8 bits and its noise still stay below the next level in float32


class Uniform(nn.Module):
    """u ~ U[0, 1). Theis, van den Oord and Bethge (1511.01844), section 3.1."""

    def __init__(self) -> None:
        super().__init__()
        self.random_source = RandomSource()

    def forward(
        self, images: Tensor, dtype: torch.dtype, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """u in the shape of `levels`, and log q(u | levels) in nats, (batch,)."""
        noise = self.start(images, dtype, generator)
        return noise, noise.new_zeros(len(images))

    def start(
        self, images: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None
    ) -> Tensor:
        """All that is drawn for these levels."""
        return self.random_source(torch.rand, images.shape, generator, device=images.device, dtype=dtype)

    def initialize(self, images: Tensor, dtype: torch.dtype) -> None:
        """Uniform noise has nothing to learn."""


class Variational(nn.Module):
    """u = END Phi(g(e; levels)) with e ~ N(0, I), g a chain of masked affine couplings on the condition of the image.

    It starts as uniform noise on [0, END). log q(u) = log N(e) - log|det dg/de| - log N(g) - D log END. Flow++ (1902.00275), section 3.1.
    """

    def __init__(self, channels: int, size: int, bins: int):
        super().__init__()
        self.random_source = RandomSource()
        self.bins = bins
        kind = checkerboard if size > 1 else channelwise
        masks = [kind(channels, size, size, step % 2 == 1) for step in range(STEPS)]
        self.bijection = Chain(
            *(
                MaskedCoupling(ConvNetwork(2 * channels, WIDTH, 2 * channels), Affine(), mask)
                for mask in masks
            )
        )

    def forward(
        self, images: Tensor, dtype: torch.dtype, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """u in the shape of `levels`, and log q(u | levels) in nats, (batch,)."""
        e = self.start(images, dtype, generator)
        g, log_det = self.bijection(e, self._image(images, dtype))
        log_q = (
            0.5 * (g.square() - e.square()).flatten(1).sum(1) - log_det
        )  # the constants of the two Gaussians cancel
        return END * torch.special.ndtr(g), log_q - g[0].numel() * math.log(END)

    def initialize(self, images: Tensor, dtype: torch.dtype) -> None:
        self.bijection.initialize(self.start(images, dtype), self._image(images, dtype))

    def _image(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        return 2 * (images + 0.5).to(dtype) / self.bins - 1

    def start(
        self, images: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None
    ) -> Tensor:
        """All that is drawn for these levels."""
        return self.random_source(torch.randn, images.shape, generator, device=images.device, dtype=dtype)


class Gaussian(Uniform):
    """u = 1/2 + deviation 2^bits e, e ~ N(0, I): noise on the images, which leaves their levels behind. TarFlow (2412.06329), section 3."""

    def __init__(self, deviation: float, bins: int):
        super().__init__()
        self.deviation, self.bins = deviation, bins

    def start(
        self, images: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None
    ) -> Tensor:
        e = self.random_source(torch.randn, images.shape, generator, device=images.device, dtype=dtype)
        return 0.5 + self.deviation * self.bins * e


def dequantizer(dequantization: str, shape: Sequence[int], bits: int) -> Uniform | Variational:
    """By the name that a configuration gives it. Raises FlowgenError for another."""
    if (deviation := noise_of(dequantization)) is not None:
        return Gaussian(deviation, 2**bits)
    check_choice(("uniform", "variational", "gaussian:0.05"), dequantization=dequantization)
    return Uniform() if dequantization == "uniform" else Variational(shape[0], shape[1], 2**bits)


def noise_of(dequantization: object) -> float | None:
    """The deviation, of brightness from 0 to 1, that `gaussian:DEVIATION` names; None for all else."""
    name, _, number = str(dequantization).partition(":")
    try:
        deviation = float(number)
    except ValueError:
        return None
    return deviation if name == "gaussian" and 0 < deviation < math.inf else None
