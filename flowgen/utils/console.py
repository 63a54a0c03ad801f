"""Output on the terminal: log messages, progress bars and one-line errors."""

import errno
import logging
import math
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from flowgen.utils.errors import UserError, log
from flowgen.utils.processes import is_worker

T = TypeVar("T")
ETA_AFTER_SECONDS = 10.0  # of work, before its speed is known
MIN_REMAINING_SECONDS = 60.0  # shorter waits are not announced
MIN_TEXT_WIDTH = 30  # characters of the last column of a table
DISK_FULL = (
    "the disk is full: free some space and run the command again, or continue a training with "
    "`flowgen resume RUN`"
)
OUT_OF_MEMORY = (
    "not enough memory: choose a smaller trainer.batch_size, --count or model.width, "
    "or set trainer.grad_accum_steps=2"
)
EXPLANATIONS = {  # of errors of torch, by a phrase in their message
    "out of memory": OUT_OF_MEMORY,
    "can't allocate memory": OUT_OF_MEMORY,
    "Expected more than 1 value per channel": (
        "batch normalization needs more than one image at a time: "
        "set trainer.batch_size to at least 2 per micro-batch"
    ),
    "linalg.inv": "the weights diverged: lower trainer.lr or trainer.grad_clip",
    "InvalidCxxCompiler": (
        "trainer.compile=true needs a C++ compiler: install g++, or set it to false"
    ),
}


def setup_logging() -> None:
    """Send log messages to standard error, above the progress bar if there is one."""
    from tqdm import tqdm

    class ScreenHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(escape_control(self.format(record)), file=sys.stderr)

    log.setLevel(logging.DEBUG)
    log.propagate = False
    if not log.handlers:
        log.addHandler(ScreenHandler(logging.ERROR if is_worker() else logging.INFO))


def escape_control(text: str) -> str:
    """Escape control characters and lone surrogates, which untrusted names may contain."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text
    )


def user_message(error: Exception) -> str:
    """Return one line that explains an error of any kind."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.strerror:
        if error.errno == errno.ENOSPC:
            return DISK_FULL
        path = str(error.filename or "the disk").removesuffix(".part")  # of a temporary file
        if isinstance(error, NotADirectoryError):
            return f"{path}: a folder of this path is a file: rename it, or choose another path"
        return f"{path}: {error.strerror}"
    if isinstance(error, MemoryError):
        return OUT_OF_MEMORY
    bug = (
        f"{type(error).__name__}: {' '.join(text.split())} "
        "(this is a bug in flowgen: --debug shows the traceback)"
    )
    return next((EXPLANATIONS[phrase] for phrase in EXPLANATIONS if phrase in text), bug)


class Progress(Protocol):
    """A function that wraps an iterable to show its progress."""

    def __call__(
        self, items: Iterable[T], description: str, total: int | None = None, /
    ) -> Iterable[T]:
        """Return an iterable over the same `items`; `total` is their number."""


def no_progress(items: Iterable[T], description: str, total: int | None = None, /) -> Iterable[T]:
    """Show nothing."""
    return items


def progress_bar(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Show a progress bar on a terminal, or log the remaining time once without one.

    Args:
        items: What to iterate over.
        description: Text before the bar.
        total: Number of items, or None.
    """
    from tqdm import tqdm

    bar = tqdm(items, desc=description, total=total, unit="", disable=None, leave=False)
    eta = EtaLogger(description, 0, total or 0)
    for index, item in enumerate(bar):
        if bar.disable and total:
            eta.update(index)
        yield item


class EtaLogger:
    """Log once how long the rest of long work will take.

    Args:
        description: Name of the work or its unit, such as "steps".
        start: Position at the beginning.
        end: Position at the end.
    """

    def __init__(self, description: str, start: float, end: float):
        self.description = description
        self.start = start
        self.end = end
        self.start_time = time.monotonic()
        self.finished = False

    def update(self, position: float) -> None:
        """Report the current position."""
        elapsed = time.monotonic() - self.start_time
        if self.finished or elapsed < ETA_AFTER_SECONDS or position <= self.start:
            return
        remaining = elapsed * (self.end - position) / (position - self.start)
        if remaining > MIN_REMAINING_SECONDS:
            log.info(
                "%s: %d of %d, about %s to go",
                self.description,
                position,
                self.end,
                format_duration(remaining),
            )
        self.finished = True


def format_table(rows: Sequence[Sequence[object]], width: int) -> list[str]:
    """Return the lines of a table of at most `width` characters; no cell is cut.

    The last column is wrapped. If the others leave too little room for it, the first column gets
    separate lines.

    Args:
        rows: Rows of equal length, usually with the titles first.
        width: Maximum length of a line, except for longer words.

    Example:
        >>> rows = [("model", "description"), ("nice", "additive couplings of networks")]
        >>> print("\\n".join(format_table(rows, 40)))
        model  description
        nice   additive couplings of networks
        >>> print("\\n".join(format_table(rows, 20)))
        model
          description
        nice
          additive couplings
          of networks
    """
    cells = [[escape_control(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    folded = width - sum(widths[:-1]) - 2 * len(widths[:-1]) < min(MIN_TEXT_WIDTH, widths[-1])
    lines = []
    for *row, text in cells:
        columns = [f"{cell:{size}}  " for cell, size in zip(row, widths, strict=False)]
        if folded:
            lines.append(row[0])
            columns[0] = "  "
        start = "".join(columns)
        wrapped = textwrap.wrap(
            text,
            width,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += wrapped or [start.rstrip()]
    return lines


def count_noun(number: int, noun: str) -> str:
    """Return a number and a noun, with a plural s unless the number is 1.

    Example:
        >>> count_noun(2, "thread")
        '2 threads'
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_duration(seconds: float) -> str:
    """Return 90 as "2 min", 7200 as "2 h".

    Example:
        >>> format_duration(7200)
        '2 h'
    """
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{math.ceil(seconds / 60)} min" if seconds > 60 else f"{seconds:.0f} s"
