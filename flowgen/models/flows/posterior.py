"""The law of an image's pixels given some of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.bijections import Bijection
from flowgen.models.flows.statistics import log_normal


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
        edge = 1e-3  # of a level, so that rounding does not lead into the next
        self.low, self.high = (head((levels + u) / bins)[0] for u in (edge, 1 - edge))

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
        """x of chains."""
        place = place.view(self.levels.shape)
        inside = (self.levels + place.sigmoid()) / self.bins
        return torch.where(self.known, inside, self.head.inverse(place)[0])

    def log_density(self, place: Tensor, mean: Tensor, condition: Tensor | None) -> Tensor:
        """log p(coordinates, what is known), up to a constant: (batch,)."""
        place = place.view(self.levels.shape)
        inside = (self.levels + place.sigmoid()) / self.bins
        h, stretch = self.head(torch.where(self.known, inside, 0.5))
        z, log_det = self.body(torch.where(self.known, h, place), condition)
        uniform = (F.logsigmoid(place) + F.logsigmoid(-place)) * self.known
        return log_normal(z - mean) + log_det + stretch + uniform.flatten(1).sum(1)
