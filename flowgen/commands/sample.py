"""`flowgen sample`."""

from pathlib import Path

import torch

from flowgen import figures
from flowgen.config import model_of
from flowgen.models import GenerativeModel
from flowgen.training.find import find_checkpoint

BATCH = 64


def sample(name: str | None, temperatures: list[float], count: int, seed: int, device: str, out: Path | None) -> Path:
    """Save `count` samples for each temperature, a block of rows each, from high to low log-probability. Raises FlowgenError."""
    run, checkpoint = find_checkpoint(name)
    model = model_of(checkpoint, device)
    titled = []
    for temperature in temperatures:
        levels, worth = draw(model, count, temperature, seed)
        titled.append((f"temperature {temperature:g}", levels[worth.argsort(descending=True)]))
    path = out or run.folder / "sample.png"
    figures.blocks(titled, checkpoint["config"]["data"]["bits"], columns=min(count, 8)).save(path)
    return path


def draw(model: GenerativeModel, count: int, temperature: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` samples in batches; the same latents at every temperature, since each starts from the same seed."""
    generator = torch.Generator(model.device).manual_seed(seed)
    sizes = [min(BATCH, count - start) for start in range(0, count, BATCH)]
    levels, worth = zip(*(model.sample(size, temperature, generator) for size in sizes), strict=True)
    return torch.cat(levels), torch.cat(worth)
