"""How long training goes on, and how often things happen on the way."""

import math
from dataclasses import dataclass

from flowgen.errors import FlowgenError, check_number, check_whole

SHORTEST = 0.001  # minutes


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """Training ends after `steps` or `minutes`, whichever comes first, or after `patience` evaluations in a row without a better figure.

    Intervals are in steps, `conf/trainer/` says of what. Raises FlowgenError for what is no such thing.
    """

    steps: int | None
    minutes: float | None
    log_every: int
    evaluate_every: int
    evaluate_images: int | None
    sample_every: int
    sample_temperature: float
    save_every: int
    keep_every: int
    keep_at: list[int]
    patience: int | None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise FlowgenError("training has no end: set trainer.steps or trainer.minutes")
        if self.steps is not None:
            check_whole(steps=self.steps)
        if self.minutes is not None:
            check_number(SHORTEST, minutes=self.minutes)
        check_whole(log_every=self.log_every, evaluate_every=self.evaluate_every, sample_every=self.sample_every)
        check_whole(save_every=self.save_every, keep_every=self.keep_every)
        check_number(sample_temperature=self.sample_temperature)
        if self.patience is not None:
            check_whole(patience=self.patience)
        if self.evaluate_images is not None:
            check_whole(evaluate_images=self.evaluate_images)
        if not isinstance(self.keep_at, list):
            raise FlowgenError(f"keep_at must be a list of steps, as in trainer.keep_at=[1000,5000], not {self.keep_at!r}")
        for step in self.keep_at:
            check_whole(keep_at=step)

    def progress(self, step: int, seconds: float) -> float:
        """The share of the training that is done after so many steps and seconds, from 0 on; at 1 it ends."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(by_steps, by_time)

    def due(self, what: str, step: int) -> bool:
        """Whether it is time to `log`, `evaluate`, `sample` or `save`; what has no interval is left to the end."""
        return step % getattr(self, f"{what}_every", math.inf) == 0

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of this step is kept."""
        return step % self.keep_every == 0 or step in self.keep_at
