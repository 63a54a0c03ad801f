"""`flowgen complete`."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowgen.config.loading import find_model
from flowgen.data.preprocess import image_size, read_unscaled
from flowgen.models.base import (
    GenerativeModel,
    InpaintingResult,
    LinearMeasurement,
    SupportsInpainting,
)
from flowgen.utils import rendering
from flowgen.utils.console import progress_bar
from flowgen.utils.errors import UserError

DRAWS = 5  # that are shown
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey: ITU-R BT.601, as Pillow converts
SHARES = [str(percent) for percent in range(1, 100)]
log = logging.getLogger("flowgen")


def complete(
    *,
    image: Path,
    keep: str,
    methods: Sequence[str],
    name: str | None,
    sweeps: int | None,
    seed: int,
    device: str,
    out: Path | None,
) -> Path:
    """Save, for each method, the image, what is kept of it, the restored ones' mean and spread, and some of them. Raises FlowgenError."""
    run, _, model = find_model(name, device, SupportsInpainting)
    model.set_progress(progress_bar)
    sums = linear(keep, model.image_shape)
    images = _read(image, model, sums).to(model.device)
    known = sums or mask(keep, model.image_shape, seed).to(model.device)
    whole = images / (2**model.bits - 1)
    kept = (
        known.apply(whole)
        if isinstance(known, LinearMeasurement)
        else torch.where(known, whole, 0.5)
    )
    rows = []
    for method in methods or model.completions:
        (draws, mean, figures), spread = inpaint_image(model, images, known, method, sweeps, seed)
        for figure, value in figures.items():
            log.info("%s: %s %.3f", method, figure.replace("_", " "), value)
        shown = torch.cat((whole, kept, mean[None], spread[None], draws[:DRAWS]))
        rows.append((f"{method}: image, kept, mean, spread, draws", to_uint8(shown)))
    target = out or run.folder / "completion.png"
    rendering.titled_grids(rows, 8, columns=4 + DRAWS).save(target)
    return target


def linear(keep: str, shape: tuple[int, int, int]) -> LinearMeasurement | None:
    """The sums of pixels that `--keep grey` or `--keep smaller:FACTOR` keep, None of other words. Raises FlowgenError where none fit."""
    channels, height, width = shape
    word, _, factor = keep.partition(":")
    if keep == "grey":
        if channels != len(LUMA):
            raise UserError(
                "--keep grey is for models of colour images, which this is none of: name another with --run"
            )
        return LinearMeasurement(torch.tensor(LUMA)[:, None, None], grayscale=True)
    if word != "smaller":
        return None
    factors = [
        str(side) for side in range(2, min(height, width) + 1) if height % side == width % side == 0
    ]
    if factor not in factors:
        raise UserError(
            f"--keep smaller:FACTOR wants a factor of the size, one of {', '.join(factors)}, not {factor!r}"
        )
    return LinearMeasurement(torch.full((channels, 1, 1), 1 / int(factor) ** 2), factor=int(factor))


def _read(image: Path, model: GenerativeModel, sums: LinearMeasurement | None) -> Tensor:
    """The image; one that is smaller already is read as it is and enlarged, each pixel to a block."""
    channels, height, width = model.image_shape
    if (
        sums is not None
        and sums.factor > 1
        and (size := image_size(image)) == (height // sums.factor, width // sums.factor)
    ):
        small = read_unscaled(image, (channels, *size), model.bits)
        return small.repeat_interleave(sums.factor, 2).repeat_interleave(sums.factor, 3)
    return read_unscaled(image, model.image_shape, model.bits)


def inpaint_image(
    model: SupportsInpainting,
    images: Tensor,
    known: Tensor | LinearMeasurement,
    method: str,
    sweeps: int | None,
    seed: int,
) -> tuple[InpaintingResult, Tensor]:
    """What the method makes of an image (1, channels, height, width) from this seed on, and the spread of its draws, from 0 to 1."""
    generator = torch.Generator(model.device).manual_seed(seed)
    completion = model.inpaint(images, known, method=method, sweeps=sweeps, generator=generator)
    return completion, 2 * completion.draws.std(
        0, correction=0
    )  # at most 1, where one half is black and the other white


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
        known[:] = read_unscaled(Path(keep), (1, height, width), 1)[0] == 1
    else:
        words = "left, right, top, bottom, border, random:PERCENT, grey, smaller:FACTOR, or an image that is white where pixels are known"
        raise UserError(f"--keep is {words}, not {keep!r}")
    check_mask(known, keep)
    return known


def check_mask(known: Tensor, keep: str) -> None:
    """Raise FlowgenError where no pixel is left to restore, or none is known; `keep` names the mask."""
    if known.all():
        raise UserError(
            f"{keep} keeps every pixel, so that none is left to restore: make what is missing black"
        )
    if not known.any():
        raise UserError(
            f"{keep} keeps no pixel: make what is known white, or draw whole images with `flowgen sample`"
        )


def to_uint8(brightness: Tensor) -> Tensor:
    """Brightness from 0 to 1, of pixels or probabilities, as levels of 8 bits."""
    return (255 * brightness).round().to(torch.uint8).cpu()
