"""What a bijection is."""

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

    @property
    def supports_reversible(self) -> bool:
        """Whether its input comes back from its output at little cost, and close enough to be differentiated at."""
        return False

    def invert_and_recompute(
        self, z: Tensor, condition: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The input that `z` came of, in leaves that lie one after the other in dimension 1, and `forward` of it, to be differentiated."""
        with torch.no_grad():
            x, _ = self.inverse(z, condition)
        x.requires_grad_()
        return (x,), *self(x, condition)


def concat_condition(x: Tensor, condition: Tensor | None) -> Tensor:
    """What a network reads: x (B, C, ...), and the condition as further channels, alike at every pixel where it has none of its own."""
    if condition is None:
        return x
    if condition.dim() < x.dim():
        condition = condition.view(*condition.shape, *[1] * (x.dim() - condition.dim())).expand(
            -1, -1, *x.shape[2:]
        )
    return torch.cat((x, condition.to(x.dtype)), 1)
