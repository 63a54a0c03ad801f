"""`flowgen interpolate`."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from flowgen import pictures
from flowgen.config import model_of
from flowgen.data import read_levels
from flowgen.progress import bar
from flowgen.training.find import find_checkpoint

log = logging.getLogger("flowgen")


def interpolate(first: Path, second: Path, name: str | None, steps: int, spherical: bool, device: str, out: Path | None) -> Path:
    """Save the way from one image to the other, through the latents above and through the pixels below. Raises FlowgenError.

    Both are cropped, resized and quantised like the data of the run. A path that ends in .gif becomes a film there and back.
    """
    run, checkpoint = find_checkpoint(name)
    model, crop = model_of(checkpoint, device), checkpoint["config"]["data"].get("crop")
    channels, size, _ = model.shape
    ends = torch.cat([read_levels(path, size, channels, crop, model.bits) for path in (first, second)])
    model.watch(bar)
    start, end = model.encode(ends.to(model.device))
    share = torch.linspace(0, 1, steps, device=model.device)[:, None]
    path_of = great_circle if spherical else line
    latent = model.decode(path_of(start, end, share)).cpu()
    pixels = line(ends[0].float(), ends[1].float(), share.cpu()[:, :, None, None]).round().to(torch.uint8)
    if not torch.equal(latent[[0, -1]], ends):
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
    """Directions along the great circle, lengths along a line. Shoemake, Animating rotation with quaternion curves (1985)."""
    lengths = start.norm(), end.norm()
    cosine = torch.dot(start, end) / (lengths[0] * lengths[1])
    angle = torch.acos(cosine.clamp(-1, 1))
    if torch.sin(angle).abs() < 1e-6:
        return line(start, end, share)
    direction = (torch.sin((1 - share) * angle) * start / lengths[0] + torch.sin(share * angle) * end / lengths[1]) / torch.sin(angle)
    return torch.where(share == 0, start, torch.where(share == 1, end, direction * line(*lengths, share)))
