"""Univariate transforms, which are increasing functions with parameters from a network."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_ROOT_STEPS = 64  # of `find_root`; 64 bisections reach the rounding error


class Transform(ABC):
    """Base class of elementwise transforms y = h(x; params) with h' > 0.

    x has shape (batch, channels, ...) and params has shape (batch, num_params * channels, ...). The
    first `channels` channels of params are the first parameter of all values, and so on.

    Attributes:
        num_params: Parameters per value.
        supports_reversible: Whether the backward pass can recover x from y, because the inverse is
            cheap and accurate.
    """

    num_params: int
    supports_reversible = False

    @abstractmethod
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return h(x) and log h'(x), each with the shape of x."""

    @abstractmethod
    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return the solution x of h(x) = y, and -log h'(x)."""

    def split_params(self, params: Tensor) -> Tensor:
        """Reshape (batch, num_params * channels, ...) to (num_params, batch, channels, ...)."""
        return params.unflatten(1, (self.num_params, -1)).transpose(0, 1)


def bounded_log_scale(raw: Tensor) -> Tensor:
    """Return (4 / pi) atan(raw / 2), which is between -2 and 2 and saturates slowly."""
    return (4 / math.pi) * torch.atan(raw / 2)


def sigmoid_log_scale(raw: Tensor) -> Tensor:
    """Return log sigmoid(raw + 2), as in the code of Glow. The scale is below 1."""
    return F.logsigmoid(raw + 2)


def tanh_log_scale(raw: Tensor) -> Tensor:
    """Return 2 tanh(raw / 2), which is between -2 and 2."""
    return 2 * torch.tanh(raw / 2)


LOG_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "bounded": bounded_log_scale,
    "sigmoid": sigmoid_log_scale,
    "tanh": tanh_log_scale,
    "plain": nn.Identity(),  # for networks that bound the log-scale themselves
}


class Additive(Transform):
    """y = x + shift. NICE (1410.8516), section 3.2.

    Example:
        >>> Additive().forward(torch.tensor([[1.0]]), torch.tensor([[0.5]]))
        (tensor([[1.5000]]), tensor([[0.]]))
    """

    num_params = 1
    supports_reversible = True

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return x + params, torch.zeros_like(x)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return y - params, torch.zeros_like(y)


class Scale(Transform):
    """y = exp(log_scale) x. NICE (1410.8516), section 3.2.

    Args:
        log_scale: Function from the raw parameter to the log-scale, by its name in `LOG_SCALES`.

    Example:
        >>> Scale("plain").forward(torch.tensor([[2.0]]), torch.tensor([[1.0]]))
        (tensor([[5.4366]]), tensor([[1.]]))
    """

    num_params = 1
    supports_reversible = True

    def __init__(self, log_scale: str = "bounded"):
        self.log_scale = LOG_SCALES[log_scale]

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale(params)
        return x * log_scale.exp(), log_scale

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale(params)
        return y * (-log_scale).exp(), -log_scale


