"""`flowgen interpolate`."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from flowgen.config.loading import load_from_checkpoint
from flowgen.config.runs import find_checkpoint
from flowgen.data.preprocess import read_images
from flowgen.evaluation.interpolation import interpolate_pairs, lerp, slerp
from flowgen.models.base import GenerativeModel
from flowgen.utils import rendering
from flowgen.utils.console import progress_bar
from flowgen.utils.memory import check_memory

log = logging.getLogger("flowgen")


def interpolate(
    *,
    first: Path,
    second: Path,
    name: str | None,
    steps: int,
    spherical: bool,
    device: str,
    out: Path | None,
) -> Path:
    """Save the way from one image to the other, through the latents above and through the pixels below. Raises FlowgenError.

    Both are cropped, resized and quantised like the data of the run. A path that ends in .gif becomes a film there and back.
    """
    run, checkpoint = find_checkpoint(name)
    model, crop = load_from_checkpoint(checkpoint, device), checkpoint["config"]["data"].get("crop")
    channels, size, _ = model.image_shape
    start, end = (read_images(path, size, channels, crop, model.bits) for path in (first, second))
    side = max(rendering.MIN_SIDE, size)
    check_memory("--steps", steps, 8 * side**2)
    model.set_progress(progress_bar)
    latent, pixels = interpolate_images(model, start, end, steps, spherical)
    if not torch.equal(latent[[0, -1]], torch.cat((start, end))):
        log.warning(
            "the ends of the latent row differ from the images, which this model does not restore exactly from their latents"
        )
    target = out or run.folder / "interpolation.png"
    if target.suffix.lower() == ".gif":
        frames = [torch.stack(pair) for pair in zip(latent, pixels, strict=True)]
        rendering.save_gif([*frames, *frames[-2:0:-1]], model.bits, 2, target)
    else:
        rows = [
            (f"{'great circle' if spherical else 'line'} in the latents", latent),
            ("line in the pixels", pixels),
        ]
        rendering.titled_grids(rows, model.bits, columns=steps).save(target)
    return target


def interpolate_images(
    model: GenerativeModel, start: Tensor, end: Tensor, steps: int, spherical: bool
) -> tuple[Tensor, Tensor]:
    """From one image (1, channels, height, width) to the other, both ends among the `steps`: levels through the latents, and the pixels."""
    latent, pixels = interpolate_pairs(
        model, start, end, torch.linspace(0, 1, steps), slerp if spherical else lerp
    )
    return latent[:, 0], pixels[:, 0].round().to(torch.uint8)
