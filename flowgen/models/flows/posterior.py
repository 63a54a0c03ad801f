"""The law of an image's pixels given some of them, or sums of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.bijections import Bijection
from flowgen.models.flows.statistics import log_normal
from flowgen.models.linear import Linear

EDGE = 1e-3  # of a level, so that rounding does not lead into the next
TOLERANCE = 0.5  # levels, the deviation to which sums of pixels are known: they are rounded, and so are the pixels
FREEDOM = 0.1  # about the deviation of a pixel given the others, over that of all pixels


class Classes(NamedTuple):
    """What a flow's classes change: the means of the latents (K, D), whether the networks see the class, and log p(y | x) of points x."""

    means: Tensor
    seen: bool
    posterior: Callable[[Tensor], Tensor]

    def condition(self, labels: Tensor) -> Tensor | None:
        return F.one_hot(labels, len(self.means)).to(self.means.dtype) if self.seen else None


class Pixels:
    """The posterior of images x = (levels + u) / bins, (N, channels, height, width), where their levels are `known`, true or false.

    `head`, a bijection of single numbers that comes first in a flow, stretches what is between two levels; `body` is the rest. Chains
    live in the head's space h where it is not known, and where it is, in s with u = sigmoid(s): there nothing is out of bounds.
    """

    def __init__(self, head: Bijection, body: Bijection, levels: Tensor, known: Tensor, bins: int):
        self.head, self.body, self.known, self.bins = head, body, known, bins
        self.levels = levels
        self.low, self.high = (head((levels + u) / bins)[0] for u in (EDGE, 1 - EDGE))

    def spread(self, h: Tensor) -> float:
        """Over which what is known spreads among images."""
        return h.std().item()

    def violation(self, h: Tensor) -> Tensor:
        """The squared distance of h from the known levels' intervals: (batch,)."""
        outside = (self.low - h).clamp(min=0) + (h - self.high).clamp(min=0)
        return (outside * self.known).square().flatten(1).sum(1)

    def start(self, h: Tensor) -> Tensor:
        """The chains' coordinates at h, brought within what is known: (batch, D)."""
        inside = torch.where(self.known, h.clamp(self.low, self.high), h)
        u = (self.head.inverse(inside)[0] * self.bins - self.levels).clamp(0.02, 0.98)
        return torch.where(self.known, u.logit(), h).flatten(1)

    def points(self, place: Tensor) -> Tensor:
        """x of chains, a thousandth of a level within all brightness."""
        place = place.view(self.levels.shape)
        inside = (self.levels + place.sigmoid()) / self.bins
        return torch.where(self.known, inside, _within(self.head.inverse(place)[0], self.bins))

    def log_density(self, place: Tensor, mean: Tensor, condition: Tensor | None) -> Tensor:
        """log p(coordinates, what is known), up to a constant: (batch,)."""
        place = place.view(self.levels.shape)
        inside = (self.levels + place.sigmoid()) / self.bins
        h, stretch = self.head(torch.where(self.known, inside, 0.5))
        z, log_det = self.body(torch.where(self.known, h, place), condition)
        uniform = (F.logsigmoid(place) + F.logsigmoid(-place)) * self.known
        return log_normal(z - mean) + log_det + stretch + uniform.flatten(1).sum(1)


class Sums:
    """The posterior of images x given y = `known.of(x)` + N(0, s^2); y is what is known of the middles of `levels`, s `TOLERANCE` levels.

    Chains live in the head's space, h = q - (1 - t) d <d, q> within each group of pixels. d is the direction in which its sum grows where
    the chain starts, and t makes the posterior about as wide along it as across: it is far narrower in h.
    """

    def __init__(self, head: Bijection, body: Bijection, levels: Tensor, known: Linear, bins: int):
        self.head, self.body, self.known, self.bins = head, body, known, bins
        self.levels = levels
        self.value = known.of((levels + 0.5) / bins)
        self.direction, self.narrow = torch.zeros_like(levels), torch.ones_like(levels)

    def spread(self, h: Tensor) -> float:
        return self.known.of(self.head.inverse(h)[0]).std().item()

    def violation(self, h: Tensor) -> Tensor:
        """The squared distance of the sums from what is known: (batch,)."""
        return self.known.once((self.known.of(self.head.inverse(h)[0]) - self.value).square())

    def start(self, h: Tensor) -> Tensor:
        """The chains' coordinates at h, brought to what is known: (batch, D)."""
        x = self.head.inverse(h)[0]
        x = _within(x + self.value - self.known.of(x), self.bins)
        with torch.enable_grad():
            h = self.head(x)[0].detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.known.once(self.known.of(self.head.inverse(h)[0])).sum(), h)
        h = h.detach()
        length = self.known.pool(gradient.square()).sqrt().clamp(min=1e-12)
        self.direction = gradient / length
        self.narrow = (1 + (length * FREEDOM * h.std() * self.bins / TOLERANCE).square()).rsqrt()
        return (h + (1 / self.narrow - 1) * self._along(h)).flatten(1)

    def points(self, place: Tensor) -> Tensor:
        """x of chains."""
        return _within(self.head.inverse(self._wide(place))[0], self.bins)

    def log_density(self, place: Tensor, mean: Tensor, condition: Tensor | None) -> Tensor:
        """log p(h) p(y | h), up to a constant: (batch,)."""
        h = self._wide(place)
        z, log_det = self.body(h, condition)
        return log_normal(z - mean) + log_det - 0.5 * self.violation(h) * (self.bins / TOLERANCE) ** 2

    def _wide(self, place: Tensor) -> Tensor:
        place = place.view(self.levels.shape)
        return place - (1 - self.narrow) * self._along(place)

    def _along(self, place: Tensor) -> Tensor:
        return self.direction * self.known.pool(self.direction * place)


def _within(x: Tensor, bins: int) -> Tensor:
    """Off 0 and 1, which rounding may reach and the head takes to infinity."""
    return x.clamp(EDGE / bins, 1 - EDGE / bins)
