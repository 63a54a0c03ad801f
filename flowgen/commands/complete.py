"""Inpainting: `flowgen complete`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgen.commands.interpolate import read_inputs
from flowgen.config.runs import find_model
from flowgen.data.preprocess import image_size, read_unscaled
from flowgen.models.base import (
    GenerativeModel,
    InpaintingResult,
    LinearMeasurement,
    Observation,
    SupportsInpainting,
)
from flowgen.utils import console, rendering
from flowgen.utils.errors import UserError, check_not_input
from flowgen.utils.metrics import BITS_PER_DIM, CONDITIONAL_LOG_PROB

MAX_SAMPLES_SHOWN = 5
LUMA_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, as in Pillow


def complete(
    *,
    image: Path,
    known: str,
    sampler: Sequence[str],
    run: str | None,
    steps: int | None,
    seed: int,
    device: str,
    out: Path | None,
) -> Path:
    """Save an inpainting of an image.

    The picture has one row per sampler: the image, its known part, the mean and the spread (twice
    the standard deviation) of the samples, and some of the samples.

    Args:
        image: Image file. It is cropped and resized like the data of the run, unless it has the
            model's size or, for "downsample:FACTOR", the smaller size.
        known: The known part of the image, see `measurement` and `mask`.
        sampler: Names of the samplers; empty for all that the model has.
        run: Name of the run, or None for the newest one that supports inpainting.
        steps: Number of steps of the sampler, or None for its default.
        seed: Seed of the samples and of a random mask.
        device: Name of the device, or "auto".
        out: Output file.

    Returns:
        The path of the file.
    """
    check_not_input(out, image, Path(known))
    run_dir, checkpoint, model = find_model(run, device, SupportsInpainting)
    model.set_progress(console.progress_bar)
    linear = measurement(known, model.image_shape)
    images = _read_image(image, model, linear, checkpoint["config"]).to(model.device)
    brightness = images / (2**model.bits - 1)
    observation: Observation = linear or mask(known, model.image_shape, seed).to(model.device)
    observed = (
        torch.where(observation, brightness, 0.5)
        if isinstance(observation, Tensor)
        else observation.apply(brightness)
    )
    rows = []
    for name in sampler or model.samplers:
        result, spread = inpaint_image(model, images, observation, name, steps, seed)
        for metric, value in result.metrics.items():
            sign = BITS_PER_DIM.bound_sign(model.likelihood) if metric == BITS_PER_DIM.name else ""
            console.log.info("%s: %s %s%.3f", name, metric.replace("_", " "), sign, value)
        samples = result.draws[:MAX_SAMPLES_SHOWN]
        row = torch.cat((brightness, observed, result.mean[None], spread[None], samples))
        rows.append((f"{name}: image, known part, mean, spread, samples", rendering.to_uint8(row)))
    path = out or run_dir.folder / "completion.png"
    picture = rendering.titled_grids(rows, 8, columns=4 + MAX_SAMPLES_SHOWN)
    rendering.save_picture(picture, path)
    return path


def log_prob(
    *, image: Path, known: str, run: str | None, steps: int | None, seed: int, device: str
) -> str:
    """Return log P(unknown | known) of an image as text.

    Args:
        image: Image file with all of its pixels, cropped and resized like the data of the run
            unless it has the model's size.
        known: The known pixels, see `mask`.
        run: Name of the run, or None for the newest one that supports inpainting.
        steps: Number of steps of the method, or None for its default.
        seed: Seed of the estimate and of a random mask.
        device: Name of the device, or "auto".
    """
    _, checkpoint, model = find_model(run, device, SupportsInpainting)
    model.set_progress(console.progress_bar)
    if measurement(known, model.image_shape):
        raise UserError(
            f"--log-prob needs known pixels, and --known {known} gives sums of pixels: choose a "
            "side, border, random:PERCENT or a mask image"
        )
    observation = mask(known, model.image_shape, seed).to(model.device)
    metrics = model.conditional_log_prob(
        _read_image(image, model, None, checkpoint["config"]).to(model.device),
        observation,
        steps=steps,
        generator=torch.Generator(model.device).manual_seed(seed),
    )
    value = metrics[CONDITIONAL_LOG_PROB.name]
    lines = [
        f"log P(unknown | known) {value.sign}{value.value:.3f} ± {value.error or 0:.3f} nats, "
        f"{value.likelihood}",
        f"unknown numbers {int((~observation).sum())} of {observation.numel()}",
    ]
    for name, other in metrics.measured.items():
        if name != value.metric.name:
            lines.append(f"{name.replace('_', ' ')} {other.value:.1f}")
    return "\n".join([*lines, f"method {metrics.facts['method']}"])


def measurement(known: str, image_shape: tuple[int, int, int]) -> LinearMeasurement | None:
    """Return the linear measurement that a value of `--known` describes.

    Args:
        known: "grayscale" (luma of a color image) or "downsample:FACTOR" (means over blocks of
            FACTOR x FACTOR pixels).
        image_shape: Channels, height and width of the images.

    Returns:
        The measurement, or None for other values, which describe a mask.
    """
    channels, height, width = image_shape
    name, _, factor = known.partition(":")
    if known == "grayscale":
        if channels != len(LUMA_WEIGHTS):
            raise UserError(
                "--known grayscale needs a model of color images: choose another run with --run"
            )
        return LinearMeasurement(torch.tensor(LUMA_WEIGHTS)[:, None, None], grayscale=True)
    if name != "downsample":
        return None
    factors = [str(side) for side in range(2, height + 1) if height % side == width % side == 0]
    if factor not in factors:
        raise UserError(
            f"FACTOR of --known downsample:FACTOR must be one of {', '.join(factors)}, "
            f"not {factor!r}"
        )
    weights = torch.full((channels, 1, 1), 1 / int(factor) ** 2)
    return LinearMeasurement(weights, factor=int(factor))


def _read_image(
    image: Path, model: GenerativeModel, linear: LinearMeasurement | None, config: dict[str, Any]
) -> Tensor:
    """Read an image; one that has been downsampled already is enlarged, one block per pixel.

    An image of another size is cropped and resized like the data of the run, except for a small
    one with "downsample:FACTOR": enlarged pixels are not the measured means.
    """
    channels, height, width = model.image_shape
    size = image_size(image)
    factor = linear.factor if linear else 1
    if factor > 1 and size == (height // factor, width // factor):
        small = read_unscaled(image, (channels, *size), model.bits)
        return small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    is_small = size[0] < height or size[1] < width
    if size == (height, width) or (factor > 1 and is_small):
        return read_unscaled(image, model.image_shape, model.bits)
    images = read_inputs([image], model, config)
    console.log.info(
        "%s is %dx%d pixels: cropped and resized to %dx%d like the training images",
        image,
        size[1],
        size[0],
        width,
        height,
    )
    return images


def mask(known: str, image_shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Return the mask that a value of `--known` describes.

    Args:
        known: The known half ("left", "right", "top", "bottom"), "border" (all but the center),
            "random:PERCENT" (of the pixels), or the path of an image that is white where pixels
            are known.
        image_shape: Channels, height and width of the images.
        seed: Seed of a random mask.

    Returns:
        A boolean mask (channels, height, width), true where a pixel is known.
    """
    _, height, width = image_shape
    row = torch.arange(height)[:, None]
    column = torch.arange(width)
    masks = {
        "left": column < width // 2,
        "right": column >= width // 2,
        "top": row < height // 2,
        "bottom": row >= height // 2,
        "border": (row < height // 4)
        | (row >= height - height // 4)
        | (column < width // 4)
        | (column >= width - width // 4),
    }
    name, _, percent = known.partition(":")
    if known in masks:
        mask = masks[known]
    elif name == "random" and percent in map(str, range(1, 100)):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(height, width, generator=generator) < int(percent) / 100
    elif Path(known).suffix:
        mask = read_unscaled(Path(known), (1, height, width), 1)[0] == 1
    else:
        raise UserError(
            "--known must be left, right, top, bottom, border, random:PERCENT, grayscale, "
            "downsample:FACTOR, or the path of an image that is white where pixels are known, "
            f"not {known!r}"
        )
    check_mask(mask, known)
    return mask.expand(image_shape)


def check_mask(mask: Tensor, name: str) -> None:
    """Raise a `UserError` that mentions `name` if all pixels or no pixels are known."""
    if mask.all():
        raise UserError(
            f"{name} marks every pixel as known, so nothing is left to inpaint: make the missing "
            "pixels black"
        )
    if not mask.any():
        raise UserError(
            f"{name} marks no pixel as known: make the known pixels white, or generate whole "
            "images with `flowgen sample`"
        )


def inpaint_image(
    model: SupportsInpainting,
    images: Tensor,
    known: Observation,
    sampler: str,
    steps: int | None,
    seed: int,
) -> tuple[InpaintingResult, Tensor]:
    """Inpaint one image.

    Args:
        model: The model.
        images: The image (1, channels, height, width). Its unknown part is ignored.
        known: Mask (channels, height, width), or a linear measurement.
        sampler: Name of the sampler.
        steps: Number of steps of the sampler, or None for its default.
        seed: Seed of the samples.

    Returns:
        result: Samples and their mean, with values in [0, 1].
        spread: Twice the standard deviation (channels, height, width), in [0, 1]: it is 1 for a
            pixel that is black in one half of the samples and white in the other.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    result = model.inpaint(images, known, sampler=sampler, steps=steps, generator=generator)
    return result, 2 * result.std
