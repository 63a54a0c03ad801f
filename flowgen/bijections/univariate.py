"""What an invertible map of single numbers promises, and how it bounds its scale."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.bijections.root_finding import find_root


class Transform(ABC):
    """y = h(x; parameters), number by number.

    x is (batch, C, ...), the parameters are (batch, count * C, ...), the first C of them the first parameter of each number.
    """

    count: int  # parameters of each number
    supports_reversible = (
        False  # whether its inverse is cheap, and close enough to differentiate at
    )

    @abstractmethod
    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """h(x) and log h'(x), both in the shape of x."""

    @abstractmethod
    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The x with h(x) = y, and -log h'(x)."""

    def split(self, parameters: Tensor) -> Tensor:
        """(batch, count * C, ...) -> (count, batch, C, ...)."""
        return parameters.unflatten(1, (self.count, -1)).transpose(0, 1)


def bounded(raw: Tensor) -> Tensor:
    """2 (2/pi) atan(raw/2): between -2 and 2, and never flat."""
    return (4 / math.pi) * torch.atan(raw / 2)


def _sigmoid(raw: Tensor) -> Tensor:
    """log sigmoid(raw + 2), as in Glow's code; it can only shrink, so sampling divides by it."""
    return F.logsigmoid(raw + 2)


def _tanh(raw: Tensor) -> Tensor:
    """2 tanh(raw/2): between -2 and 2."""
    return 2 * torch.tanh(raw / 2)


def _plain(raw: Tensor) -> Tensor:
    """As the network gives it, which must bound it by itself."""
    return raw


LOG_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "bounded": bounded,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "plain": _plain,
}


class Additive(Transform):
    """y = x + t. NICE (1410.8516), section 3.2."""

    count = 1
    supports_reversible = True

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return x + parameters, torch.zeros_like(x)

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return y - parameters, torch.zeros_like(y)


class Scale(Transform):
    """y = exp(l) x. NICE (1410.8516), section 3.2."""

    count = 1
    supports_reversible = True

    def __init__(self, scale: str = "bounded"):
        self.log_scale = LOG_SCALES[scale]

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale(parameters)
        return x * log_scale.exp(), log_scale

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale(parameters)
        return y * (-log_scale).exp(), -log_scale


class Affine(Transform):
    """y = exp(l) x + t; `scale` names the function that turns a raw parameter into l. Real NVP (1605.08803), equation 4."""

    count = 2
    supports_reversible = True

    def __init__(self, scale: str = "bounded"):
        self.log_scale = LOG_SCALES[scale]

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = parameters.chunk(2, dim=1)
        log_scale = self.log_scale(raw)
        return torch.addcmul(shift, x, log_scale.exp()), log_scale

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = parameters.chunk(2, dim=1)
        log_scale = self.log_scale(raw)
        return (y - shift) * (-log_scale).exp(), -log_scale


