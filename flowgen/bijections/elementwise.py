"""Bijections that act on each value separately."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.base import Bijection, compose

# |x| beyond which `LogisticToNormal` extrapolates. In float32, exp(-x) underflows soon after it.
TAIL_START = 80.0


class Logit(Bijection):
    """z = logit(alpha + (1 - 2 alpha) x) for x in [0, 1].

    log|dz/dx| = softplus(z) + softplus(-z) + log(1 - 2 alpha), summed over the values. `alpha`
    keeps z finite at x = 0 and x = 1. MAF (1705.07057). Real NVP (1605.08803), section 4.1, has
    1 - alpha in place of 1 - 2 alpha, where z is infinite at x = 1.

    Example:
        >>> bijection = Logit(alpha=0.05)
        >>> z, log_det = bijection(torch.tensor([[0.0, 0.5, 1.0]]))
        >>> z
        tensor([[-2.9444,  0.0000,  2.9444]])
        >>> bijection.inverse(z)[0].round(decimals=4)
        tensor([[0.0000, 0.5000, 1.0000]])
    """

    def __init__(self, alpha: float = 0.05):
        super().__init__()
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha must be between 0 and 0.5, not {alpha!r}")
        self.alpha = alpha

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = torch.logit(self.alpha + (1 - 2 * self.alpha) * x)
        return z, self._log_det(z)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (torch.sigmoid(z) - self.alpha) / (1 - 2 * self.alpha), -self._log_det(z)

    def _log_det(self, z: Tensor) -> Tensor:
        return (F.softplus(z) + F.softplus(-z) + math.log(1 - 2 * self.alpha)).flatten(1).sum(1)


class EmpiricalCDF(Bijection):
    """The piecewise linear CDF of a histogram of each channel, for x in [0, 1).

    The output is approximately uniform. If k is the bin of x and p_k is the probability of bin k,
    then z = sum(p_i for i < k) + (bins x - k) p_k, and log|dz/dx| = log(bins p_k).
    `init_from_data` estimates the histogram from a batch and mixes it with the uniform
    distribution, with a weight of `uniform_weight`, so that bins without data have a positive
    probability.

    Args:
        channels: Channels of the images.
        bins: Bins of the histogram, usually the number of pixel values.

    Example:
        >>> bijection = EmpiricalCDF(channels=1, bins=2)
        >>> x = torch.tensor([[0.1], [0.2], [0.3], [0.9]])
        >>> z = bijection.initialize(x)
        >>> bijection.share  # 0.9 * [3/4, 1/4] + 0.1 * [1/2, 1/2]
        tensor([[0.7250, 0.2750]])
        >>> torch.allclose(bijection.inverse(z)[0], x)
        True
    """

    uniform_weight = 0.1

    def __init__(self, channels: int, bins: int):
        super().__init__()
        self.bins = bins
        self.share = nn.Buffer(torch.full((channels, bins), 1 / bins))  # probability of each bin

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        index = self._bin_index(x)
        probability, cumulative, log_det = self._look_up(index)
        return cumulative + (x * self.bins - index) * probability, log_det

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        values = z.transpose(0, 1).contiguous()
        index = torch.searchsorted(self.share.cumsum(1), values.flatten(1), right=True)
        index = index.clamp(max=self.bins - 1).view(values.shape).transpose(0, 1)
        probability, cumulative, log_det = self._look_up(index)
        return (index + (z - cumulative) / probability) / self.bins, -log_det

    def init_from_data(self, x: Tensor, condition: Tensor | None = None) -> None:
        index = self._bin_index(x).transpose(0, 1).flatten(1)
        counts = [torch.bincount(channel, minlength=self.bins) for channel in index]
        histogram = torch.stack(counts).to(self.share)
        observed = histogram / histogram.sum(1, keepdim=True)
        self.share.copy_((1 - self.uniform_weight) * observed + self.uniform_weight / self.bins)

    def _bin_index(self, x: Tensor) -> Tensor:
        return (x * self.bins).floor().clamp(0, self.bins - 1).long()

    def _look_up(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the probability of each bin, the sum over lower bins, and the log-det."""
        shape = (-1, *[1] * (index.dim() - 2))
        channel = torch.arange(len(self.share), device=index.device).view(shape)
        cumulative = self.share.cumsum(1) - self.share
        probability = self.share[channel, index]
        log_det = (probability * self.bins).log().flatten(1).sum(1)
        return probability, cumulative[channel, index], log_det


