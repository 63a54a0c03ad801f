"""Optimizers and the learning-rate schedule."""

import re
from collections.abc import Sequence

import torch

from flowgen.utils.errors import UserError

OPTIMIZERS = ("adam", "sgd")


def build_optimizer(
    model: torch.nn.Module,
    name: str,
    lr: float,
    *,
    momentum: float = 0.9,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters of a model.

    Args:
        model: The model.
        name: "adam" (AdamW) or "sgd" (with momentum).
        lr: Learning rate.
        momentum: Momentum of "sgd".
        betas: Decay rates of the first and second moments of "adam".
        weight_decay: Weight decay of "adam", decoupled from the gradient.
    """
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, fused=True)
    return torch.optim.AdamW(
        model.parameters(),
        lr=lr,
        betas=(betas[0], betas[1]),
        weight_decay=weight_decay,
        fused=True,
    )


def learning_rate_factor(
    step: int, fraction_done: float, warmup: int, warmdown_ratio: float
) -> float:
    """Return the fraction of the full learning rate for one optimizer step.

    The rate rises linearly over the first `warmup` steps, min(1, (step + 1) / warmup). It falls
    linearly to zero over the last part of training, min(1, (1 - fraction_done) / warmdown_ratio).

    Args:
        step: Number of the optimizer step, from 0.
        fraction_done: Fraction of training that is finished, 0 to 1.
        warmup: Number of warm-up steps; 0 for none.
        warmdown_ratio: Fraction of training over which the rate falls; 0 for none.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    fall = min(1.0, max(0.0, 1.0 - fraction_done) / warmdown_ratio) if warmdown_ratio else 1.0
    return rise * fall


def warmup_steps(warmup: int | str, num_images: int, batch_size: int) -> int:
    """Return `warmup` in optimizer steps.

    Args:
        warmup: Number of steps, or a number of epochs such as "1 epoch".
        num_images: Number of training images, which make one epoch.
        batch_size: Images per optimizer step.

    Raises:
        UserError: If `warmup` is neither.
    """
    if isinstance(warmup, int) and not isinstance(warmup, bool) and warmup >= 0:
        return warmup
    epochs = re.fullmatch(r"(\d+(?:\.\d+)?) epochs?", str(warmup))
    if not epochs:
        raise UserError(
            f"warmup must be a number of steps, or of epochs as in '1 epoch', not {warmup!r}"
        )
    return round(float(epochs[1]) * num_images / batch_size)
