"""Where a process can be stopped: at a random moment, or at the Nth time that it is about to write, flush, rename, link or delete."""

import builtins
import io
import os
import random
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("fsync", "rename", "replace", "link", "unlink", "mkdir")
Fault = Callable[[], None]


def kill_at(point: int, share: float) -> Callable[[], None]:
    """What makes a child kill itself at this point; inside a write, once this share of the bytes is on its way to the disk."""

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return lambda: watch(_Counter(point, share, stop))


def count_into(path: Path) -> Callable[[], None]:
    """What makes a child keep the number of points that it has come by in the file at `path`."""
    return lambda: watch(_Counter(0, 0.0, lambda: None, os.open(path, os.O_WRONLY | os.O_CREAT)))


class _Counter:
    """Counts points; at number `point` it calls `fault`, after the `share` of a write."""

    def __init__(self, point: int, share: float, fault: Fault, file: int | None = None):
        self.point, self.share, self.fault, self.file, self.passed = point, share, fault, file, 0

    def __call__(self) -> bool:
        self.passed += 1
        if self.file is not None:
            os.pwrite(self.file, b"%d" % self.passed, 0)
        return self.passed == self.point


def watch(counter: _Counter) -> None:
    """Patch this process: files opened to write, and what `os` does to names."""

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            if counter():
                super().write(memoryview(data)[: int(counter.share * memoryview(data).nbytes)])
                counter.fault()
            return super().write(data) or 0

    whole = builtins.open

    def opened(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: Any = None,
        errors: Any = None,
        *rest: Any,
        **named: Any,
    ) -> Any:
        binary = mode.replace("b", "").replace("t", "")
        if not set(mode) & set("wax") or isinstance(file, int) or str(file).startswith("/dev/"):
            return whole(file, mode, buffering, encoding, errors, *rest, **named)
        buffered = (
            io.BufferedRandom(Raw(file, binary))
            if "+" in mode
            else io.BufferedWriter(Raw(file, binary))
        )
        return (
            buffered
            if "b" in mode
            else io.TextIOWrapper(
                buffered, encoding or "utf-8", errors, line_buffering=buffering == 1
            )
        )

    builtins.open = io.open = opened
    for name in CALLS:
        setattr(os, name, _counted(getattr(os, name), counter))


def _counted(call: Callable[..., Any], counter: _Counter) -> Callable[..., Any]:
    def counted(*arguments: Any, **named: Any) -> Any:
        if not counter():
            return call(*arguments, **named)
        if counter.share < 0.5:  # before, or after
            counter.fault()
        found = call(*arguments, **named)
        counter.fault()
        return found

    return counted


def send_after(seconds: float, number: signal.Signals) -> Callable[[int], None]:
    """What sends a process this signal after so long, if it is still there."""

    def wait(pid: int) -> None:
        handle = os.pidfd_open(pid)
        if not select.select([handle], [], [], seconds)[0]:
            signal.pidfd_send_signal(handle, number)
        os.close(handle)

    return wait


def drawn(seed: int, *place: object) -> random.Random:
    """The random numbers of one fault, the same for ever."""
    return random.Random(" ".join(map(str, (seed, *place))))
