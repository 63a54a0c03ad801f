"""Recovery from losses that are not finite: skip the step, rewind, and name the culprit."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowgen.utils.errors import check, log

MAX_FAILED_STEPS = 5  # consecutive failures before training rewinds
MAX_REWINDS = 3  # rewinds without success before training gives up
RECOVERED_AFTER_STEPS = 1000  # steps past a failure after which a rewind counts as a success


@dataclass
class NaNRecovery:
    """Counters of failed steps, saved in every checkpoint.

    Attributes:
        failed: Consecutive failed steps.
        skipped: Failed steps in total.
        rewinds: Rewinds since the last one that succeeded.
        failed_at: Step of the failure before the last rewind.
        rewound_to: Step of the checkpoint that it restored.
        lr_scale: Factor of the learning rate, halved by every rewind.
    """

    failed: int = 0
    skipped: int = 0
    rewinds: int = 0
    failed_at: int = -1
    rewound_to: int = -1
    lr_scale: float = 1.0

    def record(self, values: Iterable[float], buffers: Iterable[Tensor]) -> bool:
        """Count a step with these loss and gradient norm; return whether training must rewind.

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

        The first rewind restores the latest checkpoint, a repeated one an older checkpoint.

        Args:
            latest_valid_checkpoint: `Run.latest_valid_checkpoint`.
            step: Optimizer step that failed, from 1.
            culprit: Result of `first_nonfinite_module`.
            lr: Configured learning rate, which the log line multiplies by `lr_scale`.

        Raises:
            UserError: If `MAX_REWINDS` rewinds did not help.
        """
        again = step <= self.failed_at + RECOVERED_AFTER_STEPS
        check(
            not again or self.rewinds < MAX_REWINDS,
            f"the loss is not finite, first at {culprit}, and {MAX_REWINDS} rewinds, each "
            f"with half the learning rate, did not help: train again with trainer.lr below "
            f"{lr * self.lr_scale:.2g}, or a smaller trainer.grad_clip",
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
        model: Model as the failed step left it, with its gradients.
        replay: Function that runs the forward passes of the failed step again.

    Returns:
        The first module whose output is not finite, else the first parameter whose gradient is
        not finite, else "the loss".
    """
    names = {module: name for name, module in model.named_modules() if name}
    culprits: list[str] = []

    def hook(module: nn.Module, inputs: object, output: object) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        finite = all(tensor.isfinite().all() for tensor in tensors if isinstance(tensor, Tensor))
        if module in names and not finite:
            culprits.append(f"{names[module]} ({type(module).__name__})")

    with nn.modules.module.register_module_forward_hook(hook):
        replay()
    culprits += [
        f"the gradient of {name}"
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    return culprits[0] if culprits else "the loss"
