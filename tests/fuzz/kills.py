"""Kills training runs by SIGKILL at random moments and inside file operations, and resumes them.

The result must equal that of an uninterrupted run bit by bit.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from forkserver import KILLED, Outcome, run_flowgen
from kill_points import count_points, kill_at, make_rng, send_after
from training_runs import STEPS, TRAINING_RUNS, folder_name, make_images, same, state_of, train_args

from flowgen.training.checkpoint import read_checkpoint
from flowgen.utils.errors import UserError

REPEAT_PROBABILITY = 0.9  # of killing a resumed run again
OWN_CACHE_PROBABILITY = 0.1  # of a run with its own cache of images
MAX_KILLS = 12  # per run
STARTUP_SHARE = 0.3  # of the time of a run; a resumed run needs it again


class Result(NamedTuple):
    """The result of one test case. `fault` is "" if there is no fault."""

    kind: str
    name: str
    hits: int  # number of kills or other disturbances before the end of the run
    fault: str


class Reference(NamedTuple):
    """The result of an uninterrupted run, its time, and its number of kill points."""

    state: dict[str, Any]
    seconds: float
    num_points: int


class Workspace:
    """Images, a shared cache, and uninterrupted runs for comparison.

    Args:
        folder: An empty folder.
        can_mount: True if file systems can be mounted below the folder.
    """

    def __init__(self, folder: Path, can_mount: bool = False):
        self.folder = folder
        self.images = make_images(folder / "images")
        self.can_mount = can_mount
        self.references: dict[str, Reference] = {}
        self.use_shared_cache()

    def use_shared_cache(self) -> None:
        """Make commands use the shared cache of images."""
        os.environ["FLOWGEN_CACHE"] = str(self.folder / "cache")

    def reference_run(self, name: str) -> Path:
        """Return the folder of the uninterrupted run, which `reference` creates."""
        return self.folder / "references" / folder_name(name) / "run"

    def reference(self, name: str) -> Reference:
        """Return the uninterrupted run. The first call trains it."""
        if name not in self.references:
            run = self.reference_run(name)
            run.parent.mkdir(parents=True)
            points = run.parent / "points"
            args = train_args(name, self.images, run)
            outcome = run_flowgen(args, run.parent, prepare=count_points(points))
            assert not outcome.status, outcome.error
            num_points = int(points.read_text())
            self.references[name] = Reference(state_of(run), outcome.seconds, num_points)
        return self.references[name]


def train_or_resume(name: str, workspace: Workspace, folder: Path, **kwargs: Any) -> Outcome:
    """Resume the run in a folder, or start it if it has no configuration yet."""
    run = folder / "run"
    if (run / "config.yaml").exists():
        return run_flowgen(["resume", run], folder, **kwargs)
    return run_flowgen(train_args(name, workspace.images, run), folder, **kwargs)


def finish(name: str, workspace: Workspace, folder: Path) -> str:
    """Resume a run until it ends. Return a description of the fault or of the differences."""
    outcome = train_or_resume(name, workspace, folder)
    if outcome.status and not is_finished(outcome):
        return outcome.fault or outcome.last_line
    return difference(workspace.reference(name), folder / "run")


def is_finished(outcome: Outcome) -> bool:
    """Return True if a command failed because the run had ended before."""
    return "has ended" in outcome.error


def difference(reference: Reference, run: Path) -> str:
    """Return the names of the parts in which a run differs from the uninterrupted run."""
    expected = reference.state
    state = state_of(run)
    keys = sorted({*expected, *state})
    return ", ".join(key for key in keys if not same(expected.get(key), state.get(key)))


def invalid_checkpoint(run: Path) -> str:
    """Return the error of the first invalid checkpoint, or ""."""
    paths = {path.stat().st_ino: path for path in (run / "checkpoints").glob("*.pt")}
    for path in paths.values():
        try:
            read_checkpoint(path)
        except UserError as error:
            return str(error)
    return ""


def remaining_share(run: Path) -> float:
    """Return the approximate share of a run that remains."""
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        return 1.0
    steps = metrics.read_bytes().count(b'"train"')
    return min(1.0, STARTUP_SHARE + 1 - steps / STEPS)


def kill_training_run(workspace: Workspace, seed: int, index: int, folder: Path) -> Result:
    """Kill and resume a run several times, and compare its result."""
    rng = make_rng(seed, "kill", index)
    name = list(TRAINING_RUNS)[index % len(TRAINING_RUNS)]
    reference = workspace.reference(name)
    is_in_write = (index + index // len(TRAINING_RUNS)) % 2 == 0
    kind = "kill in a write" if is_in_write else "kill at a random moment"
    case = f"{index}: {name}"
    hits = 0
    if rng.random() < OWN_CACHE_PROBABILITY:
        os.environ["FLOWGEN_CACHE"] = str(folder / "cache")
    for turn in range(MAX_KILLS):
        if turn and rng.random() >= REPEAT_PROBABILITY:
            break
        share = rng.random() * remaining_share(folder / "run")
        kwargs: dict[str, Any]
        if is_in_write:
            kwargs = {"prepare": kill_at(1 + int(share * reference.num_points), rng.random())}
        else:
            kwargs = {"on_start": send_after(1.1 * share * reference.seconds, signal.SIGKILL)}
        outcome = train_or_resume(name, workspace, folder, **kwargs)
        if outcome.status == KILLED:
            hits += 1
        elif outcome.status == 0 or is_finished(outcome):
            break
        else:
            return Result(kind, case, hits, outcome.fault or outcome.last_line)
    fault = invalid_checkpoint(folder / "run") or finish(name, workspace, folder)
    return Result(kind, case, hits, fault)


def kill_training_runs(workspace: Workspace, seed: int, count: int) -> Iterator[Result]:
    """Train until `count` kills have hit a run."""
    hits = 0
    index = 0
    while hits < count:
        folder = workspace.folder / "kills" / str(index)
        folder.mkdir(parents=True)
        result = kill_training_run(workspace, seed, index, folder)
        if not result.fault:
            shutil.rmtree(folder)
        yield result
        hits += result.hits
        index += 1
