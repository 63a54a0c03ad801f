"""What the user is told: messages on standard error, and one sentence for an error of any kind."""

import errno
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from flowgen.utils.errors import UserError
from flowgen.utils.launcher import is_worker


def setup_logging() -> None:
    """Messages go to standard error, above a progress bar where one is drawn."""
    from tqdm import tqdm

    class Screen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(escape_control(self.format(record)), file=sys.stderr)

    log = logging.getLogger("flowgen")
    log.setLevel(logging.DEBUG)
    log.propagate = False
    if not log.handlers:
        screen = Screen(logging.ERROR if is_worker() else logging.INFO)
        log.addHandler(screen)


def escape_control(text: str) -> str:
    """With what would move a terminal's cursor or change its colours, or is half a character, spelt out: names may be anybody's."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text
    )


def user_message(error: Exception) -> str:
    """One line for an error, whatever it is."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full: make room, then go on from the last good checkpoint with `flowgen resume RUN`"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the disk'}: {error.strerror}"
    if (
        isinstance(error, MemoryError)
        or "out of memory" in str(error)
        or "can't allocate memory" in str(error)
    ):
        return "not enough memory: choose a smaller trainer.batch_size, --count or model.width, or set trainer.grad_accum_steps=2"
    if "InvalidCxxCompiler" in str(error):
        return "trainer.compile=true needs a C++ compiler, and there is none: install g++, or leave it at false"
    return f"{type(error).__name__}: {' '.join(str(error).split())} (this is a fault of flowgen: --debug shows where)"


log = logging.getLogger("flowgen")
T = TypeVar("T")
ENOUGH = 10.0  # seconds of work, after which it is known how fast it goes
LONG = 60.0  # seconds to go that are worth a line


class Progress(Protocol):
    def __call__(self, steps: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
        """The same `steps`, of which there are `total`; `what` names the work."""


def no_progress(steps: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Shows nothing."""
    return steps


def progress_bar(steps: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """A bar on standard error while the steps are taken, where that is a terminal; elsewhere a line on how long they will take."""
    from tqdm import tqdm

    shown = tqdm(steps, desc=what, total=total, unit="", disable=None, leave=False)
    return _with_outlook(shown, what, total) if shown.disable and total else shown


def _with_outlook(steps: Iterable[T], what: str, total: int) -> Iterator[T]:
    outlook = EtaLogger(what, 0, total)
    for number, step in enumerate(steps):
        outlook.at(number)
        yield step


class EtaLogger:
    """Says once, in a line, how long the rest of long work will take; places are counted from `start` to `end`."""

    def __init__(self, what: str, start: float, end: float):
        self.what, self.start, self.end, self.began, self.said = (
            what,
            start,
            end,
            time.monotonic(),
            False,
        )

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
