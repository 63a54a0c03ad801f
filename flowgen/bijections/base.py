"""What a bijection is, and how bijections compose."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Bijection(nn.Module, ABC):
    """An invertible map with a tractable Jacobian, which may depend on a condition.

    Subclasses implement `forward` and `inverse`; those that start from data also override `initialize`. `condition`, of shape
    (batch, K) or (batch, K, height, width), is what the networks inside may see beside their input, as a class or another image:
    whoever holds other bijections hands it on, and only what has a network looks at it (`beside`).
    """

    @abstractmethod
    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map data to latent: `(z, log|det dz/dx|)`, the latter of shape (batch,)."""

    @abstractmethod
    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map latent to data: `(x, log|det dx/dz|)`, the latter of shape (batch,)."""

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Look at one batch `x` before training and hand on the output for it."""
        return self(x, condition)[0]


def beside(x: Tensor, condition: Tensor | None) -> Tensor:
    """What a network reads: x (B, C, ...), and the condition as further channels, alike at every pixel where it has none of its own."""
    if condition is None:
        return x
    if condition.dim() < x.dim():
        condition = condition.view(*condition.shape, *[1] * (x.dim() - condition.dim())).expand(-1, -1, *x.shape[2:])
    return torch.cat((x, condition.to(x.dtype)), 1)


class Chain(Bijection):
    """Bijections one after the other; the log-dets add up."""

    def __init__(self, *bijections: Bijection):
        super().__init__()
        self.bijections = nn.ModuleList(bijections)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        for bijection in self.bijections:
            x, change = bijection(x, condition)
            log_det = log_det + change
        return x, log_det

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = z.new_zeros(len(z))
        for bijection in reversed(self.bijections):
            z, change = bijection.inverse(z, condition)  # type: ignore[operator]
            log_det = log_det + change
        return z, log_det

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        for bijection in self.bijections:
            x = bijection.initialize(x, condition)  # type: ignore[operator]
        return x