class MarginalGaussianization(Bijection):
    """`EmpiricalCDF` followed by `Logit` if this saves more than one bit per value, else identity.

    It also stays the identity if the first images have too few values for a histogram.

    Images of digits are mostly black, so the entropy of a pixel is far below its number of bits.
    After this bijection, a flow of such images does not need to learn to stretch one pixel value
    over most of the real line. Images of faces use all pixel values and stay unchanged. Laparra et
    al., Iterative Gaussianization (1602.00229), section II.

    Args:
        channels: Channels of the images.
        bins: Number of pixel values.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bijection = MarginalGaussianization(channels=1, bins=32)
        >>> dark = torch.rand(64, 1, 8, 8) / 32  # all in the first bin
        >>> z = bijection.initialize(dark)
        >>> bool(bijection.active)
        True
        >>> torch.allclose(bijection.inverse(z)[0], dark, atol=1e-5)
        True
    """

    min_saved_bits = 1.0  # per value
    min_values_per_bin = 16  # fewer would fit the noise of the histogram

    def __init__(self, channels: int, bins: int):
        super().__init__()
        self.equalize = EmpiricalCDF(channels, bins)
        self.logit = Logit(1e-3)
        self.active = nn.Buffer(torch.tensor(False))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = compose((self.equalize, self.logit), x)
        return torch.where(self.active, z, x), torch.where(self.active, log_det, 0.0)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = compose((self.logit.inverse, self.equalize.inverse), z)
        return torch.where(self.active, x, z), torch.where(self.active, log_det, 0.0)

    def init_from_data(self, x: Tensor, condition: Tensor | None = None) -> None:
        self.equalize.init_from_data(x)
        saved_bits = self.equalize(x)[1].mean() / (x[0].numel() * math.log(2))
        has_enough_data = x[:, 0].numel() >= self.min_values_per_bin * self.equalize.bins
        self.active.copy_((saved_bits > self.min_saved_bits) & has_enough_data)


class Standardize(Bijection):
    """z = (x - mean) exp(-log_deviation) for each of the `dim` values of a vector.

    log|det| = -sum(log_deviation), where log_deviation is the logarithm of the standard deviation.
    As the last bijection of a flow, it is a Gaussian base distribution with learned moments.
    `init_from_data` sets the moments to those of a batch.

    Args:
        dim: Values per vector; x and z have shape (batch, dim).
        learned: Whether the moments are parameters or fixed buffers.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bijection = Standardize(3)
        >>> x = 5 + 2 * torch.randn(100, 3)
        >>> z = bijection.initialize(x)
        >>> bool(z.mean(0).abs().max() < 1e-5)
        True
        >>> torch.allclose(bijection.inverse(z)[0], x, atol=1e-5)
        True
    """

    supports_reversible = True

    def __init__(self, dim: int, learned: bool = True):
        super().__init__()
        make = nn.Parameter if learned else nn.Buffer
        self.mean = make(torch.zeros(dim))
        self.log_deviation = make(torch.zeros(dim))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = (x - self.mean) * (-self.log_deviation).exp()
        return z, -self.log_deviation.sum().expand(len(x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = torch.addcmul(self.mean, z, self.log_deviation.exp())
        return x, self.log_deviation.sum().expand(len(z))

    def init_from_data(self, x: Tensor, condition: Tensor | None = None) -> None:
        std, mean = torch.std_mean(x, dim=0, correction=0)
        self.mean.copy_(mean)
        # One batch is a poor estimate of the variance of values that rarely change.
        self.log_deviation.copy_(std.clamp(min=0.1 * std.mean() + 1e-6).log())


class LogisticToNormal(Bijection):
    """z = Phi^-1(sigmoid(x)), which turns a standard normal base into a standard logistic base.

    log|dz/dx| = log sigmoid(x) + log sigmoid(-x) + z^2 / 2 + log(2 pi) / 2, summed over the
    values. Both directions use the lower tail, where floats are accurate. The quantile function
    underflows for |x| > `TAIL_START`. There, z follows the tail of the normal distribution:
    |z| = sqrt(edge^2 + 2 (|x| - TAIL_START)), where edge is |z| at |x| = `TAIL_START`. NICE
    (1410.8516), section 3.4.

    Example:
        >>> bijection = LogisticToNormal()
        >>> x = torch.tensor([[-100.0, 0.0, 1.0]])
        >>> z, log_det = bijection(x)
        >>> torch.allclose(bijection.inverse(z)[0], x, atol=1e-4)
        True
    """

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        sign = torch.where(x < 0, -1.0, 1.0)
        distance = x * sign  # unlike that of abs(), its derivative at 0 is not 0
        center = self._quantile(distance.clamp(max=TAIL_START))
        edge = self._quantile(x.new_tensor(TAIL_START))
        tail = (edge.square() + 2 * (distance - TAIL_START).clamp(min=0)).sqrt()
        z = torch.where(distance < TAIL_START, center, tail) * sign
        return z, self._log_det(x, z)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        edge = self._quantile(z.new_tensor(TAIL_START))
        clamped = z.clamp(-edge, edge)
        center = torch.special.log_ndtr(clamped) - torch.special.log_ndtr(-clamped)
        tail = (TAIL_START + (z.square() - edge.square()) / 2) * z.sign()
        x = torch.where(z.abs() < edge, center, tail)
        return x, -self._log_det(x, z)

    @staticmethod
    def _quantile(distance: Tensor) -> Tensor:
        return -torch.special.ndtri(torch.sigmoid(-distance))

    @staticmethod
    def _log_det(x: Tensor, z: Tensor) -> Tensor:
        center = F.logsigmoid(x) + F.logsigmoid(-x) + 0.5 * (z.square() + math.log(2 * math.pi))
        tail = -z.abs().clamp(min=1).log()
        return torch.where(x.abs() < TAIL_START, center, tail).flatten(1).sum(1)
