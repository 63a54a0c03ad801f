"""The learning rate as a function of where training stands."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowgen.utils.errors import UserError, check_choice, check_number, check_whole


def learning_rate_factor(step: int, progress: float, warmup: int, warmdown_ratio: float) -> float:
    """The share of the full learning rate for update `step` (from 0), when `progress` of the training, 0 to 1, is done.

    It rises linearly over the first `warmup` updates, min(1, (step+1)/warmup), and falls linearly to zero over the last `decay` of
    the training, min(1, (1-progress)/decay); a decay of 0 leaves it constant.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    fall = min(1.0, max(0.0, 1.0 - progress) / warmdown_ratio) if warmdown_ratio else 1.0
    return rise * fall


def warmup_steps(warmup: int | str, images: int, batch_size: int) -> int:
    """`warmup` in steps: a whole number is one already, "1 epoch" counts passes over the `images` of the training split.

    Raises FlowgenError for anything else.
    """
    if isinstance(warmup, int) and not isinstance(warmup, bool) and warmup >= 0:
        return warmup
    epochs = re.fullmatch(r"(\d+(?:\.\d+)?) epochs?", str(warmup))
    if not epochs:
        raise UserError(
            f"warmup must be a number of steps, or of epochs as in '1 epoch', not {warmup!r}"
        )
    return round(float(epochs[1]) * images / batch_size)


OPTIMIZERS = ("adam", "sgd")


def decays(ema_decay: float | Sequence[float]) -> list[float]:
    """Of each average, where `trainer.ema_decay` is one number or several."""
    return (
        list(ema_decay)
        if isinstance(ema_decay, Sequence) and not isinstance(ema_decay, str)
        else [ema_decay]
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam with decoupled weight decay, or descent with momentum: linear warm-up, clipped gradients, averaged weights.

    `conf/trainer/` explains the fields. Raises FlowgenError for values that make no sense.
    """

    batch_size: int
    grad_accum_steps: int
    optimizer: str
    momentum: float
    lr: float
    warmup: int | str
    warmdown_ratio: float
    grad_clip: float
    ema_decay: float | Sequence[float]
    init_images: int
    betas: Sequence[float]
    weight_decay: float

    def __post_init__(self) -> None:
        check_whole(
            batch_size=self.batch_size,
            grad_accum_steps=self.grad_accum_steps,
            init_images=self.init_images,
        )
        check_choice(OPTIMIZERS, optimizer=self.optimizer)
        check_number(
            lr=self.lr,
            warmdown_ratio=self.warmdown_ratio,
            grad_clip=self.grad_clip,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        if not isinstance(self.betas, Sequence) or len(self.betas) != 2:
            raise UserError(
                f"betas must be two numbers, as in trainer.betas=[0.9,0.95], not {self.betas!r}"
            )
        if not self.ema_decays:
            raise UserError(
                "ema must be a number, 0 for none, or several, as in trainer.ema_decay=[0.99,0.999], not []"
            )
        for beta in self.betas:
            check_number(betas=beta)
        for average in self.ema_decays:
            check_number(ema_decay=average)
        if self.warmdown_ratio > 1 or max(*self.ema_decays, self.momentum, *self.betas) >= 1:
            below = f"{self.ema_decay}, {self.momentum} and {self.betas}"
            raise UserError(
                f"decay must be at most 1, not {self.warmdown_ratio}, and ema, momentum and betas below 1, not {below}"
            )
        if self.batch_size % self.grad_accum_steps:
            raise UserError(
                f"batch_size={self.batch_size} cannot be split into accumulate={self.grad_accum_steps} equal parts"
            )
        warmup_steps(self.warmup, 1, 1)

    @property
    def ema_decays(self) -> list[float]:
        """How long each average of the weights remembers them."""
        return decays(self.ema_decay)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                model.parameters(), lr=self.lr, momentum=self.momentum, fused=True
            )
        first, second = self.betas
        return torch.optim.AdamW(
            model.parameters(),
            lr=self.lr,
            betas=(first, second),
            weight_decay=self.weight_decay,
            fused=True,
        )

    def rate(self, step: int, progress: float, images: int) -> float:
        """The learning rate of update `step` (from 0) at this share of the training, over so many images."""
        return self.lr * learning_rate_factor(
            step, progress, warmup_steps(self.warmup, images, self.batch_size), self.warmdown_ratio
        )

    def parts(self, images: Tensor, labels: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """A batch in the parts that go through the model one after the other."""
        pieces = images.chunk(self.grad_accum_steps)
        return list(
            zip(
                pieces,
                [None] * len(pieces) if labels is None else labels.chunk(self.grad_accum_steps),
                strict=True,
            )
        )

    def clip_gradients(self, model: nn.Module, norm: Tensor) -> None:
        """Scale all gradients, whose norm this is, so that it is at most `clip`."""
        if self.grad_clip:
            nn.utils.clip_grads_with_norm_(model.parameters(), self.grad_clip, norm)


def gradient_norm(model: nn.Module) -> Tensor:
    return nn.utils.get_total_norm(
        [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    )
