"""`flowgen interpolate`."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flowgen import pictures
from flowgen.config import model_of
from flowgen.data import read_levels
from flowgen.models import GenerativeModel
from flowgen.progress import bar
from flowgen.training.find import find_checkpoint

log = logging.getLogger("flowgen")


def interpolate(*, first: Path, second: Path, name: str | None, steps: int, spherical: bool, device: str, out: Path | None) -> Path:
    """Save the way from one image to the other, through the latents above and through the pixels below. Raises FlowgenError.

    Both are cropped, resized and quantised like the data of the run. A path that ends in .gif becomes a film there and back.
    """
    run, checkpoint = find_checkpoint(name)
    model, crop = model_of(checkpoint, device), checkpoint["config"]["data"].get("crop")
    channels, size, _ = model.shape
    start, end = (read_levels(path, size, channels, crop, model.bits) for path in (first, second))
    model.watch(bar)
    ways = walk(model, start, end, torch.linspace(0, 1, steps), great_circle if spherical else line)
    latent, pixels = ways[0][:, 0], ways[1][:, 0].round().to(torch.uint8)
    if not torch.equal(latent[[0, -1]], torch.cat((start, end))):
        log.warning("the ends of the latent row differ from the images, which this model does not restore exactly from their latents")
    target = out or run.folder / "interpolation.png"
    if target.suffix.lower() == ".gif":
        frames = [torch.stack(pair) for pair in zip(latent, pixels, strict=True)]
        pictures.film([*frames, *frames[-2:0:-1]], model.bits, 2, target)
    else:
        rows = [(f"{'great circle' if spherical else 'line'} in the latents", latent), ("line in the pixels", pixels)]
        pictures.blocks(rows, model.bits, columns=steps).save(target)
    return target


def line(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """(1 - share) start + share end, which is exactly either end at share 0 and 1."""
    return (1 - share) * start + share * end


def great_circle(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Directions along the great circle, lengths along a line, of vectors (..., D) with share (..., 1).

    Shoemake, Animating rotation with quaternion curves (1985).
    """
    lengths = start.norm(dim=-1, keepdim=True), end.norm(dim=-1, keepdim=True)
    angle = torch.acos(((start * end).sum(-1, keepdim=True) / (lengths[0] * lengths[1])).clamp(-1, 1))
    direction = (torch.sin((1 - share) * angle) * start / lengths[0] + torch.sin(share * angle) * end / lengths[1]) / torch.sin(angle)
    straight = (torch.sin(angle).abs() < 1e-6) | (share == 0) | (share == 1)
    return torch.where(straight, line(start, end, share), direction * line(*lengths, share))


@torch.no_grad()
def walk(
    model: GenerativeModel,
    first: Tensor,
    second: Tensor,
    shares: Tensor,
    along: Callable[[Tensor, Tensor, Tensor], Tensor] = line,
) -> tuple[Tensor, Tensor]:
    """From each of `first` to its partner in `second`, levels (N, channels, height, width), at `shares` (steps,) of the way.

    Through the latents, as levels (steps, N, channels, height, width), and through the pixels, which lie between levels.
    """
    start, end = (model.encode(levels.to(model.device)) for levels in (first, second))
    latents = along(start, end, shares.to(start)[:, None, None]).flatten(0, 1)
    decoded = torch.cat([model.decode(part) for part in latents.split(max(len(first), len(shares)))])
    pixels = line(first.float(), second.float(), shares[:, None, None, None, None])
    return decoded.view(len(shares), *first.shape).cpu(), pixels.cpu()
