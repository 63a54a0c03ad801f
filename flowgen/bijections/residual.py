"""Planar and Sylvester flows, which are invertible residual layers with one hidden layer."""

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.base import Bijection
from flowgen.bijections.univariate import find_root

MIN_SLOPE = 0.05  # along the direction of a hidden unit, so that float32 can invert the layer


class TanhResidual(Bijection):
    """Base class of residual layers z = x + A tanh(B x + b) for vectors x of shape (batch, dim).

    A has shape (dim, M) and B has shape (M, dim). B A is upper triangular, and its diagonal is
    above -1. By Sylvester's identity det(I + A H B) = det(I + H B A),
    log|det| = sum_i log(1 + (B A)_ii tanh'(B x + b)_i). The inverse solves
    a + B A tanh(a) = B z + b for a = B x + b, from the last to the first element of a. Each element
    is the root of an increasing function. van den Berg et al. (1803.05649), sections 3.1 and 3.2.
    """

    @abstractmethod
    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return A, B, b of shape (M,), and the product B A."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            a, b, bias, product = self.matrices()
            hidden = F.linear(x, b, bias).tanh()
            return x + F.linear(hidden, a), _log_det(hidden, product)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            a, b, bias, product = self.matrices()
            target = F.linear(z, b, bias)
            hidden = z.new_zeros(len(z), 0)
            for unit in reversed(range(len(bias))):
                unit_target = target[:, unit] - hidden @ product[unit, unit + 1 :]
                unit_hidden = _invert_unit(unit_target, product[unit, unit]).tanh()
                hidden = torch.cat((unit_hidden[:, None], hidden), 1)
            return z - F.linear(hidden, a), -_log_det(hidden, product)


class Planar(TanhResidual):
    """z = x + u tanh(w.x + b), where u is shifted along w so that u.w > -1.

    Rezende and Mohamed (1505.05770), section 4.1 and appendix A.1.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bijection = Planar(6)
        >>> _ = torch.nn.init.normal_(bijection.push)
        >>> x = torch.randn(5, 6)
        >>> z, log_det = bijection(x)
        >>> torch.allclose(bijection.inverse(z)[0], x, atol=1e-5)
        True
    """

    def __init__(self, dim: int):
        super().__init__()
        self.direction = nn.Parameter(torch.randn(dim) / math.sqrt(dim))
        self.bias = nn.Parameter(torch.randn(1))
        self.push = nn.Parameter(torch.zeros(dim))

    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        w = self.direction
        product = w @ self.push
        # The offset of the product makes `bounded` zero if the product is zero.
        bounded = MIN_SLOPE - 1 + F.softplus(product + math.log(math.expm1(1 - MIN_SLOPE)))
        u = self.push + (bounded - product) * w / w.square().sum()
        return u[:, None], w[None], self.bias, bounded.view(1, 1)


class Sylvester(TanhResidual):
    """z = x + Q R tanh(R' Q^T x + b), where Q (dim, width) has orthonormal columns.

    R and R' are upper triangular with R_ii R'_ii > -1, because tanh bounds their diagonals. Q is a
    factor of a QR factorization. van den Berg et al. (1803.05649), section 4.1.

    Args:
        dim: Numbers per point.
        width: Number of columns of Q, at most `dim`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bijection = Sylvester(6, width=3)
        >>> _ = torch.nn.init.normal_(bijection.outer)
        >>> x = torch.randn(5, 6)
        >>> z, log_det = bijection(x)
        >>> torch.allclose(bijection.inverse(z)[0], x, atol=1e-4)
        True
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.basis = nn.Parameter(torch.randn(dim, width))
        self.bias = nn.Parameter(torch.randn(width))
        self.outer = nn.Parameter(torch.zeros(width, width))
        self.inner = nn.Parameter(torch.randn(width, width) / math.sqrt(width))

    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes = torch.linalg.qr(self.basis).Q
        outer = _triangular(self.outer)
        inner = _triangular(self.inner)
        return axes @ outer, inner @ axes.T, self.bias, inner @ outer


def _triangular(raw: Tensor) -> Tensor:
    return raw.triu(1) + torch.diag(math.sqrt(1 - MIN_SLOPE) * raw.diagonal().tanh())


def _log_det(hidden: Tensor, product: Tensor) -> Tensor:
    return torch.log1p(product.diagonal() * (1 - hidden.square())).sum(1)


def _invert_unit(target: Tensor, product: Tensor) -> Tensor:
    """Return the root a of a + product tanh(a) = target, where the product is above -1."""

    def function(a: Tensor) -> tuple[Tensor, Tensor]:
        hidden = a.tanh()
        return a + product * hidden, torch.log1p(product * (1 - hidden.square()))

    radius = product.abs()
    return find_root(function, target, target - radius, target + radius)
