"""What a bijection is, and how bijections compose."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Bijection(nn.Module, ABC):
    """An invertible map with a tractable Jacobian.

    Subclasses implement `forward` and `inverse`; those that start from data also override `initialize`.
    """

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map data to latent: `(z, log|det dz/dx|)`, the latter of shape (batch,)."""

    @abstractmethod
    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map latent to data: `(x, log|det dx/dz|)`, the latter of shape (batch,)."""

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        """Look at one batch `x` before training and hand on the output for it."""
        return self(x)[0]


class Chain(Bijection):
    """Bijections one after the other; the log-dets add up."""

    def __init__(self, *bijections: Bijection):
        super().__init__()
        self.bijections = nn.ModuleList(bijections)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        for bijection in self.bijections:
            x, change = bijection(x)
            log_det = log_det + change
        return x, log_det

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_det = z.new_zeros(len(z))
        for bijection in reversed(self.bijections):
            z, change = bijection.inverse(z)  # type: ignore[operator]
            log_det = log_det + change
        return z, log_det

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        for bijection in self.bijections:
            x = bijection.initialize(x)  # type: ignore[operator]
        return x
