"""Runs `flowgen` commands in forked processes, which do not have to import torch again."""

import contextlib
import gc
import importlib
import os
import pkgutil
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

MAX_CPU_SECONDS = 60  # a command that needs more counts as hung
MAX_SECONDS = 600  # of wall-clock time, since other work may slow a command down
KILLED = -signal.SIGKILL
EXIT_CODES = (1, 2, 130, 143)  # for errors, usage errors, SIGINT and SIGTERM


class Outcome(NamedTuple):
    """The result of a command.

    `status` is the exit status, negative for a signal, or None if the command hung.
    """

    status: int | None
    output: str
    error: str
    seconds: float

    @property
    def last_line(self) -> str:
        """The last line of standard error."""
        return (self.error.splitlines() or [""])[-1]

    @property
    def fault(self) -> str:
        """A description of the fault, or "" after success or an error of one plain sentence."""
        if self.status is None:
            return f"hung for {MAX_SECONDS} s"
        if "Traceback" in self.error or "Traceback" in self.output:
            return "a traceback"
        if "bug in flowgen" in self.error:
            return "a bug in flowgen"
        if self.status == 0:
            return ""
        num_errors = sum(line.startswith("flowgen: ") for line in self.error.splitlines())
        is_plain = num_errors == 1 and self.last_line.startswith("flowgen: ")
        if self.status not in EXIT_CODES or not is_plain:
            return f"status {self.status} without one plain sentence"
        return ""


def preload() -> None:
    """Import everything that a command may need.

    Raises:
        SystemExit: If the process has several threads, because forking is not safe then.
    """
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"  # for the child processes
    torch.set_num_threads(1)
    package = importlib.import_module("flowgen")
    for module in pkgutil.walk_packages(package.__path__, "flowgen."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # an extra may not be installed
                importlib.import_module(module.name)
    for name in (
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "hydra.main",
        "torch.utils.tensorboard",
        "PIL.GifImagePlugin",
        "torch._inductor.utils",  # makes its cache directory
        "torch._dynamo",
    ):
        importlib.import_module(name)
    _preload_hydra()
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        sys.exit("cannot fork several threads: set OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1")
    gc.collect()
    gc.freeze()  # otherwise the garbage collection of every child would copy all objects


def _preload_hydra() -> None:
    """Make Hydra find its plugins and build its grammar, which takes as long as a short run."""
    import hydra

    from flowgen.config.settings import conf_folder

    overrides = ["model=rbm", "model.hidden=4", "data=folder", "data.root=/tmp/a-b", "trainer=cpu"]
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        hydra.compose("train", [*overrides, "output_dir='a,b'"])


def run_flowgen(
    args: Sequence[object],
    folder: Path,
    *,
    prepare: Callable[[], None] = lambda: None,
    on_start: Callable[[int], None] = lambda pid: None,
    output_dir: Path | None = None,
) -> Outcome:
    """Run `flowgen ARGS` in a forked process.

    Args:
        args: Arguments of the command.
        folder: Working directory of the command.
        prepare: Called in the child process before the command.
        on_start: Called in this process with the id of the child process.
        output_dir: Directory for the files that collect the output, by default `folder`.
    """
    start = time.monotonic()
    output_dir = output_dir or folder
    output = output_dir / ".output"
    error = output_dir / ".error"
    output.touch()  # the child may be killed before it creates the files
    error.touch()
    pid = os.fork()
    if pid == 0:
        _run_child([str(arg) for arg in args], folder, output, error, prepare)
    handle = os.pidfd_open(pid)
    try:
        on_start(pid)
        # Count waits of one second. The clock would include the time while this process sleeps.
        has_ended = any(select.select([handle], [], [], 1.0)[0] for _ in range(MAX_SECONDS))
        if not has_ended:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    finally:
        os.close(handle)
    _, status = os.waitpid(pid, 0)
    outcome = Outcome(
        os.waitstatus_to_exitcode(status) if has_ended else None,
        output.read_text(errors="replace"),
        error.read_text(errors="replace"),
        time.monotonic() - start,
    )
    output.unlink()
    error.unlink()
    return outcome


def _run_child(
    args: list[str], folder: Path, output: Path, error: Path, prepare: Callable[[], None]
) -> None:
    status = 70
    try:
        os.setsid()
        os.chdir(folder)
        # A shell makes background jobs ignore SIGINT, and nohup makes them ignore SIGHUP.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, path in ((1, output), (2, error)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
        sys.argv = ["flowgen", *args]
        from flowgen import cli

        prepare()
        cli.main()
        status = 0
    except SystemExit as exit_error:
        if exit_error.code is None:
            status = 0
        else:
            status = exit_error.code if isinstance(exit_error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
