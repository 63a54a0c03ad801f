"""Where increasing functions take a value: how bijections without a closed form go back."""

from collections.abc import Callable

import torch
from torch import Tensor

Increasing = Callable[
    [Tensor], tuple[Tensor, Tensor]
]  # its value, number by number, and the log of its slope
MOST = 64  # steps: as many halve the range down to rounding


def find_root(function: Increasing, target: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The x from `low` to `high` where `function` is `target`, with the gradients of both."""
    with torch.no_grad():
        x = _search(function, target, low, high)
        slope = function(x)[1].exp().clamp(min=torch.finfo(x.dtype).tiny)
    step = (target - function(x)[0]) / slope
    return x + (step - step.detach())  # nothing but the gradient of one more of Newton's steps


def _search(function: Increasing, target: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """A step of Newton's where it stays inside and halves the last one, else the middle of what is left."""
    x, last, rounding = (low + high) / 2, high - low, 2 * torch.finfo(low.dtype).eps
    for _ in range(MOST):
        value, log_slope = function(x)
        low, high = torch.where(value > target, low, x), torch.where(value > target, x, high)
        error = target - value
        step = error * (-log_slope).exp()
        there = (step.abs() <= rounding * x.abs().clamp(min=1)) | (
            error.abs() <= rounding * target.abs().clamp(min=1)
        )
        if there.all():
            break
        fast = (x + step > low) & (x + step < high) & (step.abs() <= last / 2)
        before, x = x, torch.where(there, x, torch.where(fast, x + step, (low + high) / 2))
        last = (x - before).abs()
    return x
