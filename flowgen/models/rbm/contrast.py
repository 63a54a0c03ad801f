"""The loss of an RBM, and its gradient by hand: one matrix product where autograd needs three."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Contrast(torch.autograd.Function):
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
            torch.full((len(rows), 1), sign / len(rows), device=rows.device, dtype=rows.dtype) for rows, sign in ((data, 1), (negative, -1))
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
            return *(-scales[0] * gradient for gradient in (visible.T @ hidden, of_visible, of_hidden)), *[None] * 5
        mu, lam = offsets
        rows = torch.cat((visible, -mu[None], -of_visible[None])).mul_(-scales[0])
        gradient = rows.T @ torch.cat((hidden, of_hidden[None], lam[None]))
        return gradient, -scales[0] * of_visible - gradient @ lam, -scales[0] * of_hidden - mu @ gradient, *[None] * 5
