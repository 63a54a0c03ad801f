"""Recovery from losses that are not finite: skip the step, roll back, and name the culprit."""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowgen.utils.errors import UserError

MAX_FAILED_STEPS = 5  # consecutive failures before training rolls back
MAX_REWINDS = 3  # rollbacks without success before training gives up
RECOVERED_AFTER_STEPS = 1000  # steps past a failure after which a rollback counts as a success
log = logging.getLogger("flowgen")


@dataclass
class NaNRecovery:
    """Counters of failed steps, saved in every checkpoint.

    Attributes:
        failed: consecutive failed steps.
        skipped: failed steps in total.
        rewinds: rollbacks since the last one that succeeded.
        failed_at: the step of the last rollback.
        rewound_to: the step of the checkpoint that it restored.
        lr_scale: factor of the learning rate, halved by every rollback.
    """

    failed: int = 0
    skipped: int = 0
    rewinds: int = 0
    failed_at: int = -1
    rewound_to: int = -1
    lr_scale: float = 1.0

    def record(self, values: Iterable[float], buffers: Iterable[Tensor]) -> bool:
        """Count a step with these loss and gradient norm; return whether training must roll back.

        It must after `MAX_FAILED_STEPS` failures, or if a failed forward pass left `buffers`
        (running statistics, Markov chains) that are not finite.
        """
        if all(map(math.isfinite, values)):
            self.failed = 0
            return False
        self.failed += 1
        self.skipped += 1
        return self.failed == MAX_FAILED_STEPS or not all(
            bool(buffer.isfinite().all()) for buffer in buffers
        )

    def rewind(
        self,
        latest_valid_checkpoint: Callable[[float], dict[str, Any] | None],
        step: int,
        culprit: str,
        lr: float,
    ) -> dict[str, Any]:
        """Return the checkpoint to restore, and halve the learning rate.

        The first rollback takes the latest checkpoint, a repeated one an older checkpoint.

        Args:
            latest_valid_checkpoint: `Run.latest_valid_checkpoint`.
            step: the optimizer step that failed, from 1.
            culprit: the output of `first_nonfinite_module`.
            lr: the configured learning rate, which the log line multiplies by `lr_scale`.

        Raises:
            UserError: if `MAX_REWINDS` rollbacks did not help.
        """
        again = step <= self.failed_at + RECOVERED_AFTER_STEPS
        if again and self.rewinds == MAX_REWINDS:
            raise UserError(
                f"the loss is not finite, first at {culprit}, and {MAX_REWINDS} rollbacks, each "
                f"with half the learning rate, did not help: train again with trainer.lr below "
                f"{lr * self.lr_scale:.2g}, or a smaller trainer.grad_clip"
            )
        self.rewinds = self.rewinds + 1 if again else 1
        checkpoint = latest_valid_checkpoint(self.rewound_to if self.rewinds > 1 else math.inf)
        assert checkpoint is not None  # the trainer saves one before the first step
        self.failed = 0
        self.failed_at = step
        self.rewound_to = checkpoint["step"]
        self.lr_scale /= 2
        log.warning(
            "step %d: the loss is not finite, first at %s: "
            "back to step %d with a learning rate of %.2g",
            step,
            culprit,
            self.rewound_to,
            lr * self.lr_scale,
        )
        return checkpoint


@torch.no_grad()
def first_nonfinite_module(model: nn.Module, replay: Callable[[], object]) -> str:
    """Return the name of the module or gradient that first became NaN or infinite.

    Args:
        model: the model as the failed step left it, with its gradients.
        replay: a function that runs the forward passes of the failed step again.

    Returns:
        the first module whose output is not finite, else the first parameter whose gradient is
        not finite, else "the loss".
    """
    names = {module: name for name, module in model.named_modules() if name}
    culprits: list[str] = []

    def hook(module: nn.Module, inputs: object, output: object) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        finite = all(tensor.isfinite().all() for tensor in tensors if isinstance(tensor, Tensor))
        if module in names and not finite:
            culprits.append(f"{names[module]} ({type(module).__name__})")

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        replay()
    finally:
        handle.remove()
    culprits += [
        f"the gradient of {name}"
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    return culprits[0] if culprits else "the loss"
