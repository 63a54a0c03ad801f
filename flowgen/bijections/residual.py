"""Planar and Sylvester flows: residual layers of one hidden layer that can be undone."""

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.base import Bijection
from flowgen.bijections.root_finding import find_root

LEAST = 0.05  # slope along the direction of a hidden unit: float32 has to find the way back


class PlanarSylvesterBase(Bijection):
    """z = x + A tanh(B x + b) of vectors (batch, D), A (D, M), B (M, D), where B A is upper triangular with a diagonal above -1.

    log|det| = sum_i log(1 + (B A)_ii tanh'(B x + b)_i), by Sylvester's identity det(I + A H B) = det(I + H B A). Back goes a = B x + b,
    which solves a + B A tanh(a) = B z + b: the last number first, each the root of an increasing function. van den Berg et al.
    (1803.05649), sections 3.1 and 3.2.
    """

    @abstractmethod
    def layer(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B, b (M,) and B A."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            a, b, bias, product = self.layer()
            hidden = F.linear(x, b, bias).tanh()
            return x + F.linear(hidden, a), _log_det(hidden, product)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            a, b, bias, product = self.layer()
            target, hidden = F.linear(z, b, bias), z.new_zeros(len(z), 0)
            for unit in reversed(range(len(bias))):
                rest = target[:, unit] - hidden @ product[unit, unit + 1 :]
                hidden = torch.cat((_before(rest, product[unit, unit]).tanh()[:, None], hidden), 1)
            return z - F.linear(hidden, a), -_log_det(hidden, product)


class Planar(PlanarSylvesterBase):
    """z = x + u tanh(w.x + b), with u moved along w until u.w > -1. Rezende and Mohamed (1505.05770), section 4.1 and appendix A.1."""

    def __init__(self, size: int):
        super().__init__()
        self.direction = nn.Parameter(torch.randn(size) / math.sqrt(size))
        self.bias = nn.Parameter(torch.randn(1))
        self.push = nn.Parameter(torch.zeros(size))

    def layer(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        w = self.direction
        product = w @ self.push
        least = LEAST - 1
        bounded = least + F.softplus(
            product + math.log(math.expm1(-least))
        )  # zero where the product is
        u = self.push + (bounded - product) * w / w.square().sum()
        return u[:, None], w[None], self.bias, bounded.view(1, 1)


class Sylvester(PlanarSylvesterBase):
    """z = x + Q R tanh(R' Q^T x + b), Q (D, M) with orthonormal columns, R and R' upper triangular, R_ii R'_ii > -1.

    Q is that of a QR factorisation, the diagonals are bounded by tanh. van den Berg et al. (1803.05649), section 4.1.
    """

    def __init__(self, size: int, width: int):
        super().__init__()
        self.basis = nn.Parameter(torch.randn(size, width))
        self.bias = nn.Parameter(torch.randn(width))
        self.outer = nn.Parameter(torch.zeros(width, width))
        self.inner = nn.Parameter(torch.randn(width, width) / math.sqrt(width))

    def layer(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes = torch.linalg.qr(self.basis).Q
        outer, inner = (_triangular(raw) for raw in (self.outer, self.inner))
        return axes @ outer, inner @ axes.T, self.bias, inner @ outer


def _triangular(raw: Tensor) -> Tensor:
    return raw.triu(1) + torch.diag(math.sqrt(1 - LEAST) * raw.diagonal().tanh())


def _log_det(hidden: Tensor, product: Tensor) -> Tensor:
    return torch.log1p(product.diagonal() * (1 - hidden.square())).sum(1)


def _before(target: Tensor, product: Tensor) -> Tensor:
    """The a with a + product tanh(a) = target, for a product above -1."""

    def function(a: Tensor) -> tuple[Tensor, Tensor]:
        hidden = a.tanh()
        return a + product * hidden, torch.log1p(product * (1 - hidden.square()))

    reach = product.abs()
    return find_root(function, target, target - reach, target + reach)
