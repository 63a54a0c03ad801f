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
        self._asked: dict[str | None, threading.Event] = {}  # what stops each question that waits or is answered

    @contextmanager
    def take(self, doing: str, question: str | None = None) -> Iterator[None]:
        """Wait for the turn and take it. Raises FlowgenError where the `question` that it is for has been stopped."""
        stopped = self._asked[question] = threading.Event()
        try:
            with self._lock:
                _check(stopped)
                self.doing, self._stopped = doing, stopped
                try:
                    yield
                finally:
                    self.doing = ""
        finally:
            self._asked.pop(question, None)

    def stop(self, question: str) -> None:
        """End the work on a question, where it waits for its turn or goes by `watched` steps: it raises FlowgenError."""
        if stopped := self._asked.get(question):
            stopped.set()

    def watched(self, steps: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """A `Progress` for work within a turn."""
        for number, step in enumerate(steps):
            _check(self._stopped)
            self.doing = f"{what}: {number} of {total}"
            yield step

    def each(self, steps: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """A `Progress` that takes a turn for every step, so that others come in between."""
        for step in steps:
            with self.take(what):
                yield step
            time.sleep(0.01)  # in which another thread takes the lock


def _check(stopped: threading.Event) -> None:
    if stopped.is_set():
        raise FlowgenError("stopped")
