"""Categorical distributions of pixel values, and draws from logits."""

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.models.pixel_distribution import UNIFORM_WEIGHT, PixelDistribution, add_uniform


class Categorical(PixelDistribution):
    """Distribution of the values of each pixel: a softmax over all values.

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
        values = images.permute(0, 2, 3, 1).long()
        log_softmax = -F.cross_entropy(
            self.logits.flatten(0, 3), values.flatten(), reduction="none"
        ).view(values.shape)
        return add_uniform(log_softmax, self.bins).permute(0, 3, 1, 2)

    def interval(self, images: Tensor) -> tuple[Tensor, Tensor]:
        borders = F.pad(self._cumulative(), (1, 0))
        values = images.permute(0, 2, 3, 1).long()[..., None]
        low = borders.gather(-1, values)[..., 0]
        high = borders.gather(-1, values + 1)[..., 0]
        return low.permute(0, 3, 1, 2), high.permute(0, 3, 1, 2)

    def quantile(
        self, u: Tensor, images: Tensor | None = None, unknown: Tensor | None = None
    ) -> Tensor:
        positions = u.double().permute(0, 2, 3, 1)[..., None].contiguous()
        values = torch.searchsorted(self._cumulative(), positions, right=True)[..., 0]
        values = values.clamp(max=self.bins - 1).permute(0, 3, 1, 2).to(torch.uint8)
        return values if images is None or unknown is None else torch.where(unknown, values, images)

    def _cumulative(self) -> Tensor:
        """Return F(k) of all values k in float64, (batch, height, width, channels, bins)."""
        probabilities = self.logits.softmax(-1, dtype=torch.float64)
        probabilities.mul_(1 - UNIFORM_WEIGHT).add_(UNIFORM_WEIGHT / self.bins)
        cumulative = probabilities.cumsum_(-1)
        cumulative[..., -1] = 1.0  # without a rounding error
        return cumulative


def draw_values(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Draw values k with probability proportional to exp(logits_k / temperature).

    This is the Gumbel-max trick: logits_k - temperature * log(noise_k) is largest at such a k, if
    the noise is exponential. At temperature 0, k has the largest logit.

    Args:
        logits: (..., values).
        temperature: Factor of the noise.
        generator: Random generator, or None for the global one.

    Returns:
        Indices of the values, (...).
    """
    noise = torch.empty_like(logits).exponential_(generator=generator)
    noise.clamp_(min=torch.finfo(logits.dtype).tiny)  # log 0 times temperature 0 is not a number
    return (logits - temperature * noise.log()).argmax(-1)


def initial_logits(images: Tensor, bits: int) -> Tensor:
    """Return the logits (channels * 2^bits,) of the frequencies of the pixel values.

    Args:
        images: (batch, channels, height, width).
        bits: Bits per pixel value.
    """
    return count_values(images, bits).log().flatten()


def count_values(images: Tensor, bits: int) -> Tensor:
    """Return one more than the number of pixels with each value, (channels, 2^bits).

    No count is 0, so that no value is impossible.

    Args:
        images: (batch, channels, height, width).
        bits: Bits per pixel value.
    """
    values = images.transpose(0, 1).flatten(1).long()
    return torch.stack([channel.bincount(minlength=2**bits) for channel in values]) + 1
