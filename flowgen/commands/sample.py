"""`flowgen sample`."""

from pathlib import Path
from typing import Any

import torch

from flowgen import figures
from flowgen.config import model_of
from flowgen.models import RBM, GenerativeModel
from flowgen.training.find import find_checkpoint

BATCH = 64


def sample(
    name: str | None,
    temperatures: list[float],
    count: int,
    seed: int,
    method: str | None,
    sweeps: int | None,
    device: str,
    out: Path | None,
) -> Path:
    """Save `count` samples for each temperature, a block of rows each, from high to low log-probability. Raises FlowgenError.

    Without temperatures, at the one that the run's own samples had. `method` and `sweeps` choose an RBM's sampler.
    """
    how = {key: value for key, value in {"method": method, "sweeps": sweeps}.items() if value is not None}
    run, checkpoint = find_checkpoint(name, wanted=RBM if how else None)
    model = model_of(checkpoint, device)
    titled = []
    for temperature in temperatures or [checkpoint["config"]["trainer"]["sample_temperature"]]:
        levels, worth = draw(model, count, temperature, seed, **how)
        title = f"{method}, temperature {temperature:g}" if method else f"temperature {temperature:g}"
        titled.append((title, levels[worth.argsort(descending=True)]))
    path = out or run.folder / "sample.png"
    figures.blocks(titled, model.bits, columns=min(count, 8)).save(path)
    return path


def draw(model: GenerativeModel, count: int, temperature: float, seed: int, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` samples in batches; the same latents at every temperature, since each starts from the same seed."""
    generator = torch.Generator(model.device).manual_seed(seed)
    sizes = [min(BATCH, count - start) for start in range(0, count, BATCH)]
    levels, worth = zip(*(model.sample(size, temperature, generator, **how) for size in sizes), strict=True)
    return torch.cat(levels), torch.cat(worth)
