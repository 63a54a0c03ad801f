"""What the user is told: messages on standard error, and one sentence for an error of any kind."""

import errno
import logging
import sys

from flowgen.errors import FlowgenError
from flowgen.launcher import follows


def show_messages() -> None:
    """Messages go to standard error, above a progress bar where one is drawn."""
    from tqdm import tqdm

    class Screen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(printable(self.format(record)), file=sys.stderr)

    log = logging.getLogger("flowgen")
    log.setLevel(logging.DEBUG)
    log.propagate = False
    if not log.handlers:
        screen = Screen(logging.ERROR if follows() else logging.INFO)
        log.addHandler(screen)


def printable(text: str) -> str:
    """With what would move a terminal's cursor or change its colours, or is half a character, spelt out: names may be anybody's."""
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


def one_sentence(error: Exception) -> str:
    """One line for an error, whatever it is."""
    if isinstance(error, FlowgenError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full: make room, then go on from the last good checkpoint with `flowgen resume RUN`"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the disk'}: {error.strerror}"
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "not enough memory: choose a smaller trainer.batch_size, --count or model.width, or set trainer.accumulate=2"
    if "InvalidCxxCompiler" in str(error):
        return "trainer.compile=true needs a C++ compiler, and there is none: install g++, or leave it at false"
    return f"{type(error).__name__}: {' '.join(str(error).split())} (this is a fault of flowgen: --debug shows where)"
