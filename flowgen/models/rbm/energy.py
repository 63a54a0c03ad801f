"""The machine itself: its parameters, energies and conditionals, all that a sampler or an estimate of log Z needs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class EnergyModel(nn.Module):
    """P(v, h) = exp(-E(v, h)) / Z over binary v and h, with E(v, h) = -visible_bias.v - hidden_bias.h - v' weight h.

    `weight` is (visible, hidden). `base` (visible,) are the log-odds of independent pixels, where annealing and tempering start: along
    the way, at inverse temperature beta in [0, 1], the energy is beta E(v, h) - (1 - beta) base.v.
    """

    base: Tensor

    def __init__(self, visible: int, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(visible, hidden))
        self.visible_bias = nn.Parameter(torch.zeros(visible))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.register_buffer("base", torch.zeros(visible))

    @property
    def visible(self) -> int:
        return len(self.weight)

    @property
    def hidden(self) -> int:
        return self.weight.shape[1]

    def energy(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h) in nats, (batch,), of v (batch, visible) and h (batch, hidden)."""
        return -(v @ self.visible_bias) - (self.hidden_input(v) * h).sum(-1)

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v) = -visible_bias.v - sum_j softplus(hidden_bias + weight' v)_j in nats, (batch,); log P(v) = -F(v) - log Z."""
        return -(v @ self.visible_bias) - F.softplus(self.hidden_input(v)).sum(-1)

    def hidden_input(self, v: Tensor) -> Tensor:
        """The log-odds of every hidden unit given v: weight' v + hidden_bias."""
        return torch.addmm(self.hidden_bias, v.reshape(-1, self.visible), self.weight).view(
            *v.shape[:-1], self.hidden
        )

    def visible_input(self, h: Tensor) -> Tensor:
        """The log-odds of every visible unit given h: weight h + visible_bias."""
        return torch.addmm(self.visible_bias, h.reshape(-1, self.hidden), self.weight.T).view(
            *h.shape[:-1], self.visible
        )


class ContrastiveLoss(torch.autograd.Function):
    """F(data).mean() - F(negative).mean(), from units (batch, visible) and their hidden inputs (batch, hidden) under these parameters.

    With `offsets` (mu, lambda) the gradient is that of the centred machine, Melchior, Fischer and Wiskott (1311.1354), section 3:
    dW = <(v - mu)(h - lambda)'>, db = <v> - dW lambda, dc = <h> - dW' mu, each as a difference of data and negatives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        visible_bias: Tensor,
        hidden_bias: Tensor,
        data: Tensor,
        data_inputs: Tensor,
        negative: Tensor,
        negative_inputs: Tensor,
        offsets: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        shares = [
            torch.full((len(rows), 1), sign / len(rows), device=rows.device, dtype=rows.dtype)
            for rows, sign in ((data, 1), (negative, -1))
        ]
        share = torch.cat(shares)
        inputs = torch.cat((data_inputs, negative_inputs))
        visible = torch.cat((data, negative)) * share
        hidden = inputs.sigmoid()
        difference = visible.sum(0), (hidden * share).sum(0)
        ctx.save_for_backward(visible, hidden, *difference, *(offsets or ()))
        return -(difference[0] @ visible_bias) - (F.softplus(inputs) * share).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, ...]:
        visible, hidden, of_visible, of_hidden, *offsets = ctx.saved_tensors
        if not offsets:
            return *(
                -scales[0] * gradient for gradient in (visible.T @ hidden, of_visible, of_hidden)
            ), *[None] * 5
        mu, lam = offsets
        rows = torch.cat((visible, -mu[None], -of_visible[None])).mul_(-scales[0])
        gradient = rows.T @ torch.cat((hidden, of_hidden[None], lam[None]))
        return (
            gradient,
            -scales[0] * of_visible - gradient @ lam,
            -scales[0] * of_hidden - mu @ gradient,
            *[None] * 5,
        )
