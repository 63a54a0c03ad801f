"""Energy of a restricted Boltzmann machine, its conditionals, and its training loss."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

INITIAL_WEIGHT_STD = 0.01  # Hinton, A practical guide to training RBMs (2010), section 8


class EnergyModel(nn.Module):
    """Joint distribution P(v, h) = exp(-E(v, h)) / Z of binary visible and hidden units.

    The energy is E(v, h) = -b.v - c.h - v'Wh, with W = `weight` (visible, hidden),
    b = `visible_bias` (visible,) and c = `hidden_bias` (hidden,). All energies are in nats.

    Annealing and tempering start at the independent-pixel model. The buffer `base` (visible,)
    holds the log-odds of its pixels. At an inverse temperature beta from 0 to 1 the intermediate
    distribution has the energy beta E(v, h) - (1 - beta) base.v (Salakhutdinov and Murray, On the
    quantitative analysis of deep belief networks, 2008, section 4.1).

    Args:
        visible: Number of visible units.
        hidden: Number of hidden units.

    Example:
        >>> rbm = EnergyModel(visible=4, hidden=3)
        >>> v = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
        >>> rbm.free_energy(v).shape
        torch.Size([1])
        >>> rbm.hidden_input(v).sigmoid().shape  # P(h = 1 | v)
        torch.Size([1, 3])
    """

    def __init__(self, visible: int, hidden: int):
        super().__init__()
        self.visible = visible
        self.hidden = hidden
        self.weight = nn.Parameter(INITIAL_WEIGHT_STD * torch.randn(visible, hidden))
        self.visible_bias = nn.Parameter(torch.zeros(visible))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.base = nn.Buffer(torch.zeros(visible))

    def energy(self, v: Tensor, h: Tensor) -> Tensor:
        """Return E(v, h) in nats, (batch,), of v (batch, visible) and h (batch, hidden)."""
        return -(v @ self.visible_bias) - (self.hidden_input(v) * h).sum(-1)

    def free_energy(self, v: Tensor) -> Tensor:
        """Return F(v) in nats, (batch,), of v (batch, visible).

        F(v) = -log sum_h exp(-E(v, h)) = -b.v - sum_j softplus(c + W'v)_j, so that
        log P(v) = -F(v) - log Z.
        """
        return -(v @ self.visible_bias) - F.softplus(self.hidden_input(v)).sum(-1)

    def hidden_input(self, v: Tensor) -> Tensor:
        """Return W'v + c, the log-odds of P(h = 1 | v): (..., hidden) of v (..., visible)."""
        return F.linear(v, self.weight.T, self.hidden_bias)

    def visible_input(self, h: Tensor) -> Tensor:
        """Return W h + b, the log-odds of P(v = 1 | h): (..., visible) of h (..., hidden)."""
        return F.linear(h, self.weight, self.visible_bias)

    def condition_on(self, v: Tensor, known: Tensor) -> "EnergyModel":
        """Return P(unknown v, h | known v), which has the energy of a smaller model.

        The known visible units become part of the hidden biases: c + W_known' v_known.

        Args:
            v: The visible units, (visible,).
            known: Mask of the known units, (visible,).
        """
        smaller = EnergyModel(int((~known).sum()), self.hidden)
        smaller.weight = nn.Parameter(self.weight[~known])
        smaller.visible_bias = nn.Parameter(self.visible_bias[~known])
        smaller.hidden_bias = nn.Parameter(self.hidden_bias + v[known] @ self.weight[known])
        smaller.base = nn.Buffer(self.base[~known])
        return smaller


class ContrastiveLoss(torch.autograd.Function):
    """Free energy difference F(data).mean() - F(negative).mean() with a hand-written gradient.

    Its gradient is the positive phase minus the negative phase of -log P(data). With `offsets`
    (mu, lambda) it is the gradient of the centered RBM (Melchior, Fischer and Wiskott,
    arXiv:1311.1354, section 3): dW = <(v - mu)(h - lambda)'>, db = <v> - dW lambda,
    dc = <h> - dW' mu, where <.> is the mean over the data minus the mean over the negatives.

    The hidden inputs are passed in because the caller has computed them already.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        visible_bias: Tensor,
        hidden_bias: Tensor,
        data: Tensor,
        data_hidden_input: Tensor,
        negative: Tensor,
        negative_hidden_input: Tensor,
        offsets: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Return the loss, a scalar.

        Args:
            ctx: Context of autograd.
            weight: Weights, (visible, hidden).
            visible_bias: Biases of the visible units, (visible,).
            hidden_bias: Biases of the hidden units, (hidden,). The hidden inputs contain them.
            data: Visible units of the data, (batch, visible).
            data_hidden_input: Their hidden inputs, (batch, hidden).
            negative: Visible units of the negative phase, (chains, visible).
            negative_hidden_input: Their hidden inputs, (chains, hidden).
            offsets: Offsets mu (visible,) and lambda (hidden,), or None for the plain gradient.
        """
        # The mean over the data minus the mean over the negatives is a sum with these weights.
        signed_mean = torch.cat(
            (
                data.new_full((len(data), 1), 1 / len(data)),
                negative.new_full((len(negative), 1), -1 / len(negative)),
            )
        )
        hidden_input = torch.cat((data_hidden_input, negative_hidden_input))
        visible = torch.cat((data, negative)) * signed_mean
        hidden = hidden_input.sigmoid()
        visible_difference = visible.sum(0)
        hidden_difference = (hidden * signed_mean).sum(0)
        ctx.save_for_backward(
            visible, hidden, visible_difference, hidden_difference, *(offsets or ())
        )
        return -(visible_difference @ visible_bias) - (F.softplus(hidden_input) * signed_mean).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of weight, visible_bias and hidden_bias; other inputs get None."""
        visible, hidden, visible_difference, hidden_difference, *offsets = ctx.saved_tensors
        scale = -grad_outputs[0]
        visible_gradient = scale * visible_difference
        hidden_gradient = scale * hidden_difference
        if not offsets:
            weight_gradient = scale * (visible.T @ hidden)
            return weight_gradient, visible_gradient, hidden_gradient, *(None,) * 5
        mu, lam = offsets
        # The last two terms of the product subtract the offsets from the units.
        left = torch.cat((visible, -mu[None], -visible_difference[None])).mul_(scale)
        weight_gradient = left.T @ torch.cat((hidden, hidden_difference[None], lam[None]))
        return (
            weight_gradient,
            visible_gradient - weight_gradient @ lam,
            hidden_gradient - mu @ weight_gradient,
            *(None,) * 5,
        )
