"""Categorical distributions of the pixel values of an image."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.models.logistic_mixture import UNIFORM_WEIGHT


class Categorical:
    """Distribution of the values of each pixel: a softmax over all values.

    A uniform distribution with a small weight gives every value an interval of the cumulative
    distribution that float64 can represent.

    Args:
        logits: Outputs of a network, (batch, channels * 2^bits, height, width).
        channels: Channels of the images.

    Example:
        >>> distribution = Categorical(torch.zeros(2, 3 * 4, 5, 5), channels=3)
        >>> images = distribution.quantile(torch.rand(2, 3, 5, 5))
        >>> images.dtype, distribution.log_prob(images).shape
        (torch.uint8, torch.Size([2, 3, 5, 5]))
    """

    def __init__(self, logits: Tensor, channels: int):
        if logits.dtype != torch.float64:
            logits = logits.float()
        # (batch, height, width, channels, bins), without a copy in the format channels-last
        self.logits = logits.permute(0, 2, 3, 1).unflatten(3, (channels, -1))
        self.bins = self.logits.shape[-1]

    def log_prob(self, images: Tensor) -> Tensor:
        """Return log P of each value, in nats.

        Args:
            images: Pixel values, (batch, channels, height, width).

        Returns:
            (batch, channels, height, width).
        """
        values = images.permute(0, 2, 3, 1).long()
        log_softmax = -F.cross_entropy(
            self.logits.flatten(0, 3), values.flatten(), reduction="none"
        ).view(values.shape)
        log_prob = torch.logaddexp(
            log_softmax + math.log1p(-UNIFORM_WEIGHT),
            torch.full_like(log_softmax, math.log(UNIFORM_WEIGHT / self.bins)),
        )
        return log_prob.permute(0, 3, 1, 2)

    def interval(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return F(k - 1) and F(k) for each value k, where F(k) = P(value <= k) in float64.

        Args:
            images: Pixel values, (batch, channels, height, width).

        Returns:
            Two tensors like the images.
        """
        borders = F.pad(self._cumulative(), (1, 0))
        values = images.permute(0, 2, 3, 1).long()[..., None]
        low = borders.gather(-1, values)[..., 0]
        high = borders.gather(-1, values + 1)[..., 0]
        return low.permute(0, 3, 1, 2), high.permute(0, 3, 1, 2)

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
        positions = u.double().permute(0, 2, 3, 1)[..., None].contiguous()
        values = torch.searchsorted(self._cumulative(), positions, right=True)[..., 0]
        values = values.clamp(max=self.bins - 1).permute(0, 3, 1, 2).to(torch.uint8)
        return values if images is None or unknown is None else torch.where(unknown, values, images)

    def _cumulative(self) -> Tensor:
        """Return F(k) of all values k in float64, (batch, height, width, channels, bins)."""
        probabilities = self.logits.double().softmax(-1)
        cumulative = torch.lerp(
            probabilities, torch.full_like(probabilities, 1 / self.bins), UNIFORM_WEIGHT
        ).cumsum(-1)
        cumulative[..., -1] = 1.0  # without a rounding error
        return cumulative


def initial_logits(images: Tensor, bits: int) -> Tensor:
    """Return the logits (channels * 2^bits,) of the frequencies of the pixel values.

    Args:
        images: (batch, channels, height, width).
        bits: Bits per pixel value.
    """
    values = images.transpose(0, 1).flatten(1).long()
    counts = torch.stack([torch.bincount(channel, minlength=2**bits) for channel in values])
    return (counts + 1.0).log().flatten()  # one more of each value, so that none is impossible
