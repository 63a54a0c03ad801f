"""Recovery from losses that are not finite: skip the step, rewind, name the first bad module."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

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
        """Count a step with these metrics, and return whether training must rewind.

        Training must rewind after `MAX_FAILED_STEPS` consecutive failures, or if a buffer (running
        statistics, Markov chains) is not finite after a failed step.
        """
        if all(map(math.isfinite, values)):
            self.failed = 0
            return False
        self.failed += 1
        self.skipped += 1
        return self.failed == MAX_FAILED_STEPS or not all(
            bool(buffer.isfinite().all()) for buffer in buffers
        )

    def rewind_limit(self, failed_step: int) -> float:
        """Return the step before which the checkpoint of the next rewind must be.

        The first rewind restores the latest checkpoint, a repeated one an older checkpoint.
        """
        return self.rewound_to if self.rewinds and self._is_repeated(failed_step) else math.inf

    def count_rewind(self, step: int, failed_step: int, bad_module: str, lr: float) -> None:
        """Count a rewind, and halve the learning rate.

        Args:
            step: Optimizer step of the checkpoint to restore.
            failed_step: Optimizer step that failed, from 1.
            bad_module: Result of `first_nonfinite_module`.
            lr: Configured learning rate, which is multiplied by `lr_scale`.

        Raises:
            UserError: If `MAX_REWINDS` rewinds did not help.
        """
        again = self._is_repeated(failed_step)
        check(
            not again or self.rewinds < MAX_REWINDS,
            f"the loss is still not finite after {MAX_REWINDS} rewinds, each of which halved the "
            f"learning rate (first non-finite value: {bad_module}): train again with trainer.lr "
            f"below {lr * self.lr_scale:.2g}, or a smaller trainer.grad_clip",
        )
        self.rewinds = self.rewinds + 1 if again else 1
        self.failed = 0
        self.failed_at = failed_step
        self.rewound_to = step
        self.lr_scale /= 2
        log.warning(
            "step %d: the loss is not finite (first non-finite value: %s): "
            "back to step %d with a learning rate of %.2g",
            failed_step,
            bad_module,
            step,
            lr * self.lr_scale,
        )

    def _is_repeated(self, failed_step: int) -> bool:
        return failed_step <= self.failed_at + RECOVERED_AFTER_STEPS


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
    bad_modules: list[str] = []

    def hook(module: nn.Module, inputs: object, output: object) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        finite = all(tensor.isfinite().all() for tensor in tensors if isinstance(tensor, Tensor))
        if module in names and not finite:
            bad_modules.append(f"{names[module]} ({type(module).__name__})")

    with nn.modules.module.register_module_forward_hook(hook):
        replay()
    bad_modules += [
        f"the gradient of {name}"
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    return bad_modules[0] if bad_modules else "the loss"
