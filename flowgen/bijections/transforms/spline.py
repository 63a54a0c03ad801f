"""Monotone splines of single numbers."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.bijections.transforms.base import Transform


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
        return torch.where(inside, y, x), torch.where(inside, self._log_slope(share, slope, low, high, below), 0.0)

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        knots, values, slopes = self._knots(parameters)
        inside = y.abs() < self.bound
        left, width, bottom, height, low, high = self._bin(y, values, knots, values, slopes)
        slope, rise = height / width, (y - bottom).clamp(min=0)
        bend = low + high - 2 * slope
        a = height * (slope - low) + rise * bend
        b = height * low - rise * bend
        share = (2 * slope * rise / (b + (b.square() + 4 * a * slope * rise).clamp(min=0).sqrt())).clamp(0, 1)
        x = left + share * width
        log_slope = self._log_slope(share, slope, low, high, slope + bend * share * (1 - share))
        return torch.where(inside, x, y), torch.where(inside, -log_slope, 0.0)

    @staticmethod
    def _log_slope(share: Tensor, slope: Tensor, low: Tensor, high: Tensor, below: Tensor) -> Tensor:
        above = high * share.square() + 2 * slope * share * (1 - share) + low * (1 - share).square()
        return 2 * slope.log() + above.log() - 2 * below.log()

    def _knots(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places, values and slopes at the bins' edges, (bins + 1, batch, C, ...) each."""
        widths, heights, slopes = self.split(parameters).split((self.bins, self.bins, self.bins - 1))
        slopes = self.smallest + F.softplus(slopes + math.log(math.expm1(1 - self.smallest)))
        one = torch.ones_like(slopes[:1])
        return self._edges(widths), self._edges(heights), torch.cat((one, slopes, one))

    def _edges(self, raw: Tensor) -> Tensor:
        shares = self.smallest + (1 - self.smallest * self.bins) * raw.softmax(0)
        inner = 2 * self.bound * shares.cumsum(0)[:-1] - self.bound
        end = torch.full_like(inner[:1], self.bound)
        return torch.cat((-end, inner, end))

    def _bin(self, x: Tensor, edges: Tensor, knots: Tensor, values: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
        """Of the bin that x is in: left edge, width, bottom, height, and the slopes at its ends."""
        place = (x >= edges[1:-1]).sum(0, keepdim=True)

        def at(table: Tensor, offset: int = 0) -> Tensor:
            return table.gather(0, place + offset)[0]

        left, bottom = at(knots), at(values)
        return left, at(knots, 1) - left, bottom, at(values, 1) - bottom, at(slopes), at(slopes, 1)
