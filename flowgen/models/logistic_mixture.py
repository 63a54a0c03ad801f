"""Mixtures of discretized logistics, distributions of the pixel values of an image."""

import copy
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.models.pixel_distribution import UNIFORM_WEIGHT, PixelDistribution, add_uniform

INITIAL_LOG_SCALE = -1.5
MIN_SCALE = math.exp(-1.5)  # in units of the distance of two values; PixelCNN++ has half of it


class LogisticMixture(PixelDistribution):
    """Distribution of the values of each pixel: a mixture of discretized logistics.

    Value k is at v_k = 2k / (K - 1) - 1, where K = 2^bits, and its borders are halfway between the
    values. A component with mean m and scale s gives it the probability

        P(k) = sigmoid((b_k - m) / s) - sigmoid((b_{k-1} - m) / s),  b_k = (2k + 1) / (K - 1) - 1,

    where b_{-1} = -inf and b_{K-1} = inf, so that the probabilities sum to 1. The channels of a
    pixel share the component, and the mean of a channel is a linear function of the channels before
    it: PixelCNN++ (Salimans, Karpathy, Chen and Kingma, 1701.05517), sections 2.1 and 2.2.

    Args:
        parameters: Outputs of a network, (batch, `num_parameters(channels, components)`, height,
            width).
        channels: Channels of the images.
        bits: Bits per pixel value.

    Example:
        >>> parameters = torch.zeros(2, num_parameters(channels=3, components=5), 4, 4)
        >>> mixture = LogisticMixture(parameters, channels=3, bits=2)
        >>> images = mixture.quantile(torch.rand(2, 3, 4, 4))
        >>> images.dtype, mixture.log_prob(images).shape
        (torch.uint8, torch.Size([2, 3, 4, 4]))
    """

    def __init__(self, parameters: Tensor, channels: int, bits: int):
        if parameters.dtype != torch.float64:
            parameters = parameters.float()
        per_component = num_parameters(channels, 1)
        # (1 + 2 C + C (C - 1) / 2, batch, components, height, width)
        parameters = parameters.unflatten(1, (per_component, -1)).transpose(0, 1)
        logits, means, raw_scales, coefficients = parameters.split(
            [1, channels, channels, per_component - 2 * channels - 1]
        )
        self.bins = 2**bits
        min_log_scale = math.log(2 * MIN_SCALE / (self.bins - 1))
        self.log_weights = logits[0].log_softmax(1)
        self.means = means
        self.log_scales = min_log_scale + F.softplus(raw_scales - min_log_scale)
        self.coefficients = coefficients.tanh()

    def double(self) -> "LogisticMixture":
        """Return the same mixture in float64."""
        mixture = copy.copy(self)
        for name in ("log_weights", "means", "log_scales", "coefficients"):
            setattr(mixture, name, getattr(self, name).double())
        mixture.log_weights = mixture.log_weights.log_softmax(1)  # float32 weights sum to 1 + 1e-7
        return mixture

    def log_prob(self, images: Tensor) -> Tensor:
        log_probs = []
        log_weights = self.log_weights
        for channel in range(images.shape[1]):
            joint = log_weights + self._component_log_prob(channel, images)
            log_prob = joint.logsumexp(1)
            # The components of the next channel, given this one
            log_weights = joint - log_prob[:, None]
            log_probs.append(log_prob)
        return add_uniform(torch.stack(log_probs, 1), self.bins)

    def interval(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mixture = self.double()
        bounds = []
        log_weights = mixture.log_weights
        for channel in range(images.shape[1]):
            if channel > 0:
                log_weights = mixture._next_log_weights(channel - 1, log_weights, images)
            means = mixture._conditional_means(channel, images)
            value = images[:, channel].long()
            bounds.append(
                torch.stack(
                    [
                        mixture._cumulative(channel, k, log_weights, means)
                        for k in (value - 1, value)
                    ]
                )
            )
        low, high = torch.stack(bounds, 2)
        return low, high

    def quantile(
        self, u: Tensor, images: Tensor | None = None, unknown: Tensor | None = None
    ) -> Tensor:
        mixture = self.double()
        if images is None:
            images = torch.zeros(u.shape, dtype=torch.uint8, device=u.device)
        log_weights = mixture.log_weights
        for channel in range(u.shape[1]):
            if channel > 0:
                log_weights = mixture._next_log_weights(channel - 1, log_weights, images)
            means = mixture._conditional_means(channel, images)
            value = torch.zeros_like(images[:, channel], dtype=torch.long)
            step = self.bins // 2
            while step:  # bisection: F(value - 1) <= u holds throughout
                below = mixture._cumulative(channel, value + step - 1, log_weights, means)
                value = torch.where(below <= u[:, channel], value + step, value)
                step //= 2
            updated = images.clone()
            updated[:, channel] = value
            images = updated if unknown is None else torch.where(unknown, updated, images)
        return images

    def _next_log_weights(self, channel: int, log_weights: Tensor, images: Tensor) -> Tensor:
        """Return the log-weights of the components after the values of a channel are known.

        Args:
            channel: The channel.
            log_weights: The log-weights given the channels before it, like the result.
            images: Pixel values, (batch, channels, height, width).

        Returns:
            (batch, components, height, width).
        """
        return (log_weights + self._component_log_prob(channel, images)).log_softmax(1)

    def _conditional_means(self, channel: int, images: Tensor) -> Tensor:
        """Return the means of a channel given the channels before it, (batch, components, h, w)."""
        means = self.means[channel]
        first = channel * (channel - 1) // 2
        for previous in range(channel):
            values = scale_values(images[:, previous, None], self.bins, means.dtype)
            means = means + self.coefficients[first + previous] * values
        return means

    def _component_log_prob(self, channel: int, images: Tensor) -> Tensor:
        """Return log P of the values of a channel under each component, (batch, components, h, w).

        sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)) has no cancellation.
        """
        means = self._conditional_means(channel, images)
        inverse_scale = (-self.log_scales[channel]).exp()
        value = images[:, channel, None]
        center = scale_values(value, self.bins, means.dtype) - means
        half = 1 / (self.bins - 1)  # half of the distance between two values
        log_upper = F.logsigmoid((center + half) * inverse_scale)
        log_lower = F.logsigmoid((half - center) * inverse_scale)
        log_width = torch.log(-torch.expm1(-2 * half * inverse_scale))
        is_first = value == 0
        is_last = value == self.bins - 1
        return (
            log_upper.masked_fill(is_last, 0)
            + log_lower.masked_fill(is_first, 0)
            + log_width.masked_fill(is_first | is_last, 0)
        )

    def _cumulative(
        self, channel: int, value: Tensor, log_weights: Tensor, means: Tensor
    ) -> Tensor:
        """Return F(value), (batch, height, width), for values from -1 to K - 1."""
        border = (2 * value[:, None] + 1) / (self.bins - 1) - 1
        components = torch.sigmoid((border - means) * (-self.log_scales[channel]).exp())
        mixture = (log_weights.exp() * components).sum(1)
        uniform = (value + 1) / self.bins
        cumulative = (1 - UNIFORM_WEIGHT) * mixture + UNIFORM_WEIGHT * uniform
        return cumulative.masked_fill(value < 0, 0.0).masked_fill(value >= self.bins - 1, 1.0)


def num_parameters(channels: int, components: int) -> int:
    """Return the number of parameters of a pixel.

    Each component has a weight, and for every channel a mean, a scale, and one coefficient for each
    channel before it.
    """
    return components * (1 + 2 * channels + channels * (channels - 1) // 2)


def initial_parameters(
    values: Tensor, components: int, bits: int, relative_scale: float | None = None
) -> Tensor:
    """Return the parameters of a pixel that describe the marginal distribution of values.

    The means of the components are quantiles of the values of each channel.

    Args:
        values: Pixel values scaled by `scale_values`, or errors of their predictions, (batch,
            channels, height, width).
        components: Number of components.
        bits: Bits per pixel value.
        relative_scale: Scale of a component, in units of the distance between its mean and the
            means next to it. A single component gets the standard deviation of the values. With
            None, all components have the same scale.

    Returns:
        (`num_parameters(channels, components)`,).
    """
    channels = values.shape[1]
    ordered = values.transpose(0, 1).flatten(1).sort(1).values
    order = torch.arange(components, device=values.device) + 0.5
    means = ordered[:, (order / components * ordered.shape[1]).long()]
    raw_scales = torch.full_like(means, INITIAL_LOG_SCALE)
    if relative_scale is not None:
        if components > 1:
            scales = relative_scale * torch.gradient(means, dim=1)[0]
        else:
            scales = math.sqrt(3) / math.pi * ordered.std(1, keepdim=True)
        min_scale = 2 * MIN_SCALE / (2**bits - 1)
        scales = scales.clamp(min=2 * min_scale)
        # The inverse of the softplus in `LogisticMixture`
        raw_scales = math.log(min_scale) + (scales / min_scale - 1).log()
    parameters = torch.zeros(num_parameters(channels, 1), components, device=values.device)
    parameters[1 : channels + 1] = means
    parameters[channels + 1 : 2 * channels + 1] = raw_scales
    return parameters.flatten()


def shift_means(parameters: Tensor, shift: Tensor) -> Tensor:
    """Add a shift to the means of all components.

    Args:
        parameters: Parameters of a mixture, (batch, `num_parameters(channels, components)`, height,
            width).
        shift: Shift of each value, (batch, channels, height, width).

    Returns:
        The new parameters, of the same shape.
    """
    channels = shift.shape[1]
    per_component = num_parameters(channels, 1)
    shift = F.pad(shift, (0, 0, 0, 0, 1, per_component - 1 - channels))
    return (parameters.unflatten(1, (per_component, -1)) + shift[:, :, None]).flatten(1, 2)


def scale_values(images: Tensor, bins: int, dtype: torch.dtype) -> Tensor:
    """Return pixel values scaled to [-1, 1].

    Args:
        images: Pixel values from 0 to bins - 1, of any shape.
        bins: Number of pixel values.
        dtype: Data type of the result.
    """
    return 2 * images.to(dtype) / (bins - 1) - 1
