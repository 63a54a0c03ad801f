"""Whose turn it is: one thread at a time works with a model, and others see at what."""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

from flowgen.errors import FlowgenError

T = TypeVar("T")


def leave() -> NoReturn:
    """End the process at once and well: torch, at work in other threads, does not survive the interpreter's own end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Turns:
    """A lock around a model; `doing` says what is done in the turn that is taken, nothing where none is."""

    def __init__(self) -> None:
        self.doing = ""
        self._lock, self._stopped = threading.Lock(), threading.Event()

    @contextmanager
    def take(self, doing: str) -> Iterator[None]:
        with self._lock:
            self._stopped.clear()
            self.doing = doing
            try:
                yield
            finally:
                self.doing = ""

    def stop(self) -> None:
        """End the turn that is taken, where its work goes by `watched` steps: it raises FlowgenError."""
        self._stopped.set()

    def watched(self, steps: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """A `Progress` for work within a turn."""
        for number, step in enumerate(steps):
            if self._stopped.is_set():
                raise FlowgenError("stopped")
            self.doing = f"{what}: {number} of {total}"
            yield step

    def each(self, steps: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """A `Progress` that takes a turn for every step, so that others come in between."""
        for step in steps:
            with self.take(what):
                yield step
            time.sleep(0.01)  # in which another thread takes the lock
