"""Univariate transforms: increasing functions of one value whose parameters a network computes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_ROOT_STEPS = 64  # of `find_root`; as many bisections reach the rounding error


class Transform(ABC):
    """Base class of elementwise transforms y = h(x; params) with h' > 0.

    x is (batch, channels, ...) and params is (batch, num_params * channels, ...), whose first
    `channels` channels are the first parameter of every value, and so on.

    Attributes:
        num_params: Parameters per value.
        supports_reversible: Whether the inverse is cheap, and accurate enough to differentiate at.
    """

    num_params: int
    supports_reversible = False

    @abstractmethod
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return h(x) and log h'(x), both in the shape of x."""

    @abstractmethod
    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return the x with h(x) = y, and -log h'(x)."""

    def split_params(self, params: Tensor) -> Tensor:
        """Reshape (batch, num_params * channels, ...) to (num_params, batch, channels, ...)."""
        return params.unflatten(1, (self.num_params, -1)).transpose(0, 1)


def bounded(raw: Tensor) -> Tensor:
    """Return (4 / pi) atan(raw / 2), which is between -2 and 2 and nowhere flat."""
    return (4 / math.pi) * torch.atan(raw / 2)


def _sigmoid(raw: Tensor) -> Tensor:
    """Return log sigmoid(raw + 2), as in Glow's code. The scale is below 1."""
    return F.logsigmoid(raw + 2)


def _tanh(raw: Tensor) -> Tensor:
    """Return 2 tanh(raw / 2), which is between -2 and 2."""
    return 2 * torch.tanh(raw / 2)


LOG_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "bounded": bounded,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "plain": nn.Identity(),  # for networks that bound it themselves
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
        scale: Function in `LOG_SCALES` that maps the raw parameter to the log-scale.

    Example:
        >>> Scale("plain").forward(torch.tensor([[2.0]]), torch.tensor([[1.0]]))
        (tensor([[5.4366]]), tensor([[1.]]))
    """

    num_params = 1
    supports_reversible = True

    def __init__(self, scale: str = "bounded"):
        self.log_scale = LOG_SCALES[scale]

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale(params)
        return x * log_scale.exp(), log_scale

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale(params)
        return y * (-log_scale).exp(), -log_scale


class Affine(Transform):
    """y = exp(log_scale) x + shift. Real NVP (1605.08803), equation 4.

    Args:
        scale: Function in `LOG_SCALES` that maps the first raw parameter to the log-scale.

    Example:
        >>> Affine("plain").forward(torch.tensor([[2.0]]), torch.tensor([[0.0, 0.5]]))
        (tensor([[2.5000]]), tensor([[0.]]))
    """

    num_params = 2
    supports_reversible = True

    def __init__(self, scale: str = "bounded"):
        self.log_scale = LOG_SCALES[scale]

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.parse(params)
        return torch.addcmul(shift, x, log_scale.exp()), log_scale

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.parse(params)
        return (y - shift) * (-log_scale).exp(), -log_scale

    def parse(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-scale and shift, both in the shape of x."""
        raw, shift = params.chunk(2, dim=1)
        return self.log_scale(raw), shift


