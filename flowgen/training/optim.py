"""Optimizers, the learning-rate schedule and exponential moving averages (EMA) of the weights."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from flowgen.utils.errors import UserError

OPTIMIZERS = ("adam", "sgd")


def build_optimizer(
    model: nn.Module,
    name: str,
    lr: float,
    *,
    momentum: float = 0.9,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters of `model`: `adam` is AdamW, `sgd` has momentum."""
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, fused=True)
    return torch.optim.AdamW(
        model.parameters(),
        lr=lr,
        betas=(betas[0], betas[1]),
        weight_decay=weight_decay,
        fused=True,
    )


def learning_rate_factor(step: int, progress: float, warmup: int, warmdown_ratio: float) -> float:
    """Return the fraction of the full learning rate for one optimizer step.

    The rate rises linearly over the first `warmup` steps, min(1, (step + 1) / warmup). It falls
    linearly to zero over the last part of training, min(1, (1 - progress) / warmdown_ratio).

    Args:
        step: the number of the optimizer step, from 0.
        progress: the fraction of training that is finished, 0 to 1.
        warmup: number of warm-up steps; 0 for none.
        warmdown_ratio: the fraction of training over which the rate falls; 0 for none.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    fall = min(1.0, max(0.0, 1.0 - progress) / warmdown_ratio) if warmdown_ratio else 1.0
    return rise * fall


def warmup_steps(warmup: int | str, num_images: int, batch_size: int) -> int:
    """Return `warmup` in optimizer steps.

    Args:
        warmup: a number of steps, or a number of epochs such as "1 epoch".
        num_images: number of training images, which make one epoch.
        batch_size: images per optimizer step.

    Raises:
        UserError: if `warmup` is neither.
    """
    if isinstance(warmup, int) and not isinstance(warmup, bool) and warmup >= 0:
        return warmup
    epochs = re.fullmatch(r"(\d+(?:\.\d+)?) epochs?", str(warmup))
    if not epochs:
        raise UserError(
            f"warmup must be a number of steps, or of epochs as in '1 epoch', not {warmup!r}"
        )
    return round(float(epochs[1]) * num_images / batch_size)


def ema_decays(ema_decay: float | Sequence[float]) -> list[float]:
    """Return `trainer.ema_decay`, one number or several, as a list."""
    if isinstance(ema_decay, Sequence) and not isinstance(ema_decay, str):
        return list(ema_decay)
    return [ema_decay]


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of `model` whose weights are an exponential moving average of the model's.

    The memory grows with training: the decay of update n is min(decay, (1 + n) / (10 + n)).
    """

    @torch.no_grad()
    def update(averages: Any, weights: Any, num_averaged: Any) -> None:
        count = int(num_averaged)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + count) / (10 + count)))

    return AveragedModel(model, multi_avg_fn=update)


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the 2-norm of all gradients of `model` together."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients)
