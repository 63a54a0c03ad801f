"""What a numbered figure of the page is, and keeping what was drawn or measured."""

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

MAKE = "make reproduce-thesis"  # the page puts in what it was called with


class Figure(NamedTuple):
    """One figure of the page: `draw` writes it to a path, `runs` are what it shows, `difference` is how it departs from the original."""

    number: str
    caption: str
    draw: Callable[[Path], object]
    runs: Sequence[Run] = ()
    command: str = MAKE
    difference: str = ""
    suffix: str = ".png"

    def drawn(self, folder: Path) -> Path:
        """Its file, drawn where it is missing or older than the last checkpoint of its runs."""
        return _fresh(folder / f"figure_{self.number}{self.suffix}", self.runs, self.draw)


def by_command(
    number: str, caption: str, run: Run, command: str, difference: str, suffix: str = ".png"
) -> Figure:
    """The figure that `command`, of the words of `flowgen`, makes of a run."""

    def draw(at: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            cli([*shlex.split(command), "--out", str(at)], standalone_mode=False)

    return Figure(number, caption, draw, [run], f"flowgen {command}", difference, suffix)


def kept(run: Run, name: str, find: Callable[[], Any]) -> Any:
    """What `find` returns, kept beside the run as JSON."""
    return json.loads(
        _fresh(
            run.folder / name, [run], lambda aside: aside.write_text(json.dumps(find()))
        ).read_text()
    )


def _fresh(path: Path, runs: Sequence[Run], make: Callable[[Path], object]) -> Path:
    newest = max((run.last.stat().st_mtime for run in runs), default=math.inf)
    if not path.exists() or path.stat().st_mtime < newest:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_stem(
            f".{path.stem}"
        )  # a run that is killed leaves no half of a picture under its name
        make(aside)
        aside.replace(path)
    return path
