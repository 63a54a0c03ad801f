"""What is done where numbers stop being numbers: steps are skipped, training goes back, and the culprit is named."""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowgen.utils.errors import UserError

PATIENCE = 5  # steps in a row that may fail before training goes back
REWINDS = 3  # times that training goes back before it gives up
HELPED = 1000  # steps past a failure after which a return has helped
log = logging.getLogger("flowgen")


@dataclass
class NaNRecovery:
    """The failures of a training: `failed` steps in a row, `skipped` ones in all, `rewinds` since the last that helped.

    The learning rate is to be multiplied by `lr_scale`, which every return halves.
    """

    failed: int = 0
    skipped: int = 0
    rewinds: int = 0
    failed_at: int = -1
    rewound_to: int = -1
    lr_scale: float = 1.0

    def record(self, finite: bool, buffers: Iterable[Tensor]) -> bool:
        """Count a step; whether training must go back: after `PATIENCE` failures, or one that spoilt what a forward pass itself changes."""
        if finite:
            self.failed = 0
            return False
        self.failed, self.skipped = self.failed + 1, self.skipped + 1
        return self.failed == PATIENCE or not all(
            bool(buffer.isfinite().all()) for buffer in buffers
        )

    def rewind(
        self,
        latest_valid_checkpoint: Callable[[float], dict[str, Any] | None],
        step: int,
        culprit: str,
        lr: float,
    ) -> dict[str, Any]:
        """The checkpoint to go back to from `step`, trained at `lr` times `lr_scale`: the last good one, at a second return an older one.

        `last_good` is that of a `Run`.
        Raises FlowgenError where `REWINDS` returns did not help.
        """
        again = step <= self.failed_at + HELPED
        if again and self.rewinds == REWINDS:
            raise UserError(
                f"the loss is not finite, first at {culprit}, and {REWINDS} returns with half the learning rate each did not help: "
                f"train again with trainer.lr below {lr * self.lr_scale:.2g}, or a smaller trainer.grad_clip"
            )
        self.rewinds = self.rewinds + 1 if again else 1
        checkpoint = latest_valid_checkpoint(self.rewound_to if self.rewinds > 1 else math.inf)
        assert checkpoint is not None  # one is written before the first step
        self.failed, self.failed_at, self.rewound_to, self.lr_scale = (
            0,
            step,
            checkpoint["step"],
            self.lr_scale / 2,
        )
        where = "step %d: the loss is not finite, first at %s: back to step %d with a learning rate of %.2g"
        log.warning(where, step, culprit, self.rewound_to, lr * self.lr_scale)
        return checkpoint


@torch.no_grad()
def first_nonfinite_module(model: nn.Module, replay: Callable[[], object]) -> str:
    """The name of the first module whose output is not finite in `replay`, the failed step; else the parameter whose gradient is not.

    Gradients are read off the parameters as the failed step left them.
    """
    bad: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not all(
                torch.isfinite(tensor).all() for tensor in tensors if isinstance(tensor, Tensor)
            ):
                bad.append(f"{name} ({type(module).__name__})")

        return hook

    handles = [
        module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name
    ]
    try:
        replay()
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            bad.append(f"the gradient of {name}")
            break
    return bad[0] if bad else "the loss"