class MixtureOfLogistics(Transform):
    """y = exp(l) logit(sum_k pi_k sigmoid((x - mu_k) / s_k)) + t. Flow++ (1902.00275), section 3.2.

    The inverse is found between the smallest and the largest of the components' own solutions.
    """

    def __init__(self, components: int = 4, scale: str = "bounded"):
        self.components = components
        self.log_scale = LOG_SCALES[scale]
        self.count = 2 + 3 * components

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift, mixture = self._read(parameters)
        log_odds, log_slope = self._log_odds(x, *mixture)
        return torch.addcmul(shift, log_odds, log_scale.exp()), log_slope + log_scale

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift, mixture = self._read(parameters)
        target = (y - shift) * (-log_scale).exp()
        _, means, log_deviations = mixture
        ends = means + log_deviations.exp() * target
        x = find_root(lambda x: self._log_odds(x, *mixture), target, ends.amin(0), ends.amax(0))
        return x, -(self._log_odds(x, *mixture)[1] + log_scale)

    def _read(self, parameters: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        raw, shift, *rest = self.split(parameters).split((1, 1, *[self.components] * 3))
        logits, means, log_deviations = rest
        spread = torch.linspace(
            -1, 1, self.components, device=means.device, dtype=means.dtype
        )  # else all would stay alike
        means = means + spread.view(-1, *[1] * (means.dim() - 1))
        return (
            self.log_scale(raw[0]),
            shift[0],
            (logits.log_softmax(0), means, bounded(log_deviations)),
        )

    @staticmethod
    def _log_odds(
        x: Tensor, log_share: Tensor, means: Tensor, log_deviations: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mixture's log-odds at x, and the log of their slope."""
        place = (x - means) * (-log_deviations).exp()
        below, above = F.logsigmoid(place), F.logsigmoid(-place)
        log_below, log_above = (log_share + below).logsumexp(0), (log_share + above).logsumexp(0)
        log_density = (log_share + below + above - log_deviations).logsumexp(0)
        return log_below - log_above, log_density - log_below - log_above


class Spline(Transform):
    """A monotone rational-quadratic spline on [-bound, bound], the identity outside.

    Neural Spline Flows (1906.04032), section 3.1; parameters zero give the identity.
    """

    smallest = 1e-3  # width and height of a bin, as a share of all, and slope at a knot

    def __init__(self, bins: int = 8, bound: float = 4.0):
        self.bins, self.bound = bins, bound
        self.count = 3 * bins - 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        knots, values, slopes = self._knots(parameters)
        inside = x.abs() < self.bound
        left, width, bottom, height, low, high = self._bin(x, knots, knots, values, slopes)
        share = ((x - left) / width).clamp(0, 1)
        slope = height / width
        below = slope + (low + high - 2 * slope) * share * (1 - share)
        y = bottom + height * (slope * share.square() + low * share * (1 - share)) / below
        return torch.where(inside, y, x), torch.where(
            inside, self._log_slope(share, slope, low, high, below), 0.0
        )

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        knots, values, slopes = self._knots(parameters)
        inside = y.abs() < self.bound
        left, width, bottom, height, low, high = self._bin(y, values, knots, values, slopes)
        slope, rise = height / width, (y - bottom).clamp(min=0)
        bend = low + high - 2 * slope
        a = height * (slope - low) + rise * bend
        b = height * low - rise * bend
        share = (
            2 * slope * rise / (b + (b.square() + 4 * a * slope * rise).clamp(min=0).sqrt())
        ).clamp(0, 1)
        x = left + share * width
        log_slope = self._log_slope(share, slope, low, high, slope + bend * share * (1 - share))
        return torch.where(inside, x, y), torch.where(inside, -log_slope, 0.0)

    @staticmethod
    def _log_slope(
        share: Tensor, slope: Tensor, low: Tensor, high: Tensor, below: Tensor
    ) -> Tensor:
        above = high * share.square() + 2 * slope * share * (1 - share) + low * (1 - share).square()
        return 2 * slope.log() + above.log() - 2 * below.log()

    def _knots(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places, values and slopes at the bins' edges, (bins + 1, batch, C, ...) each."""
        widths, heights, slopes = self.split(parameters).split(
            (self.bins, self.bins, self.bins - 1)
        )
        slopes = self.smallest + F.softplus(slopes + math.log(math.expm1(1 - self.smallest)))
        one = torch.ones_like(slopes[:1])
        return self._edges(widths), self._edges(heights), torch.cat((one, slopes, one))

    def _edges(self, raw: Tensor) -> Tensor:
        shares = self.smallest + (1 - self.smallest * self.bins) * raw.softmax(0)
        inner = 2 * self.bound * shares.cumsum(0)[:-1] - self.bound
        end = torch.full_like(inner[:1], self.bound)
        return torch.cat((-end, inner, end))

    def _bin(
        self, x: Tensor, edges: Tensor, knots: Tensor, values: Tensor, slopes: Tensor
    ) -> tuple[Tensor, ...]:
        """Of the bin that x is in: left edge, width, bottom, height, and the slopes at its ends."""
        place = (x >= edges[1:-1]).sum(0, keepdim=True)

        def at(table: Tensor, offset: int = 0) -> Tensor:
            return table.gather(0, place + offset)[0]

        left, bottom = at(knots), at(values)
        return left, at(knots, 1) - left, bottom, at(values, 1) - bottom, at(slopes), at(slopes, 1)


class GuidedAffine(Transform):
    """The affine maps of two Gaussians N(mean, deviation^2) as that of one, proportional to N_c^(1 + w) / N_u^w.

    The first half of the batch has the parameters given a class, c, the second half those without, u; both halves are mapped alike. With
    s = min((deviation_c / deviation_u)^2, 1), which keeps it a Gaussian, and n = 1 + w - w s, its deviation is deviation_c / sqrt(n) and
    its mean ((1 + w) mean_c - w s mean_u) / n. STARFlow (2506.06276), section 3.4.
    """

    def __init__(self, affine: Affine, weight: float):
        self.affine, self.weight, self.count = affine, weight, affine.count
        self.plain = Affine("plain")

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self.plain.forward(x, self._guide(parameters))

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self.plain.inverse(y, self._guide(parameters))

    def _guide(self, parameters: Tensor) -> Tensor:
        raw, shift = parameters.chunk(2, dim=1)
        log_scale = self.affine.log_scale(
            raw
        )  # of y = exp(l) x + t; the Gaussian of x has deviation exp(-l) and mean -t exp(-l)
        of_class, of_none = log_scale.chunk(2)
        mean, mean_of_none = (-shift * (-log_scale).exp()).chunk(2)
        weight, share = self.weight, (2 * (of_none - of_class)).exp().clamp(max=1)
        precision = 1 + weight - weight * share
        mean = ((1 + weight) * mean - weight * share * mean_of_none) / precision
        log_scale = of_class + precision.log() / 2
        return torch.cat((log_scale, -mean * log_scale.exp()), 1).repeat(
            2, *[1] * (parameters.dim() - 1)
        )


class HasTransform(Protocol):
    transform: Transform


@contextmanager
def guided(holders: Sequence[HasTransform], weight: float) -> Iterator[None]:
    """While the context lasts, the affine transforms of `holders` are `Guided`."""
    before = [holder.transform for holder in holders]
    try:
        for holder, transform in zip(holders, before, strict=True):
            assert isinstance(transform, Affine)
            holder.transform = GuidedAffine(transform, weight)
        yield
    finally:
        for holder, transform in zip(holders, before, strict=True):
            holder.transform = transform


TRANSFORMS: dict[
    str, Callable[[str], Transform]
] = {  # by the name that a configuration gives them, with that of the scale
    "additive": lambda scale: Additive(),
    "multiplicative": Scale,
    "affine": Affine,
    "spline": lambda scale: Spline(),
    "mixture": lambda scale: MixtureOfLogistics(scale=scale),
}
