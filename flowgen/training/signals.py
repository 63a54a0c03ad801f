"""Stop training on Ctrl-C, SIGTERM, SIGHUP or a cluster's warning signal after a step."""

import signal
import threading
from contextlib import ExitStack
from types import FrameType
from typing import NoReturn, Self

# Slurm and submitit announce with these that the job will be stopped and queued again.
REQUEUE_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)

# A closed terminal sends SIGHUP.
TERMINATION_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class GracefulStop(ExitStack):
    """Context manager that stores a stop signal in `signal` instead of ending the process.

    A second signal interrupts at once. Signals for which a launcher has installed a handler are
    stored too; `reraise_signal` passes them on once the run is saved.
    """

    def __init__(self) -> None:
        super().__init__()
        self.signal: int | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            numbers = [number for number in REQUEUE_SIGNALS if callable(signal.getsignal(number))]
            for number in TERMINATION_SIGNALS:
                if signal.getsignal(number) == signal.SIG_DFL:  # else a launcher or nohup decides
                    numbers.append(number)
            for number in (signal.SIGINT, *numbers):
                self.callback(signal.signal, number, signal.signal(number, self._store))
        return self

    def _store(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


def reraise_signal(number: int) -> NoReturn:
    """Exit with the status of a process that this signal ended.

    A launcher's handler, which queues the job again, runs first.
    """
    if number in REQUEUE_SIGNALS:
        signal.raise_signal(number)
    raise SystemExit(128 + number)
