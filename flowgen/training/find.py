"""Runs by name: a folder, a checkpoint file, or a name under `outputs/`."""

from pathlib import Path
from typing import Any

from flowgen.errors import FlowgenError
from flowgen.training.checkpoint import read_checkpoint
from flowgen.training.run import Run

OUTPUTS = Path("outputs")


def list_runs() -> list[Run]:
    """Every run under `outputs/`, the newest first."""
    configs = list(OUTPUTS.rglob("config.yaml")) if OUTPUTS.is_dir() else []
    return [Run(path.parent) for path in sorted(configs, key=lambda path: path.stat().st_mtime, reverse=True)]


def find_run(name: str) -> Run:
    """The run whose folder, checkpoint file or name under `outputs/` this is. Raises FlowgenError where there is none."""
    for path in (Path(name), OUTPUTS / name):
        if path.is_file():
            return Run(path.parent.parent if path.parent.name == "checkpoints" else path.parent)
        if path.is_dir() and (path / "config.yaml").exists():
            return Run(path)
    parts = Path(name).parts
    matches = [run for run in list_runs() if parts and run.folder.parts[-len(parts) :] == parts]
    if len(matches) == 1:
        return matches[0]
    raise FlowgenError(f"{name} is {'several runs' if matches else 'no run'}: `flowgen runs` lists them")


def find_checkpoint(name: str | None) -> tuple[Run, dict[str, Any]]:
    """The checkpoint file `name`, else the last good checkpoint of the run `name`, else of the newest run.

    Raises FlowgenError where there is none.
    """
    if name is None:
        run = next((run for run in list_runs() if run.checkpoints()), None)
        if run is None:
            raise FlowgenError("no run under outputs/ has a checkpoint: train one with `flowgen train`, or name one with --run")
    else:
        run = find_run(name)
        for path in (Path(name), OUTPUTS / name):
            if path.is_file():
                return run, read_checkpoint(path)
    checkpoint = run.last_good()
    if checkpoint is None:
        raise FlowgenError(f"{run.folder} has no checkpoint yet: `flowgen resume {run.folder}` goes on with it")
    return run, checkpoint
