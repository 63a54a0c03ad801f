"""SIGKILL of one of two processes that train together; gone on with by two, each run must end with the bits of one that was left alone."""

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

from kills import Alone, Ground, Result, difference
from points import drawn
from trainings import state_of, words_of
from zygote import Outcome, flowgen

NAMES = ("nice", "realnvp", "glow", "maf")  # an RBM trains in one process
TOLD = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
TOGETHER = "trainer.num_processes=2"
STARTS = 20.0  # seconds, at most, until both are there


def fork_ranks(folder: Path) -> None:
    """In the child, which is to be the launcher: fork the processes of a training; their ids go into `folder`."""
    from torch.distributed.launcher import api

    from flowgen import cli

    start = api.elastic_launch

    def forked(config: api.LaunchConfig, executable: str) -> Any:
        def rank(*words: str) -> None:
            for number in TOLD:  # whose handlers are the launcher's
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            (folder / f"rank{os.environ['RANK']}").write_text(str(os.getpid()))
            sys.argv = ["flowgen", *words[2:]]  # of `python -m flowgen WORDS`
            cli.main()

        return start(replace(config, start_method="fork", run_id="faults"), rank)

    api.elastic_launch = forked  # type: ignore[misc,assignment]


def _leave(pid: int) -> None:
    """Alone."""


def _kill(folder: Path, rank: int, after: float, pid: int) -> None:
    """Kill this rank so many seconds after both are there, if they still are."""
    names, began = [folder / f"rank{number}" for number in range(2)], time.monotonic()
    while not all(name.exists() and name.read_text() for name in names):
        if (
            time.monotonic() - began > STARTS
            or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        ):
            return
        time.sleep(0.01)
    time.sleep(after)
    victim = int(names[rank].read_text())
    if Path(f"/proc/{victim}").exists() and Path(f"/proc/{pid}").exists():
        os.kill(victim, signal.SIGKILL)


def _go_on(name: str, ground: Ground, folder: Path, **how: Any) -> Outcome:
    run = folder / "run"
    for path in folder.glob("rank*"):
        path.unlink()
    words = (
        ["resume", run]
        if (run / "config.yaml").exists()
        else words_of(name, ground.images, run, TOGETHER)
    )
    return flowgen(words, folder, prepare=partial(fork_ranks, folder), **how)


def _left_alone(name: str, ground: Ground) -> Alone:
    """Of two processes; its seconds are those in which both are there."""
    key = f"{name}, two processes"
    if key not in ground.alone:
        folder = ground.folder / "alone" / key.replace(", ", "-")
        folder.mkdir(parents=True)
        ended = _go_on(name, ground, folder)
        assert not ended.status, ended.error
        there = max(path.stat().st_mtime for path in folder.glob("rank*"))
        ground.alone[key] = Alone(state_of(folder / "run"), time.time() - there, 0)
    return ground.alone[key]


def _kill_rank(ground: Ground, seed: int, number: int) -> Result:
    """Training `number`: one of its processes is killed, perhaps often; the launcher says so, and the run goes on to the same end."""
    random = drawn(seed, "rank", number)
    name, rank = NAMES[number // 2 % len(NAMES)], number % 2
    alone = _left_alone(name, ground)
    folder, kind, hits = ground.folder / "ranks" / str(number), f"kill of rank {rank} of 2", 0
    folder.mkdir(parents=True)
    for turn in range(4):
        then = (
            partial(_kill, folder, rank, random.uniform(0, alone.seconds)) if turn < 3 else _leave
        )
        ended = _go_on(name, ground, folder, then=then)
        if ended.status == 0 or "has ended" in ended.error:
            break
        if ended.fault or "processes has died" not in ended.last:
            return Result(kind, name, hits, ended.fault or ended.last)
        hits += 1
    fault = difference(alone, folder / "run")
    if not fault:
        shutil.rmtree(folder)
    return Result(kind, name, hits, fault)


def kills_of_ranks(ground: Ground, seed: int, count: int) -> Iterator[Result]:
    """Trainings by two processes until so many kills have hit."""
    hits, number = 0, 0
    while hits < count:
        yield (result := _kill_rank(ground, seed, number))
        hits, number = hits + result.hits, number + 1
