"""Training runs on full and on read-only disks, with signals, and with a clock that jumps."""

import contextlib
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from forkserver import Outcome, run_flowgen
from kill_points import make_rng, send_after
from kills import (
    Result,
    Workspace,
    difference,
    finish,
    invalid_checkpoint,
    train_or_resume,
)
from training_runs import TRAINING_RUNS

LARGE_DISK_BYTES = 2**28
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def can_mount(folder: Path) -> bool:
    """Return True if this process may mount file systems."""
    with (
        contextlib.suppress(OSError, subprocess.CalledProcessError),
        mounted(folder / "trial", 4096),
    ):
        return True
    return False


@contextlib.contextmanager
def mounted(folder: Path, num_bytes: int) -> Iterator[None]:
    """Mount a file system in memory on a new folder."""
    folder.mkdir(parents=True)
    argv = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "fuzz", str(folder)]
    subprocess.run(argv, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    """Change an option of a mounted file system."""
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def limit_file_size(num_bytes: int) -> None:
    """Limit the size of the files of this process, as a substitute for a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def full_disk(workspace: Workspace, seed: int, index: int) -> Result:
    """Train on a disk that becomes full, make room, resume the run, and compare its result."""
    rng = make_rng(seed, "disk", index)
    name = list(TRAINING_RUNS)[index % len(TRAINING_RUNS)]
    workspace.reference(name)
    folder = workspace.folder / "disks" / str(index)
    files = [path for path in workspace.reference_run(name).rglob("*") if path.is_file()]
    sizes = [path.stat().st_size for path in files]
    if workspace.can_mount:
        with mounted(folder, max(4096, int(rng.random() * sum(sizes)))):
            outcome = train_or_resume(name, workspace, folder, output_dir=workspace.folder)
            remount(folder, f"size={LARGE_DISK_BYTES}")
            return _compare("full disk (tmpfs)", workspace, name, folder, outcome)
    folder.mkdir(parents=True)
    prepare = partial(limit_file_size, int(rng.random() * max(sizes)))
    outcome = train_or_resume(name, workspace, folder, prepare=prepare)
    return _compare("full disk (RLIMIT_FSIZE)", workspace, name, folder, outcome)


def _compare(kind: str, workspace: Workspace, name: str, folder: Path, outcome: Outcome) -> Result:
    run = folder / "run"
    hits = int(outcome.status != 0)
    if fault := outcome.fault or invalid_checkpoint(run):
        return Result(kind, name, hits, f"{fault}: {outcome.last_line}")
    if hits:
        return Result(kind, name, hits, finish(name, workspace, folder))
    return Result(kind, name, hits, difference(workspace.reference(name), run))


def read_only_disk(workspace: Workspace, seed: int, index: int) -> Result:
    """Run commands that write to a read-only disk. Each must fail with one plain sentence."""
    name = list(TRAINING_RUNS)[index % len(TRAINING_RUNS)]
    workspace.reference(name)
    folder = workspace.folder / "read-only" / str(index)
    run = folder / "run"
    commands: list[list[object]] = [
        ["resume", run, "trainer.steps=9"],
        ["sample", "--run", run],
        ["report", run],
    ]
    with mounted(folder, LARGE_DISK_BYTES):
        shutil.copytree(workspace.reference_run(name), run)
        remount(folder, "ro")
        outcomes = [run_flowgen(args, folder, output_dir=workspace.folder) for args in commands]
    faults = [
        f"{outcome.fault or 'did not report the error'}: {outcome.last_line}"
        for outcome in outcomes
        if outcome.fault or outcome.status != 1
    ]
    return Result("read-only disk", name, len(outcomes), ", ".join(faults))


def signaled(workspace: Workspace, seed: int, index: int) -> Result:
    """Send a signal to a training run at a random moment, resume it, and compare its result."""
    rng = make_rng(seed, "signal", index)
    name = list(TRAINING_RUNS)[index % len(TRAINING_RUNS)]
    reference = workspace.reference(name)
    number = SIGNALS[index % len(SIGNALS)]
    folder = workspace.folder / "signals" / str(index)
    folder.mkdir(parents=True)
    on_start = send_after(rng.uniform(0, reference.seconds), number)
    outcome = train_or_resume(name, workspace, folder, on_start=on_start)
    kind = f"{number.name} at a random moment"
    if outcome.status == 0:
        return Result(kind, name, 0, difference(reference, folder / "run"))
    if outcome.status not in (-number, 128 + number, 130):
        fault = outcome.fault or f"status {outcome.status}: {outcome.last_line}"
        return Result(kind, name, 1, fault)
    return Result(kind, name, 1, finish(name, workspace, folder))


def clock_jumps(workspace: Workspace, seed: int, index: int) -> Result:
    """Train while the clock jumps by up to ten years and the machine seems to sleep for hours."""
    rng = make_rng(seed, "clock", index)
    name = list(TRAINING_RUNS)[index % len(TRAINING_RUNS)]
    folder = workspace.folder / "clocks" / str(index)
    folder.mkdir(parents=True)

    def patch_clocks() -> None:
        wall_time = time.time
        steady_time = time.monotonic
        slept_seconds = 0.0

        def monotonic() -> float:
            nonlocal slept_seconds
            slept_seconds += rng.random() ** 9 * 10**4
            return steady_time() + slept_seconds

        time.time = lambda: wall_time() + rng.uniform(-1, 1) * 3e8
        time.monotonic = monotonic

    outcome = train_or_resume(name, workspace, folder, prepare=patch_clocks)
    fault = outcome.fault or difference(workspace.reference(name), folder / "run")
    return Result("clock jumps", name, 1, fault)


def disk_faults(workspace: Workspace, seed: int, count: int) -> Iterator[Result]:
    """Test `count` full disks, half as many signals, and a quarter as many of the other faults."""
    for index in range(count):
        yield full_disk(workspace, seed, index)
        if index % 2 == 0:
            yield signaled(workspace, seed, index // 2)
        if index % 4 == 0:
            yield clock_jumps(workspace, seed, index // 4)
            if workspace.can_mount:
                yield read_only_disk(workspace, seed, index // 4)
