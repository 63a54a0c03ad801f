"""Points at which a process is killed.

Each write, sync, rename, link or deletion of a file, and each new folder, is a point. A process can
be killed before or after it, or within a write. It can also be killed at a random moment.
"""

import builtins
import io
import os
import random
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

COUNTED_CALLS = ("fsync", "rename", "replace", "link", "unlink", "mkdir")  # of the module os


def kill_at(point: int, share: float) -> Callable[[], None]:
    """Return a function that makes its process kill itself at a point.

    Args:
        point: Number of the point, from 1.
        share: Share of the bytes of a write that reach the file before the kill. Other calls take
            place before the kill if the share is at least 0.5.
    """

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return lambda: install(PointCounter(point, share, kill))


def count_points(path: Path) -> Callable[[], None]:
    """Return a function that makes its process write the number of its points to a file."""
    return lambda: install(
        PointCounter(0, 0.0, lambda: None, os.open(path, os.O_WRONLY | os.O_CREAT))
    )


class PointCounter:
    """Counts points. The caller must call `action` at number `point`.

    Args:
        point: Number of the point of the action, from 1.
        share: See `kill_at`.
        action: The function to call.
        file: Descriptor of a file that the count is written to, or None.
    """

    def __init__(
        self, point: int, share: float, action: Callable[[], None], file: int | None = None
    ):
        self.point = point
        self.share = share
        self.action = action
        self.file = file
        self.count = 0

    def __call__(self) -> bool:
        """Count a point. Return True if it is the point of the action."""
        self.count += 1
        if self.file is not None:
            os.pwrite(self.file, b"%d" % self.count, 0)
        return self.count == self.point


def install(counter: PointCounter) -> None:
    """Patch `open` and the module os of this process so that they count points."""

    class CountingFile(io.FileIO):
        def write(self, data: Any) -> int:
            if counter():
                view = memoryview(data)
                super().write(view[: int(counter.share * view.nbytes)])
                counter.action()
            return super().write(data) or 0

    original_open = builtins.open

    def counting_open(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: Any = None,
        errors: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        is_written = bool(set(mode) & set("wax"))
        if not is_written or isinstance(file, int) or str(file).startswith("/dev/"):
            return original_open(file, mode, buffering, encoding, errors, *args, **kwargs)
        raw = CountingFile(file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        line_buffering = buffering == 1
        return io.TextIOWrapper(
            buffered, encoding or "utf-8", errors, line_buffering=line_buffering
        )

    builtins.open = io.open = counting_open
    for name in COUNTED_CALLS:
        setattr(os, name, _counting(getattr(os, name), counter))


def _counting(call: Callable[..., Any], counter: PointCounter) -> Callable[..., Any]:
    def counting_call(*args: Any, **kwargs: Any) -> Any:
        if not counter():
            return call(*args, **kwargs)
        if counter.share < 0.5:
            counter.action()
        result = call(*args, **kwargs)
        counter.action()
        return result

    return counting_call


def send_after(seconds: float, signal_number: signal.Signals) -> Callable[[int], None]:
    """Return a function that sends a signal to a process if it still runs after some time."""

    def wait_and_send(pid: int) -> None:
        handle = os.pidfd_open(pid)
        if not select.select([handle], [], [], seconds)[0]:
            signal.pidfd_send_signal(handle, signal_number)
        os.close(handle)

    return wait_and_send


def make_rng(seed: int, *key: object) -> random.Random:
    """Return the random number generator of one test case, seeded by the arguments."""
    return random.Random(" ".join(map(str, (seed, *key))))
