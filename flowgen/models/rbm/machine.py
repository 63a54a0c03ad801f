"""The machine itself: its parameters, energies and conditionals, all that a sampler or an estimate of log Z needs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Machine(nn.Module):
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
        return torch.addmm(self.hidden_bias, v.reshape(-1, self.visible), self.weight).view(*v.shape[:-1], self.hidden)

    def visible_input(self, h: Tensor) -> Tensor:
        """The log-odds of every visible unit given h: weight h + visible_bias."""
        return torch.addmm(self.visible_bias, h.reshape(-1, self.hidden), self.weight.T).view(*h.shape[:-1], self.visible)
