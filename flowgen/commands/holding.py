"""A run's folder while it is trained: one process has it, and its messages go there."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator

from flowgen.errors import FlowgenError
from flowgen.training.run import Run

log = logging.getLogger("flowgen")


class TakenError(FlowgenError):
    """The folder is another run's."""


@contextlib.contextmanager
def sole_trainer_of(run: Run) -> Iterator[None]:
    """Hold the run's folder, which two processes would spoil for one another. Raises TakenError where another one has it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    run.check_place()
    with open(run.log, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TakenError(f"{run.folder} is being trained by another process: wait for it, or choose another out=") from error
        try:
            yield
        finally:
            if not run.config.exists():
                run.log.unlink(missing_ok=True)


@contextlib.contextmanager
def logging_to(run: Run) -> Iterator[None]:
    """Messages go to the screen, above the progress bar, and with the time to `train.log`, where an error leaves its traceback."""
    file = logging.FileHandler(run.log)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    try:
        yield
    except Exception:
        log.debug("training ended with an error", exc_info=True)
        raise
    finally:
        log.removeHandler(file)
        file.close()
