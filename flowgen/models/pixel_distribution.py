"""The interface of the distributions of pixel values."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

# Weight of a uniform distribution, so that every value has an interval of the cumulative
# distribution that float64 can represent. It costs 1e-6 nats per value.
UNIFORM_WEIGHT = 1e-6


class PixelDistribution(ABC):
    """Distribution of each pixel value given the channels before it in the same pixel.

    It has a uniform component of weight `UNIFORM_WEIGHT`, so that no value is impossible.
    """

    @abstractmethod
    def log_prob(self, images: Tensor) -> Tensor:
        """Return log P of each value given the channels before it, in nats.

        Args:
            images: Pixel values, (batch, channels, height, width).

        Returns:
            (batch, channels, height, width).
        """

    @abstractmethod
    def interval(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return F(k - 1) and F(k) for each value k, where F(k) = P(value <= k) in float64.

        Args:
            images: Pixel values, (batch, channels, height, width).

        Returns:
            Two tensors like the images.
        """

    @abstractmethod
    def quantile(
        self, u: Tensor, images: Tensor | None = None, unknown: Tensor | None = None
    ) -> Tensor:
        """Return the smallest values k with F(k) > u, the inverse of `interval`.

        Values at uniform random numbers u are samples.

        Args:
            u: Numbers in [0, 1), (batch, channels, height, width).
            images: Images whose unknown values are replaced; None replaces all values.
            unknown: Mask of the unknown values, of the shape of the images; None replaces all.

        Returns:
            Pixel values like u, uint8.
        """


def add_uniform(log_prob: Tensor, bins: int) -> Tensor:
    """Return log((1 - w) P + w / bins) for log P in nats, where w = `UNIFORM_WEIGHT`."""
    log_uniform = torch.full_like(log_prob, math.log(UNIFORM_WEIGHT / bins))
    return torch.logaddexp(log_prob + math.log1p(-UNIFORM_WEIGHT), log_uniform)
