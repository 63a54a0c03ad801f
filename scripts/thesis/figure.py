"""What a numbered figure of the page is, and drawing one where it is missing."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from flowgen.commands.evaluate import evaluate
from flowgen.training.run import Run

MAKE = "make reproduce-thesis"  # the page puts in what it was called with


class Figure(NamedTuple):
    """One figure of the page: `command` makes it, `runs` are what it is drawn from, `difference` is from the original."""

    number: str
    caption: str
    path: Path
    runs: Sequence[Path]
    command: str
    difference: str


def drawn(path: Path, run: Run, draw_it: Callable[[Path], object]) -> Path:
    """`path`, drawn where it is missing or older than the run's last checkpoint."""
    if not path.exists() or path.stat().st_mtime < run.last.stat().st_mtime:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_stem(f".{path.stem}")  # a run that is killed leaves no half of a picture under its name
        draw_it(aside)
        aside.replace(path)
    return path


def kept(run: Run, name: str, find: Callable[[], Any]) -> Any:
    """What `find` returns, kept beside the run as JSON."""
    path = drawn(run.folder / name, run, lambda aside: aside.write_text(json.dumps(find())))
    return json.loads(path.read_text())


def figures_of(run: Run) -> dict[str, Any]:
    """What `flowgen evaluate --json` says of a run."""
    return kept(run, "evaluate.json", lambda: evaluate(str(run.folder), [], "auto"))


def unit(levels: Tensor, bits: int) -> Tensor:
    """Levels as pixels in [0, 1]."""
    return levels.cpu().float() / (2**bits - 1)


def to_pil(levels: Tensor, bits: int) -> Image.Image:
    pixels = (255 * unit(levels, bits)).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray((pixels[..., 0] if pixels.shape[2] == 1 else pixels).numpy())
