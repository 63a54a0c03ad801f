"""`flowgen complete`."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowgen import pictures
from flowgen.config import find_model
from flowgen.data import read_exactly
from flowgen.errors import FlowgenError
from flowgen.models import Completes
from flowgen.progress import bar

DRAWS = 5  # that are shown
SHARES = [str(percent) for percent in range(1, 100)]
log = logging.getLogger("flowgen")


def complete(
    image: Path, keep: str, methods: Sequence[str], name: str | None, sweeps: int | None, seed: int, device: str, out: Path | None
) -> Path:
    """Save, for each method, the image, what is kept of it, the restored ones' mean and spread, and some of them. Raises FlowgenError."""
    run, _, model = find_model(name, device, Completes)
    model.watch(bar)
    levels = read_exactly(image, model.shape, model.bits).to(model.device)
    known = mask(keep, model.shape, seed).to(model.device)
    whole = levels / (2**model.bits - 1)
    rows = []
    for method in methods or model.completions:
        generator = torch.Generator(model.device).manual_seed(seed)
        draws, mean, figures = model.complete(levels, known, method=method, sweeps=sweeps, generator=generator)
        for figure, value in figures.items():
            log.info("%s: %s %.3f", method, figure.replace("_", " "), value)
        spread = 2 * draws.std(0, correction=0)  # at most 1, where one half is black and the other white
        shown = torch.cat((whole, torch.where(known, whole, 0.5), mean[None], spread[None], draws[:DRAWS]))
        rows.append((f"{method}: image, kept, mean, spread, draws", grey(shown)))
    target = out or run.folder / "completion.png"
    pictures.blocks(rows, 8, columns=4 + DRAWS).save(target)
    return target


def mask(keep: str, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """What `--keep` names, true where a pixel is known: (channels, height, width). Raises FlowgenError where nothing is left to do."""
    _, height, width = shape
    known = torch.zeros(shape, dtype=torch.bool)
    halves = {
        "left": (slice(None), slice(width // 2)),
        "right": (slice(None), slice(width // 2, None)),
        "top": (slice(height // 2), slice(None)),
        "bottom": (slice(height // 2, None), slice(None)),
    }
    word, _, share = keep.partition(":")
    if keep in halves:
        known[:, *halves[keep]] = True
    elif keep == "border":
        known[:] = True
        known[:, height // 4 : height - height // 4, width // 4 : width - width // 4] = False
    elif word == "random" and share in SHARES:
        generator = torch.Generator().manual_seed(seed)
        known[:] = torch.rand(height, width, generator=generator) < int(share) / 100
    elif Path(keep).suffix:
        known[:] = read_exactly(Path(keep), (1, height, width), 1)[0] == 1
    else:
        words = "left, right, top, bottom, border, random:PERCENT, or an image that is white where pixels are known"
        raise FlowgenError(f"--keep is {words}, not {keep!r}")
    if known.all():
        raise FlowgenError(f"{keep} keeps every pixel, so that none is left to restore: make what is missing black")
    if not known.any():
        raise FlowgenError(f"{keep} keeps no pixel: make what is known white, or draw whole images with `flowgen sample`")
    return known


def grey(brightness: Tensor) -> Tensor:
    """Brightness from 0 to 1, of pixels or probabilities, as levels of 8 bits."""
    return (255 * brightness).round().to(torch.uint8).cpu()
