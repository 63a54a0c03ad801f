"""Kills one of two processes that train together, and resumes the run.

The result must equal that of an uninterrupted run of two processes bit by bit.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from forkserver import Outcome, run_flowgen
from kill_points import make_rng
from kills import Reference, Result, Workspace, difference, is_finished
from training_runs import folder_name, state_of, train_args

NAMES = ("nice", "realnvp", "glow", "maf")  # an RBM trains in one process
LAUNCHER_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
MAX_KILLS = 3  # per run
MAX_START_SECONDS = 20.0  # until both processes have started


def fork_ranks(folder: Path) -> None:
    """Make the launcher in this process fork its workers. Their ids are written to `folder`."""
    from torch.distributed.launcher import api

    from flowgen import cli

    elastic_launch = api.elastic_launch

    def launch_forked(config: api.LaunchConfig, executable: str) -> Any:
        def run_rank(*argv: str) -> None:
            for number in LAUNCHER_SIGNALS:  # do not inherit the handlers of the launcher
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            (folder / f"rank{os.environ['RANK']}").write_text(str(os.getpid()))
            sys.argv = ["flowgen", *argv[2:]]  # argv is -m flowgen ARGS
            cli.main()

        return elastic_launch(replace(config, start_method="fork", run_id="fuzz"), run_rank)

    api.elastic_launch = launch_forked  # type: ignore[misc,assignment]


def _kill_rank_after(folder: Path, rank: int, seconds: float, launcher: int) -> None:
    """Kill the process of a rank some seconds after both have started, if it still runs."""
    files = [folder / f"rank{index}" for index in range(2)]
    start = time.monotonic()
    while not all(file.exists() and file.read_text() for file in files):
        if time.monotonic() - start > MAX_START_SECONDS or _is_zombie(launcher):
            return
        time.sleep(0.01)
    time.sleep(seconds)
    pid = int(files[rank].read_text())
    if Path(f"/proc/{pid}").exists() and Path(f"/proc/{launcher}").exists():
        os.kill(pid, signal.SIGKILL)


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _train_or_resume(name: str, workspace: Workspace, folder: Path, **kwargs: Any) -> Outcome:
    run = folder / "run"
    for path in folder.glob("rank*"):
        path.unlink()
    if (run / "config.yaml").exists():
        args: list[object] = ["resume", run]
    else:
        args = [*train_args(name, workspace.images, run, "trainer.num_processes=2")]
    return run_flowgen(args, folder, prepare=partial(fork_ranks, folder), **kwargs)


def _reference(name: str, workspace: Workspace) -> Reference:
    """Return the uninterrupted run of two processes, with the time from their start to the end."""
    key = f"{name}, two processes"
    if key not in workspace.references:
        folder = workspace.folder / "references" / folder_name(key)
        folder.mkdir(parents=True)
        outcome = _train_or_resume(name, workspace, folder)
        assert not outcome.status, outcome.error
        start = max(path.stat().st_mtime for path in folder.glob("rank*"))
        seconds = time.time() - start
        workspace.references[key] = Reference(state_of(folder / "run"), seconds, 0)
    return workspace.references[key]


def _kill_rank(workspace: Workspace, seed: int, index: int) -> Result:
    """Kill one of two processes up to three times, resume the run, and compare its result."""
    rng = make_rng(seed, "rank", index)
    name = NAMES[index // 2 % len(NAMES)]
    rank = index % 2
    kind = f"kill of rank {rank} of 2"
    reference = _reference(name, workspace)
    folder = workspace.folder / "ranks" / str(index)
    folder.mkdir(parents=True)
    hits = 0
    for turn in range(MAX_KILLS + 1):
        kwargs: dict[str, Any] = {}
        if turn < MAX_KILLS:
            seconds = rng.uniform(0, reference.seconds)
            kwargs = {"on_start": partial(_kill_rank_after, folder, rank, seconds)}
        outcome = _train_or_resume(name, workspace, folder, **kwargs)
        if outcome.status == 0 or is_finished(outcome):
            break
        if outcome.fault or "processes has died" not in outcome.last_line:
            return Result(kind, name, hits, outcome.fault or outcome.last_line)
        hits += 1
    fault = difference(reference, folder / "run")
    if not fault:
        shutil.rmtree(folder)
    return Result(kind, name, hits, fault)


def kill_ranks(workspace: Workspace, seed: int, count: int) -> Iterator[Result]:
    """Train with two processes until `count` kills have hit a run."""
    hits = 0
    index = 0
    while hits < count:
        result = _kill_rank(workspace, seed, index)
        yield result
        hits += result.hits
        index += 1
