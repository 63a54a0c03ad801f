"""Stopping on Ctrl-C, on SIGTERM or at the end of a job's time, without losing the step in hand."""

import signal
import threading
from types import FrameType, TracebackType
from typing import NoReturn

QUEUE = (
    signal.SIGUSR1,
    signal.SIGUSR2,
)  # by which a launcher learns that its job will be stopped and queued again


class GracefulStop:
    """While entered, remembers SIGINT or SIGTERM in `signal` in place of dying; a second one interrupts at once.

    So too what a launcher listens to, which is to have it once the run is saved: see `pass_on`.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> "GracefulStop":
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            default = [signal.SIGTERM] * (
                signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            )  # else a launcher has its reasons
            numbers = [
                signal.SIGINT,
                *default,
                *(number for number in QUEUE if callable(signal.getsignal(number))),
            ]
            self._handlers = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


def reraise_signal(number: int) -> NoReturn:
    """Exit as one whom this signal stopped, unless a launcher's handler, which queues the job again, does so first."""
    if number in QUEUE:
        signal.raise_signal(number)
    raise SystemExit(128 + number)
