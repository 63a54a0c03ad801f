"""Interpolation between two images: `flowgen interpolate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgen.config.runs import find_model
from flowgen.data.preprocess import read_image
from flowgen.evaluation import interpolation
from flowgen.models.base import GenerativeModel
from flowgen.utils import console, memory, rendering
from flowgen.utils.errors import check_not_input


def interpolate(
    *,
    first: Path,
    second: Path,
    run: str | None,
    steps: int,
    spherical: bool,
    device: str,
    out: Path | None,
) -> Path:
    """Save an interpolation in latent space, with one in pixel space below it for comparison.

    Args:
        first: Image file, cropped, resized and quantized like the data of the run.
        second: Image file, prepared in the same way.
        run: Name of the run, or None for the newest one.
        steps: Number of images per row, including both ends.
        spherical: Interpolate along a great circle instead of a line.
        device: Name of the device, or "auto".
        out: Output file. A name that ends in .gif selects an animation there and back.

    Returns:
        The path of the file.
    """
    check_not_input(out, first, second)
    run_dir, checkpoint, model = find_model(run, device, GenerativeModel)
    model.set_progress(console.progress_bar)
    images = read_inputs([first, second], model, checkpoint["config"])
    memory.check_memory("--steps", steps, 8 * max(rendering.MIN_SIDE, *model.image_shape[1:]) ** 2)
    latent, pixels = interpolate_images(model, images[:1], images[1:], steps, spherical)
    if not torch.equal(latent[[0, -1]], images):
        console.log.warning(
            "the ends of the latent row differ from the images, because this model does not "
            "reconstruct images exactly"
        )
    path = out or run_dir.folder / "interpolation.png"
    if path.suffix.lower() == ".gif":
        frames = torch.stack((latent, pixels), 1)
        rendering.save_gif([*frames, *frames[1:-1].flip(0)], model.bits, 2, path)
    else:
        title = "along a great circle of latents" if spherical else "through the latents"
        grids = [(title, latent), ("through the pixels", pixels)]
        rendering.save_picture(rendering.titled_grids(grids, model.bits, columns=steps), path)
    return path


def read_inputs(paths: Sequence[Path], model: GenerativeModel, config: dict[str, Any]) -> Tensor:
    """Read image files and crop, resize and quantize them like the data of the run.

    Args:
        paths: Image files.
        model: Model that gets the images.
        config: Configuration of its run.
    """
    channels, *size = model.image_shape
    crop = config["data"].get("crop")
    return torch.cat([read_image(path, size, channels, crop, model.bits) for path in paths])


def interpolate_images(
    model: GenerativeModel, start: Tensor, end: Tensor, steps: int, spherical: bool
) -> tuple[Tensor, Tensor]:
    """Interpolate between two images in latent and in pixel space.

    Args:
        model: The model.
        start: The first image, (1, channels, height, width).
        end: The last image, in the same shape.
        steps: Number of images, including both ends.
        spherical: Interpolate latents along a great circle instead of a line.

    Returns:
        latent: Images decoded from the latents, uint8 (steps, channels, height, width).
        pixels: Images interpolated pixel by pixel, with the same shape and type.
    """
    curve = interpolation.slerp if spherical else interpolation.lerp
    latent, pixels = interpolation.interpolate_pairs(
        model, start, end, torch.linspace(0, 1, steps), curve
    )
    return latent[:, 0], pixels[:, 0].round().to(torch.uint8)