class MixtureOfLogistics(Transform):
    """y = exp(log_scale) logit(sum_k w_k sigmoid((x - mean_k) / s_k)) + shift.

    The inverse is a root between the smallest and the largest of the components' solutions.
    Flow++ (1902.00275), section 3.2.

    Args:
        num_components: Logistic distributions in the mixture.
        scale: Function in `LOG_SCALES` that maps the first raw parameter to the log-scale.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> transform = MixtureOfLogistics(num_components=4)
        >>> x = torch.randn(5, 1)
        >>> params = torch.randn(5, transform.num_params)
        >>> y, log_slope = transform.forward(x, params)
        >>> torch.allclose(transform.inverse(y, params)[0], x, atol=1e-4)
        True
    """

    def __init__(self, num_components: int = 4, scale: str = "bounded"):
        self.num_components = num_components
        self.log_scale = LOG_SCALES[scale]
        self.num_params = 2 + 3 * num_components

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift, mixture = self._parse(params)
        log_odds, log_slope = self._log_odds(x, *mixture)
        return torch.addcmul(shift, log_odds, log_scale.exp()), log_slope + log_scale

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift, mixture = self._parse(params)
        target = (y - shift) * (-log_scale).exp()
        _, means, log_deviations = mixture
        solutions = means + log_deviations.exp() * target
        x = find_root(
            lambda x: self._log_odds(x, *mixture), target, solutions.amin(0), solutions.amax(0)
        )
        return x, -(self._log_odds(x, *mixture)[1] + log_scale)

    def _parse(self, params: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return log-scale, shift, and the components' log-weights, means and log-deviations."""
        count = self.num_components
        raw, shift, logits, means, log_deviations = self.split_params(params).split(
            (1, 1, count, count, count)
        )
        # Distinct initial means, because equal components would stay equal.
        spread = torch.linspace(-1, 1, count, device=means.device, dtype=means.dtype)
        means = means + spread.view(-1, *[1] * (means.dim() - 1))
        mixture = (logits.log_softmax(0), means, bounded(log_deviations))
        return self.log_scale(raw[0]), shift[0], mixture

    @staticmethod
    def _log_odds(
        x: Tensor, log_weights: Tensor, means: Tensor, log_deviations: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the logit of the mixture's CDF at x, and the log of its slope."""
        standardized = (x - means) * (-log_deviations).exp()
        log_cdfs = F.logsigmoid(standardized)
        log_survivals = F.logsigmoid(-standardized)
        log_cdf = (log_weights + log_cdfs).logsumexp(0)
        log_survival = (log_weights + log_survivals).logsumexp(0)
        log_density = (log_weights + log_cdfs + log_survivals - log_deviations).logsumexp(0)
        return log_cdf - log_survival, log_density - log_cdf - log_survival


class Spline(Transform):
    """A monotone rational-quadratic spline on [-bound, bound], and the identity outside.

    Parameters of zero give the identity. Neural Spline Flows (1906.04032), section 3.1.

    Args:
        bins: Intervals between knots.
        bound: End of the interval on which the spline is defined.

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
        knots, values, slopes = self._knots(params)
        inside = x.abs() < self.bound
        left, width, bottom, height, left_slope, right_slope = self._bin(
            x, knots, knots, values, slopes
        )
        t = ((x - left) / width).clamp(0, 1)
        slope = height / width
        denominator = slope + (left_slope + right_slope - 2 * slope) * t * (1 - t)
        rise = slope * t.square() + left_slope * t * (1 - t)
        y = bottom + height * rise / denominator
        log_slope = self._log_slope(t, slope, left_slope, right_slope, denominator)
        return torch.where(inside, y, x), torch.where(inside, log_slope, 0.0)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        knots, values, slopes = self._knots(params)
        inside = y.abs() < self.bound
        left, width, bottom, height, left_slope, right_slope = self._bin(
            y, values, knots, values, slopes
        )
        slope = height / width
        rise = (y - bottom).clamp(min=0)
        curvature = left_slope + right_slope - 2 * slope
        # The root of a quadratic equation (6 to 8 in the paper), in a form without cancellation.
        a = height * (slope - left_slope) + rise * curvature
        b = height * left_slope - rise * curvature
        discriminant = (b.square() + 4 * a * slope * rise).clamp(min=0)
        t = (2 * slope * rise / (b + discriminant.sqrt())).clamp(0, 1)
        x = left + t * width
        denominator = slope + curvature * t * (1 - t)
        log_slope = self._log_slope(t, slope, left_slope, right_slope, denominator)
        return torch.where(inside, x, y), torch.where(inside, -log_slope, 0.0)

    @staticmethod
    def _log_slope(
        t: Tensor, slope: Tensor, left_slope: Tensor, right_slope: Tensor, denominator: Tensor
    ) -> Tensor:
        numerator = (
            right_slope * t.square() + 2 * slope * t * (1 - t) + left_slope * (1 - t).square()
        )
        return 2 * slope.log() + numerator.log() - 2 * denominator.log()

    def _knots(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return positions, values and slopes at the knots, (bins + 1, batch, channels, ...)."""
        widths, heights, slopes = self.split_params(params).split(
            (self.bins, self.bins, self.bins - 1)
        )
        slopes = self.minimum + F.softplus(slopes + math.log(math.expm1(1 - self.minimum)))
        one = torch.ones_like(slopes[:1])
        return self._edges(widths), self._edges(heights), torch.cat((one, slopes, one))

    def _edges(self, raw: Tensor) -> Tensor:
        fractions = self.minimum + (1 - self.minimum * self.bins) * raw.softmax(0)
        inner = 2 * self.bound * fractions.cumsum(0)[:-1] - self.bound
        end = torch.full_like(inner[:1], self.bound)
        return torch.cat((-end, inner, end))

    def _bin(
        self, x: Tensor, edges: Tensor, knots: Tensor, values: Tensor, slopes: Tensor
    ) -> tuple[Tensor, ...]:
        """Return left edge, width, bottom, height and both end slopes of the bin of each x."""
        tables = (knots, values, slopes)
        index = (x >= edges[1:-1]).sum(0, keepdim=True)
        left, bottom, left_slope = (table.gather(0, index)[0] for table in tables)
        right, top, right_slope = (table.gather(0, index + 1)[0] for table in tables)
        return left, right - left, bottom, top - bottom, left_slope, right_slope


class GuidedAffine(Affine):
    """Classifier-free guidance of an affine transform.

    An affine transform models x as a Gaussian. For N_c with the parameters given a class, and N_u
    with those without a class, this is the transform of the Gaussian proportional to
    N_c^(1 + weight) / N_u^weight. With s = min((deviation_c / deviation_u)^2, 1), which keeps the
    product normalizable, and n = 1 + weight - weight s, its deviation is deviation_c / sqrt(n) and
    its mean ((1 + weight) mean_c - weight s mean_u) / n. STARFlow (2506.06276), section 3.4.

    Args:
        affine: The transform to guide.
        weight: Guidance weight, 0 for the transform given the class.

    The first half of the batch has the parameters given a class and the second half those without;
    both halves of x are mapped in the same way.

    Example:
        >>> params = torch.tensor([[0.0, -1.0], [0.0, 0.0]])  # means 1 and 0
        >>> GuidedAffine(Affine(), weight=2.0).inverse(torch.zeros(2, 1), params)[0]
        tensor([[3.],
                [3.]])
    """

    def __init__(self, affine: Affine, weight: float):
        self.affine = affine
        self.weight = weight

    def parse(self, params: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight
        log_scale, shift = self.affine.parse(params)
        # The Gaussian of x has the deviation exp(-log_scale) and the mean -shift exp(-log_scale).
        class_log_scale, free_log_scale = log_scale.chunk(2)
        class_mean, free_mean = (-shift * (-log_scale).exp()).chunk(2)
        ratio = (2 * (free_log_scale - class_log_scale)).exp().clamp(max=1)
        precision = 1 + weight - weight * ratio
        mean = ((1 + weight) * class_mean - weight * ratio * free_mean) / precision
        log_scale = class_log_scale + precision.log() / 2
        shift = -mean * log_scale.exp()
        return torch.cat((log_scale, log_scale)), torch.cat((shift, shift))


# Constructors by name; the argument is the name of a function in LOG_SCALES.
TRANSFORMS: dict[str, Callable[[str], Transform]] = {
    "additive": lambda scale: Additive(),
    "multiplicative": Scale,
    "affine": Affine,
    "spline": lambda scale: Spline(),
    "mixture": lambda scale: MixtureOfLogistics(scale=scale),
}


# Returns the value and the log of the slope, elementwise.
IncreasingFunction = Callable[[Tensor], tuple[Tensor, Tensor]]


def find_root(function: IncreasingFunction, target: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the x between `low` and `high` with function(x) = target, elementwise.

    The result is differentiable in `target` and in the parameters of `function`, by the implicit
    function theorem.

    Args:
        function: Increasing function that returns its value and the log of its slope.
        target: Values to reach.
        low: Lower bounds of the roots.
        high: Upper bounds of the roots.

    Example:
        >>> double = lambda x: (2 * x, torch.full_like(x, math.log(2)))
        >>> find_root(double, torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([8.0]))
        tensor([1.5000])
    """
    with torch.no_grad():
        x = _search_root(function, target, low, high)
        slope = function(x)[1].exp().clamp(min=torch.finfo(x.dtype).tiny)
    step = (target - function(x)[0]) / slope
    return x + (step - step.detach())  # zero, with the gradient of one more Newton step


def _search_root(function: IncreasingFunction, target: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Use Newton steps that stay inside and at least halve the previous step, else bisection."""
    rounding = 2 * torch.finfo(low.dtype).eps
    x = (low + high) / 2
    last_step = high - low
    for _ in range(MAX_ROOT_STEPS):
        value, log_slope = function(x)
        too_high = value > target
        low = torch.where(too_high, low, x)
        high = torch.where(too_high, x, high)
        error = target - value
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
    return x
