"""What an invertible map of single numbers promises, and how it bounds its scale."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


class Transform(ABC):
    """y = h(x; parameters), number by number.

    x is (batch, C, ...), the parameters are (batch, count * C, ...), the first C of them the first parameter of each number.
    """

    count: int  # parameters of each number
    recoverable = False  # whether its inverse is cheap, and close enough to differentiate at

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


LOG_SCALES: dict[str, Callable[[Tensor], Tensor]] = {"bounded": bounded, "sigmoid": _sigmoid, "tanh": _tanh, "plain": _plain}
