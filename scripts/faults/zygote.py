"""A process that has imported all of flowgen once, and forks a child for each command: none has to wait for torch."""

import contextlib
import importlib
import os
import pkgutil
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

HANGS = 60  # seconds of computing after which a command counts as hung
WAITS = 600  # seconds by the clock likewise: other work on the machine may slow it down
KILLED = -signal.SIGKILL


class Outcome(NamedTuple):
    """How a command ended: its exit status, less than 0 for a signal; None where it hung. What it wrote, and how long it took."""

    status: int | None
    output: str
    error: str
    seconds: float

    @property
    def last(self) -> str:
        """The last line of its standard error."""
        return (self.error.splitlines() or [""])[-1]

    @property
    def fault(self) -> str:
        """What is wrong with this end, "" where it worked, or said in one sentence why not."""
        if self.status is None:
            return f"hung for {WAITS} s"
        if "Traceback" in self.error or "Traceback" in self.output:
            return "a traceback"
        if "bug in flowgen" in self.error:
            return "a fault of flowgen"
        sentences = sum(line.startswith("flowgen: ") for line in self.error.splitlines())
        if self.status and (
            self.status not in (1, 2, 130, 143)
            or sentences != 1
            or not self.error.splitlines()[-1].startswith("flowgen: ")
        ):
            return f"status {self.status} without one plain sentence"
        return ""


def warm() -> None:
    """Import everything that a command may need; no thread may run when the first child is forked."""
    import gc

    import torch

    os.environ["OMP_NUM_THREADS"] = "1"  # of the children
    torch.set_num_threads(1)
    package = importlib.import_module("flowgen")
    for module in pkgutil.walk_packages(package.__path__, "flowgen."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # of an extra that is not installed
                importlib.import_module(module.name)
    for name in (
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "hydra.main",
        "torch.utils.tensorboard",
        "PIL.GifImagePlugin",
    ):
        importlib.import_module(name)
    _compose()
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise SystemExit(
            "a process of several threads cannot be forked: set OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1"
        )
    gc.collect()
    gc.freeze()  # or every child would copy all objects when it looks for what is garbage


def _compose() -> None:
    """Have Hydra find its plugins and learn its grammar, which takes it as long as a short training."""
    import hydra

    from flowgen.config.compose import conf_folder

    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        hydra.compose(
            "train",
            [
                "model=rbm",
                "model.hidden=4",
                "data=folder",
                "data.root=/tmp/a-b",
                "trainer=cpu",
                "out='a,b'",
            ],
        )


def flowgen(
    words: Sequence[object],
    folder: Path,
    *,
    prepare: Callable[[], None] = lambda: None,
    then: Callable[[int], None] = lambda pid: None,
    aside: Path | None = None,
) -> Outcome:
    """Run `flowgen WORDS` in `folder`, after `prepare` in the child; `then` is called with its process id while it runs.

    What it writes to the screen goes through files in the folder `aside`.
    """
    began = time.monotonic()
    output, error = (aside or folder) / ".output", (aside or folder) / ".error"
    for path in (output, error):
        path.touch()  # here, since the child may be killed before it has
    pid = os.fork()
    if pid == 0:
        _child([str(word) for word in words], folder, output, error, prepare)
    handle = os.pidfd_open(pid)
    try:
        then(pid)
        ready = any(
            select.select([handle], [], [], 1.0)[0] for _ in range(WAITS)
        )  # seconds in which this process itself may be stopped
        if not ready:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    finally:
        os.close(handle)
    _, status = os.waitpid(pid, 0)
    said, told = (path.read_text(errors="replace") for path in (output, error))
    found = Outcome(
        os.waitstatus_to_exitcode(status) if ready else None, said, told, time.monotonic() - began
    )
    for path in (output, error):
        path.unlink()
    return found


def _child(
    words: list[str], folder: Path, output: Path, error: Path, prepare: Callable[[], None]
) -> None:
    status = 70
    try:
        os.setsid()
        os.chdir(folder)
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # which a shell has what runs in the background ignore
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one
        for number, path in ((0, Path(os.devnull)), (1, output), (2, error)):
            file = os.open(
                path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644
            )
            os.dup2(file, number)
        sys.argv = ["flowgen", *words]
        from flowgen import cli

        prepare()
        cli.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
