"""Disks that fill up at a random byte or take nothing, signals, and clocks that jump."""

import contextlib
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from kills import Ground, Result, damaged, difference, go_on
from points import drawn, send_after
from trainings import TRAININGS
from zygote import Outcome, flowgen

ROOMY = 2**28  # bytes
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def can_mount(folder: Path) -> bool:
    with contextlib.suppress(OSError, subprocess.CalledProcessError), _disk(folder / "trial", 4096):
        return True
    return False


@contextlib.contextmanager
def _disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of its own, of so many bytes in memory."""
    folder.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "faults", str(folder)],
        check=True,
        capture_output=True,
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _change(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def _limit_files(size: int) -> None:
    """Where nothing can be mounted: no file may grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_disk(ground: Ground, seed: int, number: int) -> Result:
    """A training whose disk fills up; once there is room, it is gone on with, and compared."""
    random = drawn(seed, "disk", number)
    name = list(TRAININGS)[number % len(TRAININGS)]
    ground.left_alone(name)
    folder, run = (
        ground.folder / "disks" / str(number),
        ground.folder / "alone" / name.replace(", ", "-") / "run",
    )
    sizes = [path.stat().st_size for path in run.rglob("*") if path.is_file()]
    if ground.mounts:
        with _disk(folder, max(4096, int(random.random() * sum(sizes)))):
            ended = go_on(name, ground, folder, aside=ground.folder)
            _change(folder, f"size={ROOMY}")
            return _compare("full disk (tmpfs)", ground, name, folder, ended)
    folder.mkdir(parents=True)
    ended = go_on(
        name, ground, folder, prepare=partial(_limit_files, int(random.random() * max(sizes)))
    )
    return _compare("full disk (RLIMIT_FSIZE)", ground, name, folder, ended)


def _compare(kind: str, ground: Ground, name: str, folder: Path, ended: Outcome) -> Result:
    hit = int(ended.status != 0)
    if fault := ended.fault or damaged(folder / "run"):
        return Result(kind, name, hit, f"{fault}: {ended.last}")
    again = go_on(name, ground, folder) if hit else ended
    if again.status and "has ended" not in again.error:
        return Result(kind, name, hit, again.fault or again.last)
    return Result(kind, name, hit, difference(ground.left_alone(name), folder / "run"))


def read_only(ground: Ground, seed: int, number: int) -> Result:
    """What writes into a run says in a sentence that it cannot."""
    name = list(TRAININGS)[number % len(TRAININGS)]
    ground.left_alone(name)
    folder = ground.folder / "read-only" / str(number)
    with _disk(folder, ROOMY):
        shutil.copytree(ground.folder / "alone" / name.replace(", ", "-") / "run", folder / "run")
        _change(folder, "ro")
        commands = (
            ["resume", folder / "run", "trainer.steps=9"],
            ["sample", "--run", folder / "run"],
            ["report", folder / "run"],
        )
        ended = [flowgen(words, folder, aside=ground.folder) for words in commands]
    faults = [each.fault or ("" if each.status == 1 else "did not say so") for each in ended]
    return Result("read-only folder", name, len(ended), ", ".join(filter(None, faults)))


def signalled(ground: Ground, seed: int, number: int) -> Result:
    """SIGTERM and its like at a random moment: saved or not, the run goes on to the same end."""
    random = drawn(seed, "signal", number)
    name = list(TRAININGS)[number % len(TRAININGS)]
    alone, sent = ground.left_alone(name), SIGNALS[number % len(SIGNALS)]
    folder = ground.folder / "signals" / str(number)
    folder.mkdir(parents=True)
    ended = go_on(name, ground, folder, then=send_after(random.uniform(0, alone.seconds), sent))
    kind = f"{sent.name} at a moment"
    if ended.status not in (0, -sent, 128 + sent, 130):
        return Result(kind, name, 1, ended.fault or f"status {ended.status}: {ended.last}")
    again = go_on(name, ground, folder) if ended.status else ended
    if again.status and "has ended" not in again.error:
        return Result(kind, name, 1, again.fault or again.last)
    return Result(kind, name, int(ended.status != 0), difference(alone, folder / "run"))


def clock(ground: Ground, seed: int, number: int) -> Result:
    """The wall clock jumps by up to ten years, back or forth, at every look at it, and the machine may sleep for hours."""
    random = drawn(seed, "clock", number)
    name = list(TRAININGS)[number % len(TRAININGS)]
    folder = ground.folder / "clocks" / str(number)
    folder.mkdir(parents=True)

    def jump() -> None:
        wall, steady, slept = time.time, time.monotonic, [0.0]

        def monotonic() -> float:
            slept[0] += random.random() ** 9 * 10**4
            return steady() + slept[0]

        time.time = lambda: wall() + random.uniform(-1, 1) * 3e8
        time.monotonic = monotonic

    ended = go_on(name, ground, folder, prepare=jump)
    return Result(
        "clock jumps", name, 1, ended.fault or difference(ground.left_alone(name), folder / "run")
    )


def others(ground: Ground, seed: int, count: int) -> Iterator[Result]:
    """So many full disks, among them half as many signals, and for four of them a clock that jumps and a folder that is read-only."""
    for number in range(count):
        yield full_disk(ground, seed, number)
        if number % 2 == 0:
            yield signalled(ground, seed, number // 2)
        if number % 4 == 0:
            yield clock(ground, seed, number // 4)
        if number % 4 == 0 and ground.mounts:
            yield read_only(ground, seed, number // 4)
