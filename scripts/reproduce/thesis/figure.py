"""Figures of the page, and files that are written again when their runs change."""

import contextlib
import io
import json
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowgen.cli import cli
from flowgen.training.run_dir import Run

MAKE = "make reproduce-thesis"  # the page adds the variables that it was made with


class Figure(NamedTuple):
    """A figure of the page.

    Attributes:
        number: Number in the thesis.
        caption: Caption.
        draw: Function that writes the picture to a path.
        runs: Runs that the figure shows.
        command: Command that makes the figure.
        difference: Differences from the original.
        suffix: Suffix of the picture's file.
    """

    number: str
    caption: str
    draw: Callable[[Path], object]
    runs: Sequence[Run] = ()
    command: str = MAKE
    difference: str = ""
    suffix: str = ".png"

    def path(self, folder: Path) -> Path:
        """Return the path of the picture. Draw it if it is missing or older than its runs."""
        return _updated(folder / f"figure_{self.number}{self.suffix}", self.runs, self.draw)


def command_figure(
    number: str, caption: str, run: Run, command: str, difference: str, suffix: str = ".png"
) -> Figure:
    """Return a figure that the command `flowgen COMMAND` draws."""

    def draw(path: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            cli([*shlex.split(command), "--out", str(path)], standalone_mode=False)

    return Figure(number, caption, draw, [run], f"flowgen {command}", difference, suffix)


def cached_json(run: Run, name: str, compute: Callable[[], Any]) -> Any:
    """Return the result of `compute`, stored as JSON in the folder of the run."""

    def write(path: Path) -> None:
        path.write_text(json.dumps(compute()))

    return json.loads(_updated(run.folder / name, [run], write).read_text())


def _updated(path: Path, runs: Sequence[Run], write: Callable[[Path], object]) -> Path:
    newest = max((run.last.stat().st_mtime for run in runs), default=math.inf)
    if not path.exists() or path.stat().st_mtime < newest:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_stem(f".{path.stem}")  # a kill must not leave a partial file
        write(temporary)
        temporary.replace(path)
    return path
