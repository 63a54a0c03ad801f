"""`flowgen chain`."""

from itertools import islice
from pathlib import Path

import torch

from flowgen import pictures
from flowgen.commands.complete import grey
from flowgen.config import model_of
from flowgen.models.rbm import METHODS, RBM
from flowgen.models.rbm.gibbs import white_noise
from flowgen.progress import bar
from flowgen.training.find import find_checkpoint


@torch.no_grad()
def chain(method: str, name: str | None, count: int, frames: int, sweeps: int, seed: int, device: str, out: Path | None) -> Path:
    """Save a film of `count` chains from white noise: P(v = 1) after every `sweeps` sweeps. Raises FlowgenError."""
    run, checkpoint = find_checkpoint(name, wanted=RBM)
    model = model_of(checkpoint, device)
    assert isinstance(model, RBM)
    generator = torch.Generator(model.device).manual_seed(seed)
    noise = white_noise(model, count, generator)
    states = islice(METHODS[method](model, noise, generator=generator), sweeps * frames)
    shown = [noise] + [expected for _, expected in islice(bar(states, method, sweeps * frames), sweeps - 1, None, sweeps)]
    target = out or run.folder / f"chain_{method}.gif"
    columns = max(1, round(count**0.5))
    pictures.film([grey(picture, model.shape) for picture in shown], 8, columns, target)
    return target
