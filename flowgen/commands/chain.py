"""`flowgen chain`."""

from itertools import islice
from pathlib import Path

import torch

from flowgen import pictures
from flowgen.commands.complete import grey
from flowgen.config import find_model
from flowgen.costs import check_fits
from flowgen.models import RunsChains
from flowgen.progress import bar


@torch.no_grad()
def chain(*, method: str, name: str | None, count: int, frames: int, sweeps: int, seed: int, device: str, out: Path | None) -> Path:
    """Save a film of `count` chains from white noise: P(v = 1) after every `sweeps` sweeps. Raises FlowgenError."""
    run, _, model = find_model(name, device, RunsChains)
    side = max(pictures.SMALLEST_SIDE, *model.shape[1:])
    check_fits("--frames", frames, 3 * count * side**2)
    states = model.film(count, method, torch.Generator(model.device).manual_seed(seed))
    shown = islice(bar(states, method, sweeps * frames), 0, sweeps * frames + 1, sweeps)
    target = out or run.folder / f"chain_{method}.gif"
    columns = max(1, round(count**0.5))
    pictures.film([grey(frame) for frame in shown], 8, columns, target)
    return target
