"""How far long work has come: the floors of mathematics hand their steps to a `Progress`, and commands choose one that shows a bar."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")
ENOUGH = 10.0  # seconds of work, after which it is known how fast it goes
LONG = 60.0  # seconds to go that are worth a line
log = logging.getLogger("flowgen")


class Progress(Protocol):
    def __call__(self, steps: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
        """The same `steps`, of which there are `total`; `what` names the work."""


def unseen(steps: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Shows nothing."""
    return steps


def bar(steps: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """A bar on standard error while the steps are taken, where that is a terminal; elsewhere a line on how long they will take."""
    from tqdm import tqdm

    shown = tqdm(steps, desc=what, total=total, unit="", disable=None, leave=False)
    return _with_outlook(shown, what, total) if shown.disable and total else shown


def _with_outlook(steps: Iterable[T], what: str, total: int) -> Iterator[T]:
    outlook = Outlook(what, 0, total)
    for number, step in enumerate(steps):
        outlook.at(number)
        yield step


class Outlook:
    """Says once, in a line, how long the rest of long work will take; places are counted from `start` to `end`."""

    def __init__(self, what: str, start: float, end: float):
        self.what, self.start, self.end, self.began, self.said = what, start, end, time.monotonic(), False

    def at(self, place: float) -> None:
        """Where the work stands: after a while it is known how fast it goes."""
        passed = time.monotonic() - self.began
        if self.said or passed < ENOUGH or place <= self.start:
            return
        left = passed * (self.end - place) / (place - self.start)
        if left > LONG:
            log.info("%s: %d of %d, about %s to go", self.what, place, self.end, in_words(left))
        self.said = True


def in_words(seconds: float) -> str:
    """90 as "2 min", 7200 as "2 h"."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{math.ceil(seconds / 60)} min" if seconds > 60 else f"{seconds:.0f} s"
