"""`flowgen complete`."""

from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from flowgen import pictures
from flowgen.config import model_of
from flowgen.data import read_exactly
from flowgen.errors import FlowgenError
from flowgen.models.rbm import METHODS, RBM
from flowgen.models.rbm.gibbs import white_noise
from flowgen.progress import bar
from flowgen.training.find import find_checkpoint

CHAINS, DRAWS = 64, 5


def complete(image: Path, keep: str, methods: list[str], name: str | None, sweeps: int, seed: int, device: str, out: Path | None) -> Path:
    """Save, for each sampler, the image, what is kept of it, the mean of the restored ones, and some of them. Raises FlowgenError."""
    run, checkpoint = find_checkpoint(name, wanted=RBM)
    model = model_of(checkpoint, device)
    assert isinstance(model, RBM)
    levels = read_exactly(image, model.shape, model.bits)
    known = mask(keep, model.shape).flatten().to(model.device)
    rows = []
    for method in methods:
        draws, mean = restore(model, levels.to(model.device), known, method, sweeps, seed)
        given = torch.where(known, model.units(levels.to(model.device)), 0.5)
        shown = torch.cat((model.units(levels.to(model.device)), given, mean[None], draws[:DRAWS]))
        rows.append((f"{method}: image, kept, mean, draws", grey(shown, model.shape)))
    target = out or run.folder / "completion.png"
    pictures.blocks(rows, 8, columns=3 + DRAWS).save(target)
    return target


@torch.no_grad()
def restore(model: RBM, levels: Tensor, known: Tensor, method: str, sweeps: int, seed: int) -> tuple[Tensor, Tensor]:
    """P(v = 1) of every chain at its end, (chains, visible), and their mean over all chains and the second half of the sweeps.

    The chains begin with white noise where pixels are not `known` (visible,).
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    start = torch.where(known, model.units(levels), white_noise(model, CHAINS, generator))
    total, count = torch.zeros_like(start[0]), 0
    states = islice(METHODS[method](model, start, known=known, generator=generator), sweeps)
    for sweep, (_, expected) in enumerate(bar(states, method, sweeps)):
        if sweep >= sweeps // 2:
            total, count = total + expected.mean(0), count + 1
    return expected, total / count


def mask(keep: str, shape: tuple[int, int, int]) -> Tensor:
    """What `--keep` names, true where a pixel is known: (channels, height, width). Raises FlowgenError where nothing is left to do."""
    _, height, width = shape
    known = torch.zeros(shape, dtype=torch.bool)
    halves = {
        "left": (slice(None), slice(width // 2)),
        "right": (slice(None), slice(width // 2, None)),
        "top": (slice(height // 2), slice(None)),
        "bottom": (slice(height // 2, None), slice(None)),
    }
    if keep in halves:
        known[:, *halves[keep]] = True
    elif Path(keep).suffix:
        known[:] = read_exactly(Path(keep), (1, height, width), 1)[0] == 1
    else:
        raise FlowgenError(f"--keep is left, right, top, bottom, or an image that is white where pixels are known, not {keep!r}")
    if known.all():
        raise FlowgenError(f"{keep} keeps every pixel, so that none is left to restore: make what is missing black")
    if not known.any():
        raise FlowgenError(f"{keep} keeps no pixel: make what is known white, or draw whole images with `flowgen sample`")
    return known


def grey(probabilities: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Probabilities (count, visible) as images of 8 bits."""
    return (255 * probabilities).round().to(torch.uint8).view(-1, *shape).cpu()