class Affine(Scale):
    """y = exp(log_scale) x + shift. Real NVP (1605.08803), equation 4.

    Args:
        log_scale: Function of the first raw parameter in `LOG_SCALES`, which returns the log-scale.

    Example:
        >>> Affine("plain").forward(torch.tensor([[2.0]]), torch.tensor([[0.0, 0.5]]))
        (tensor([[2.5000]]), tensor([[0.]]))
    """

    num_params = 2

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.parse(params)
        return torch.addcmul(shift, x, log_scale.exp()), log_scale

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.parse(params)
        return (y - shift) * (-log_scale).exp(), -log_scale

    def parse(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-scale and shift, each with the shape of x."""
        raw, shift = params.chunk(2, dim=1)
        return self.log_scale(raw), shift


class MixtureOfLogistics(Transform):
    """y = exp(log_scale) logit(sum_k w_k sigmoid((x - mean_k) / s_k)) + shift.

    The inverse is a root between the smallest and the largest solution for a single component.
    Flow++ (1902.00275), section 3.2.

    Args:
        num_components: Number of logistic distributions in the mixture.
        log_scale: Function of the first raw parameter in `LOG_SCALES`, which returns the log-scale.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> transform = MixtureOfLogistics(num_components=4)
        >>> x = torch.randn(5, 1)
        >>> params = torch.randn(5, transform.num_params)
        >>> y, log_slope = transform.forward(x, params)
        >>> torch.allclose(transform.inverse(y, params)[0], x, atol=1e-4)
        True
    """

    def __init__(self, num_components: int = 4, log_scale: str = "bounded"):
        self.num_components = num_components
        self.log_scale = LOG_SCALES[log_scale]
        self.num_params = 2 + 3 * num_components

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift, *mixture = self._parse(params)
        log_odds, log_slope = self._log_odds(x, *mixture)
        return torch.addcmul(shift, log_odds, log_scale.exp()), log_slope + log_scale

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift, *mixture = self._parse(params)
        target = (y - shift) * (-log_scale).exp()
        _, means, log_scales = mixture
        solutions = means + log_scales.exp() * target
        x = find_root(
            lambda x: self._log_odds(x, *mixture), target, solutions.amin(0), solutions.amax(0)
        )
        return x, -(self._log_odds(x, *mixture)[1] + log_scale)

    def _parse(self, params: Tensor) -> tuple[Tensor, ...]:
        """Return log-scale, shift, and the parameters of the components, see `_log_odds`."""
        count = self.num_components
        raw, shift, logits, means, log_scales = self.split_params(params).split(
            (1, 1, count, count, count)
        )
        # The initial means are distinct, because equal components would stay equal.
        spread = torch.linspace(-1, 1, count, device=means.device, dtype=means.dtype)
        means = means + spread.view(-1, *[1] * (means.dim() - 1))
        return (
            self.log_scale(raw[0]),
            shift[0],
            logits.log_softmax(0),
            means,
            bounded_log_scale(log_scales),
        )

    @staticmethod
    def _log_odds(
        x: Tensor, log_weights: Tensor, means: Tensor, log_scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the logit of the CDF of the mixture at x, and the logarithm of its slope.

        Args:
            x: Values of shape (batch, channels, ...).
            log_weights: Logarithms of the weights, of shape (components, batch, channels, ...).
            means: Means of the components, with the same shape.
            log_scales: Logarithms of the scales s_k, with the same shape.
        """
        standardized = (x - means) * (-log_scales).exp()
        log_cdfs = F.logsigmoid(standardized)
        log_survivals = F.logsigmoid(-standardized)
        log_densities = log_cdfs + log_survivals - log_scales
        terms = log_weights + torch.stack((log_cdfs, log_survivals, log_densities))
        log_cdf, log_survival, log_density = terms.logsumexp(1)
        return log_cdf - log_survival, log_density - log_cdf - log_survival


class Spline(Transform):
    """A monotone rational-quadratic spline on [-bound, bound], and the identity outside.

    Parameters of zero give the identity. Neural Spline Flows (1906.04032), section 3.1.

    Args:
        bins: Number of intervals between knots.
        bound: End of the interval on which the spline differs from the identity.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> transform = Spline(bins=8)
        >>> x = torch.randn(5, 1)
        >>> params = torch.randn(5, transform.num_params)
        >>> y, log_slope = transform.forward(x, params)
        >>> torch.allclose(transform.inverse(y, params)[0], x, atol=1e-4)
        True
    """

    minimum = 1e-3  # of a bin's width and height, relative to their sums, and of a knot's slope

    def __init__(self, bins: int = 8, bound: float = 4.0):
        self.bins = bins
        self.bound = bound
        self.num_params = 3 * bins - 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        left, width, bottom, height, left_slope, right_slope = self._bin(x, params, inverse=False)
        t = ((x - left) / width).clamp(0, 1)
        slope = height / width
        denominator = slope + (left_slope + right_slope - 2 * slope) * t * (1 - t)
        y = bottom + height * (slope * t.square() + left_slope * t * (1 - t)) / denominator
        log_slope = self._log_slope(t, slope, left_slope, right_slope, denominator)
        inside = x.abs() < self.bound
        return torch.where(inside, y, x), torch.where(inside, log_slope, 0.0)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        left, width, bottom, height, left_slope, right_slope = self._bin(y, params, inverse=True)
        slope = height / width
        rise = (y - bottom).clamp(min=0)
        curvature = left_slope + right_slope - 2 * slope
        # The root of a quadratic equation (6 to 8 in the paper) in a form without cancellation.
        a = height * (slope - left_slope) + rise * curvature
        b = height * left_slope - rise * curvature
        discriminant = (b.square() + 4 * a * slope * rise).clamp(min=0)
        t = (2 * slope * rise / (b + discriminant.sqrt())).clamp(0, 1)
        x = left + t * width
        denominator = slope + curvature * t * (1 - t)
        log_slope = self._log_slope(t, slope, left_slope, right_slope, denominator)
        inside = y.abs() < self.bound
        return torch.where(inside, x, y), torch.where(inside, -log_slope, 0.0)

    @staticmethod
    def _log_slope(
        t: Tensor, slope: Tensor, left_slope: Tensor, right_slope: Tensor, denominator: Tensor
    ) -> Tensor:
        """Return the logarithm of the slope at position t in [0, 1] of a bin."""
        numerator = (
            right_slope * t.square() + 2 * slope * t * (1 - t) + left_slope * (1 - t).square()
        )
        return 2 * slope.log() + numerator.log() - 2 * denominator.log()

    def _bin(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, ...]:
        """Return left edge, width, bottom, height and both end slopes of the bin of each value.

        Args:
            x: Positions, or with `inverse` values of the spline, of shape (batch, channels, ...).
            params: Parameters of the spline.
            inverse: Whether to search for the bin by its bottom and top.
        """
        widths, heights, slopes = self.split_params(params).split(
            (self.bins, self.bins, self.bins - 1)
        )
        slopes = self.minimum + F.softplus(slopes + math.log(math.expm1(1 - self.minimum)))
        one = torch.ones_like(slopes[:1])
        # Positions, values and slopes at the knots, each of shape (bins + 1, batch, channels, ...).
        tables = (self._edges(widths), self._edges(heights), torch.cat((one, slopes, one)))
        edges = tables[1] if inverse else tables[0]
        index = (x >= edges[1:-1]).sum(0, keepdim=True)
        left, bottom, left_slope = (table.gather(0, index)[0] for table in tables)
        right, top, right_slope = (table.gather(0, index + 1)[0] for table in tables)
        return left, right - left, bottom, top - bottom, left_slope, right_slope

    def _edges(self, raw: Tensor) -> Tensor:
        """Return increasing values from -bound to bound."""
        fractions = self.minimum + (1 - self.minimum * self.bins) * raw.softmax(0)
        inner = 2 * self.bound * fractions.cumsum(0)[:-1] - self.bound
        end = torch.full_like(inner[:1], self.bound)
        return torch.cat((-end, inner, end))


class GuidedAffine(Affine):
    """Classifier-free guidance of an affine transform.

    An affine transform models x as a Gaussian. The first half of the batch has the parameters of
    the Gaussian N_c given a class, and the second half those of the Gaussian N_u without a class.
    This transform belongs to the Gaussian proportional to N_c^(1 + weight) / N_u^weight, and is the
    same for both halves.

    Let std_c and std_u be the standard deviations,
    s = min((std_c / std_u)^2, 1), and n = 1 + weight - weight s. The guided Gaussian
    has the standard deviation std_c / sqrt(n) and the mean
    ((1 + weight) mean_c - weight s mean_u) / n. The bound of 1 keeps the product normalizable.
    STARFlow (2506.06276), section 3.4.

    Args:
        affine: Transform to guide.
        weight: Guidance weight, 0 for the transform given the class.

    Example:
        >>> params = torch.tensor([[0.0, -1.0], [0.0, 0.0]])  # means 1 and 0
        >>> GuidedAffine(Affine(), weight=2.0).inverse(torch.zeros(2, 1), params)[0]
        tensor([[3.],
                [3.]])
    """

    def __init__(self, affine: Affine, weight: float):
        # `parse` replaces the log-scale of Affine by that of `affine`.
        self.affine = affine
        self.weight = weight

    def parse(self, params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.affine.parse(params)
        # x has the standard deviation exp(-log_scale) and the mean -shift exp(-log_scale).
        class_log_scale, free_log_scale = log_scale.chunk(2)
        class_mean, free_mean = (-shift * (-log_scale).exp()).chunk(2)
        ratio = (2 * (free_log_scale - class_log_scale)).exp().clamp(max=1)
        precision = 1 + self.weight - self.weight * ratio
        mean = ((1 + self.weight) * class_mean - self.weight * ratio * free_mean) / precision
        log_scale = class_log_scale + precision.log() / 2
        shift = -mean * log_scale.exp()
        return torch.cat((log_scale, log_scale)), torch.cat((shift, shift))


# Constructors by name; the argument is the name of a function in LOG_SCALES.
TRANSFORMS: dict[str, Callable[[str], Transform]] = {
    "additive": lambda log_scale: Additive(),
    "multiplicative": Scale,
    "affine": Affine,
    "spline": lambda log_scale: Spline(),
    "mixture": lambda log_scale: MixtureOfLogistics(log_scale=log_scale),
}


def find_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], target: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """Return the solution x of function(x) = target between `low` and `high`, elementwise.

    A step is a Newton step if its result stays inside the bounds and it is at most half as long as
    the previous step. Otherwise it is a bisection. The result is differentiable in `target` and in
    the parameters of `function`, by the implicit function theorem.

    Args:
        function: Increasing function that returns its value and the logarithm of its slope.
        target: Values of the function at the roots.
        low: Lower bounds of the roots.
        high: Upper bounds of the roots.

    Example:
        >>> double = lambda x: (2 * x, torch.full_like(x, math.log(2)))
        >>> find_root(double, torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([8.0]))
        tensor([1.5000])
    """
    rounding = 2 * torch.finfo(low.dtype).eps
    with torch.no_grad():
        x = (low + high) / 2
        last_step = high - low
        for _ in range(MAX_ROOT_STEPS):
            value, log_slope = function(x)
            error = target - value
            low = torch.where(error < 0, low, x)
            high = torch.where(error < 0, x, high)
            step = error * (-log_slope).exp()
            converged = (step.abs() <= rounding * x.abs().clamp(min=1)) | (
                error.abs() <= rounding * target.abs().clamp(min=1)
            )
            if converged.all():
                break
            use_newton = (x + step > low) & (x + step < high) & (step.abs() <= last_step / 2)
            next_x = torch.where(use_newton, x + step, (low + high) / 2)
            next_x = torch.where(converged, x, next_x)
            last_step = (next_x - x).abs()
            x = next_x
    if not torch.is_grad_enabled():
        return x
    value, log_slope = function(x)
    slope = log_slope.detach().exp().clamp(min=torch.finfo(x.dtype).tiny)
    step = (target - value) / slope
    return x + (step - step.detach())  # adds zero, with the gradient of one more Newton step
