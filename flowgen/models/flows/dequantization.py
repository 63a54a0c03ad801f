"""Dequantization: noise that turns pixel values into points of a continuous density."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flowgen.bijections import coupling, networks, univariate
from flowgen.bijections.base import Chain
from flowgen.utils.errors import check_choice

VARIATIONAL_COUPLINGS = 4
VARIATIONAL_WIDTH = 32  # channels of the coupling networks
# Largest noise; value + noise still rounds to less than value + 1 in float32.
MAX_NOISE = 1 - 2**-16


class Dequantizer(nn.Module):
    """Noise u with a tractable density: a flow models x = (images + u) / 2^bits."""

    def __init__(self) -> None:
        super().__init__()
        self.random_source = networks.RandomSource()

    def draw_noise(
        self, images: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw all random numbers that one call for these images uses, by default N(0, I).

        Args:
            images: (batch, channels, height, width).
            dtype: Data type of the result.
            generator: Random generator, or None for the global one.

        Returns:
            A tensor of the shape of the images.
        """
        return self.random_source(
            torch.randn, images.shape, generator, device=images.device, dtype=dtype
        )

    def forward(
        self, images: Tensor, dtype: torch.dtype, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Return the noise u, like the images, and log q(u | images) in nats, (batch,).

        Args:
            images: (batch, channels, height, width).
            dtype: Data type of the result.
            generator: Random generator, or None for the global one.
        """
        noise = self.draw_noise(images, dtype, generator)
        return noise, noise.new_zeros(len(images))

    def initialize(self, images: Tensor, dtype: torch.dtype) -> None:
        """Initialize parameters from one batch of images."""


class UniformDequantizer(Dequantizer):
    """u ~ U[0, 1), with log q(u) = 0. Theis, van den Oord and Bethge (1511.01844), section 3.1.

    Rare values above `MAX_NOISE` are set to it.
    """

    def draw_noise(
        self, images: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None
    ) -> Tensor:
        noise = self.random_source(
            torch.rand, images.shape, generator, device=images.device, dtype=dtype
        )
        return noise.clamp(max=MAX_NOISE)


class GaussianDequantizer(Dequantizer):
    """u = 1/2 + std 2^bits e with e ~ N(0, I): Gaussian noise on images.

    The noisy images no longer determine the pixel values, so the flow has no likelihood of
    images. TarFlow (2412.06329), section 2.4.

    Args:
        std: Standard deviation of the noise, for brightness from 0 to 1.
        bins: Number of pixel values, 2^bits.
    """

    def __init__(self, std: float, bins: int):
        super().__init__()
        self.std = std
        self.bins = bins

    def draw_noise(
        self, images: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None
    ) -> Tensor:
        return 0.5 + self.std * self.bins * super().draw_noise(images, dtype, generator)


@torch.enable_grad()
def denoise(y: Tensor, std: float, log_density: Callable[[Tensor], Tensor]) -> Tensor:
    """Return E[x | y] = y + s^2 grad log p(y) of y = x + s e, e ~ N(0, I), by Tweedie's formula.

    Efron (2011), section 2.

    Args:
        y: Noisy points, (batch, ...).
        std: The standard deviation s of the noise.
        log_density: Function that returns log p(y), (batch,).

    Example:
        >>> standard_normal = torch.distributions.Normal(0.0, 1.0)
        >>> denoise(torch.ones(1, 1), 1.0, lambda y: standard_normal.log_prob(y).sum(1))
        tensor([[0.]])
    """
    y = y.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(log_density(y).sum(), y)
    return y.detach() + std**2 * gradient


class VariationalDequantizer(Dequantizer):
    """u = MAX_NOISE Phi(g(e; images)) with e ~ N(0, I), where g is a flow conditioned on the image.

    g is a chain of masked affine couplings. u is uniform on [0, MAX_NOISE) at the start, and
    log q(u) = log N(e) - log|det dg/de| - log N(g) - D log MAX_NOISE.
    Flow++ (1902.00275), section 3.1.

    Args:
        channels: Channels of the images.
        height: Height of the images.
        width: Width of the images.
        bins: Number of pixel values, 2^bits.
    """

    def __init__(self, channels: int, height: int, width: int, bins: int):
        super().__init__()
        self.bins = bins
        make_mask = coupling.checkerboard if height * width > 1 else coupling.channelwise
        self.bijection = Chain(
            *(
                coupling.MaskedCoupling(
                    networks.ConvNetwork(2 * channels, VARIATIONAL_WIDTH, 2 * channels),
                    univariate.Affine(),
                    make_mask(channels, height, width, index % 2 == 1),
                )
                for index in range(VARIATIONAL_COUPLINGS)
            )
        )

    def forward(
        self, images: Tensor, dtype: torch.dtype, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        e = self.draw_noise(images, dtype, generator)
        g, log_det = self.bijection(e, self.condition(images, dtype))
        # The constants of the two Gaussians cancel.
        log_q = 0.5 * (g.square() - e.square()).flatten(1).sum(1) - log_det
        return MAX_NOISE * torch.special.ndtr(g), log_q - g[0].numel() * math.log(MAX_NOISE)

    def initialize(self, images: Tensor, dtype: torch.dtype) -> None:
        self.bijection.initialize(self.draw_noise(images, dtype), self.condition(images, dtype))

    def condition(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the images scaled to (-1, 1)."""
        return 2 * (images + 0.5).to(dtype) / self.bins - 1


def make_dequantizer(dequantization: str, image_shape: Sequence[int], bits: int) -> Dequantizer:
    """Return the dequantizer that a configuration names.

    Args:
        dequantization: "uniform", "variational" or "gaussian:STD".
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
    """
    std = gaussian_std(dequantization)
    if std is not None:
        return GaussianDequantizer(std, 2**bits)
    check_choice(("uniform", "variational", "gaussian:0.05"), dequantization=dequantization)
    channels, height, width = image_shape
    return (
        UniformDequantizer()
        if dequantization == "uniform"
        else VariationalDequantizer(channels, height, width, 2**bits)
    )


def gaussian_std(dequantization: object) -> float | None:
    """Return the positive STD of "gaussian:STD", or None for anything else."""
    name, _, number = str(dequantization).partition(":")
    try:
        std = float(number)
    except ValueError:
        return None
    return std if name == "gaussian" and 0 < std < math.inf else None
