"""SIGKILL at random moments and inside every write; gone on with, each run must end with the bits of one that was left alone."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from points import count_into, drawn, kill_at, send_after
from trainings import STEPS, TRAININGS, make_images, same, state_of, words_of
from zygote import KILLED, Outcome, flowgen

from flowgen.training.checkpoint import read_checkpoint
from flowgen.utils.errors import UserError

AGAIN = 0.9  # of those that go on are killed once more
FRESH = 0.1  # have a cache of images of their own
MOST = 12  # kills of one training
START = 0.3  # of what a training does, which one that goes on does too


class Result(NamedTuple):
    """One run: what it is of, how often it was killed, what was wrong with it at the end, "" for nothing."""

    kind: str
    what: str
    hits: int
    fault: str


class Alone(NamedTuple):
    """A training that was left alone: how it ended, how long that took, and how many points it came by."""

    state: dict[str, Any]
    seconds: float
    points: int


class Ground:
    """Where the trainings of one session are: images, a cache that is shared, and what each ends with when it is left alone."""

    def __init__(self, folder: Path, mounts: bool = False):
        self.folder, self.images, self.mounts = folder, make_images(folder / "images"), mounts
        self.alone: dict[str, Alone] = {}
        self.share_cache()

    def share_cache(self) -> None:
        """Have commands take prepared images from where the others do."""
        os.environ["FLOWGEN_CACHE"] = str(self.folder / "cache")

    def left_alone(self, name: str) -> Alone:
        if name not in self.alone:
            folder = self.folder / "alone" / name.replace(", ", "-")
            folder.mkdir(parents=True)
            counted = flowgen(
                words_of(name, self.images, folder / "run"),
                folder,
                prepare=count_into(folder / "points"),
            )
            assert not counted.status, counted.error
            self.alone[name] = Alone(
                state_of(folder / "run"), counted.seconds, int((folder / "points").read_text())
            )
        return self.alone[name]


def go_on(name: str, ground: Ground, folder: Path, **how: Any) -> Outcome:
    """As a user would: by `resume` where the run has a configuration, else by training again in the same folder."""
    run = folder / "run"
    words = (
        ["resume", run] if (run / "config.yaml").exists() else words_of(name, ground.images, run)
    )
    return flowgen(words, folder, **how)


def difference(alone: Alone, run: Path) -> str:
    """In what a run ended otherwise than the one that was left alone."""
    wanted, found = alone.state, state_of(run)
    return ", ".join(
        key for key in sorted({*wanted, *found}) if not same(wanted.get(key), found.get(key))
    )


def damaged(run: Path) -> str:
    """What is wrong with checkpoints that something has stopped the writing of: under their names all must be whole."""
    files = {
        path.stat().st_ino: path for path in (run / "checkpoints").glob("*.pt")
    }  # several names may be of one
    for path in files.values():
        try:
            read_checkpoint(path)
        except UserError as error:
            return str(error)
    return ""


def left(run: Path) -> float:
    """About what share of a training a run has yet to do, by its rows, one for each step."""
    rows = run / "metrics.jsonl"
    return (
        min(1.0, START + 1 - rows.read_bytes().count(b'"train"') / STEPS) if rows.exists() else 1.0
    )


def kill(ground: Ground, seed: int, number: int, folder: Path) -> Result:
    """Training `number`: killed, gone on with, perhaps killed again, gone on with to the end, and compared."""
    random = drawn(seed, "kill", number)
    name = list(TRAININGS)[number % len(TRAININGS)]
    alone, hits, what = ground.left_alone(name), 0, f"{number}: {name}"
    kind = ("in a write", "at a moment")[(number + number // len(TRAININGS)) % 2]
    if random.random() < FRESH:
        os.environ["FLOWGEN_CACHE"] = str(folder / "cache")
    for turn in range(MOST):
        if turn and random.random() >= AGAIN:
            break
        share = random.random() * left(folder / "run")
        how: dict[str, Any] = {"prepare": kill_at(1 + int(share * alone.points), random.random())}
        if kind == "at a moment":
            how = {"then": send_after(1.1 * share * alone.seconds, signal.SIGKILL)}
        ended = go_on(name, ground, folder, **how)
        hits += ended.status == KILLED
        if ended.status == 0 or "has ended" in ended.error:
            break
        if ended.status != KILLED:
            return Result(f"kill {kind}", what, hits, ended.fault or ended.last)
    if fault := damaged(folder / "run"):
        return Result(f"kill {kind}", what, hits, fault)
    ended = go_on(name, ground, folder)
    if ended.status and "has ended" not in ended.error:
        return Result(f"kill {kind}", what, hits, ended.fault or ended.last)
    return Result(f"kill {kind}", what, hits, difference(alone, folder / "run"))


def kills(ground: Ground, seed: int, count: int) -> Iterator[Result]:
    """Runs until so many kills have hit."""
    hits, number = 0, 0
    while hits < count:
        folder = ground.folder / "kills" / str(number)
        folder.mkdir(parents=True)
        result = kill(ground, seed, number, folder)
        if not result.fault:
            shutil.rmtree(folder)
        yield result
        hits, number = hits + result.hits, number + 1
