"""The learning rate as a function of where training stands."""

import re

from flowgen.errors import FlowgenError


def learning_rate_factor(step: int, progress: float, warmup: int, decay: float) -> float:
    """The share of the full learning rate for update `step` (from 0), when `progress` of the training, 0 to 1, is done.

    It rises linearly over the first `warmup` updates, min(1, (step+1)/warmup), and falls linearly to zero over the last `decay` of
    the training, min(1, (1-progress)/decay); a decay of 0 leaves it constant.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    fall = min(1.0, max(0.0, 1.0 - progress) / decay) if decay else 1.0
    return rise * fall


def warmup_steps(warmup: int | str, images: int, batch_size: int) -> int:
    """`warmup` in steps: a whole number is one already, "1 epoch" counts passes over the `images` of the training split.

    Raises FlowgenError for anything else.
    """
    if isinstance(warmup, int) and not isinstance(warmup, bool) and warmup >= 0:
        return warmup
    epochs = re.fullmatch(r"(\d+(?:\.\d+)?) epochs?", str(warmup))
    if not epochs:
        raise FlowgenError(f"warmup must be a number of steps, or of epochs as in '1 epoch', not {warmup!r}")
    return round(float(epochs[1]) * images / batch_size)
