"""Editing of attributes in latent space: `flowgen edit`."""

import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowgen.config.instantiate import build_data
from flowgen.config.loading import find_model
from flowgen.data.attributes import read_table
from flowgen.data.dataset import hashed_subset
from flowgen.data.preprocess import ImageStream, read_images
from flowgen.evaluation.latent_directions import (
    BATCH_SIZE,
    Directions,
    Moments,
    class_directions,
    compute_moments,
    fit_directions,
    move_along,
    one_hot,
)
from flowgen.models.base import ClassConditional, GenerativeModel
from flowgen.training.run_dir import Run, cached_artifact
from flowgen.utils import rendering
from flowgen.utils.console import Progress, progress_bar
from flowgen.utils.errors import UserError

DEFAULT_COUNT = 10_000  # maximum number of labeled images used to find directions
MAX_AMOUNT = 2.0  # both ends of the strip are at this amount of the attributes
STRIP_LENGTH = 9  # images per strip
GIF_FRAMES = 25  # frames of an animation, one way
MAX_CHANGED_SHARE = 0.01  # of the pixel values may be off by rounding at amount 0
log = logging.getLogger("flowgen")


class LabeledImages(NamedTuple):
    """Images with attributes: pairs of batches (images, attributes)."""

    names: tuple[str, ...]  # of the attributes
    classes: bool  # attributes are one-hot classes
    batches: Iterator[tuple[Tensor, Tensor]]
    num_images: int


def edit(
    *,
    paths: Sequence[Path],
    attributes: Sequence[str],
    amounts: Sequence[float],
    run: str | None,
    table: Path | None,
    direction: str,
    count: int,
    device: str,
    out: Path | None,
) -> Path:
    """Save images that are moved along the latent directions of attributes, one row per image.

    An amount of 1 leads from the mean latent of images without an attribute to the mean latent
    of those with it; for classes, from the class of the image to another class.

    Args:
        paths: Image files, cropped, resized and quantized like the data of the run.
        attributes: Names of attributes or classes, which are changed together.
        amounts: One amount per attribute, or one for all; each image is then shown before and
            after the change. Empty for a strip from -2 to 2.
        run: Name of the run, or None for the most recent one.
        table: CSV file with attributes of images, or None for the labels of the training images.
        direction: "ridge" (regression on all attributes) or "difference" (of means).
        count: Maximum number of labeled images used to find directions.
        device: Name of the device, or "auto".
        out: Output file. A name that ends in .gif selects an animation there and back.

    Returns:
        The path of the file.
    """
    amount_of = _amounts(attributes, amounts)
    run_dir, checkpoint, model = find_model(run, device, GenerativeModel)
    model.set_progress(progress_bar)
    channels, size, _ = model.image_shape
    crop = checkpoint["config"]["data"].get("crop")
    images = torch.cat([read_images(path, size, channels, crop, model.bits) for path in paths])
    directions = load_directions(
        run_dir, checkpoint, model, wanted=attributes, table=table, count=count, method=direction
    )
    path = out or run_dir.folder / "edit.png"
    is_gif = path.suffix.lower() == ".gif"
    fractions = _fractions(is_pair=bool(amounts), is_gif=is_gif)
    steps = move_along(model, directions, images, amount_of, fractions)
    unchanged = steps[fractions.abs().argmin()]
    if (unchanged != images).float().mean() > MAX_CHANGED_SHARE:
        log.warning(
            "this model does not reconstruct the images from their latents, so more than the "
            "attributes changes"
        )
    if is_gif:
        frames = list(steps)
        rendering.save_gif([*frames, *frames[-2:0:-1]], model.bits, len(paths), path)
    else:
        rows = steps.transpose(0, 1).flatten(0, 1)
        title = _title(amount_of, is_pair=bool(amounts))
        rendering.titled_grids([(title, rows)], model.bits, columns=len(fractions)).save(path)
    return path


def _amounts(attributes: Sequence[str], amounts: Sequence[float]) -> dict[str, float]:
    """Return the amount of each attribute, 1 by default."""
    if len(set(attributes)) < len(attributes):
        raise UserError("an attribute is given twice: give each one once, with its --amount")
    if len(amounts) not in (0, 1, len(attributes)):
        raise UserError(
            f"{len(amounts)} values of --amount do not match {len(attributes)} of --attribute: "
            "give one --amount per attribute, or one for all"
        )
    if len(amounts) != len(attributes):
        amounts = [amounts[0] if amounts else 1.0] * len(attributes)
    return dict(zip(attributes, amounts, strict=True))


def load_directions(
    run: Run,
    checkpoint: dict[str, Any],
    model: GenerativeModel,
    *,
    wanted: Collection[str] = (),
    table: Path | None = None,
    count: int = DEFAULT_COUNT,
    method: str = "ridge",
    progress: Progress = progress_bar,
) -> Directions:
    """Find the latent directions of attributes, or read them from the cache in the run.

    Args:
        run: The run of the model.
        checkpoint: Its checkpoint.
        model: The model of the checkpoint.
        wanted: Names of attributes that are needed. A class-conditional model has its own
            directions for its classes, which are returned if nothing else is wanted.
        table: CSV file with attributes of images, or None for the training images with their
            attributes or classes.
        count: Maximum number of labeled images.
        method: "ridge" or "difference", see `flowgen.evaluation.latent_directions`.
        progress: Progress bar for the batches of images.

    Returns:
        The directions, on the device of the model.

    Raises:
        UserError: if the images have no labels.
    """
    if (
        table is None
        and isinstance(model, ClassConditional)
        and model.num_classes is not None
        and set(wanted) <= {str(label) for label in range(model.num_classes)}
    ):
        return class_directions(model)
    config = checkpoint["config"]

    def find_moments() -> dict[str, Any]:
        if table:
            labeled = _images_of_table(model, config, table, count)
        else:
            labeled = _training_images(config, count)
        batches = progress(labeled.batches, "latents", -(-labeled.num_images // BATCH_SIZE))
        result = compute_moments(model, batches)
        kind = "classes" if labeled.classes else "attributes"
        log.info("directions of %d %s from %d images", len(labeled.names), kind, labeled.num_images)
        return {"names": list(labeled.names), "classes": labeled.classes, **result._asdict()}

    source: Any = sorted(config["data"].items(), key=str)
    if table and table.is_file():
        source = hashlib.sha256(table.read_bytes()).hexdigest()
    settings = (source, table and str(table.resolve()), count)
    cached = cached_artifact(run, checkpoint, "directions", settings, find_moments)
    statistics = Moments(*(cached[name] for name in Moments._fields))
    directions = fit_directions(statistics, tuple(cached["names"]), cached["classes"], method)
    return replace(directions, changes=directions.changes.to(model.device, model.dtype))


def _images_of_table(
    model: GenerativeModel, config: dict[str, Any], path: Path, count: int
) -> LabeledImages:
    table = read_table(path)
    subset = hashed_subset(len(table.files), count)
    channels, size, _ = model.image_shape
    stream = ImageStream(
        [table.files[index] for index in subset.tolist()],
        size=size,
        channels=channels,
        bits=model.bits,
        crop=config["data"].get("crop"),
        binarization=config["data"].get("binarization"),
    )
    images = (images for _, images in stream.batches(BATCH_SIZE))
    batches = zip(images, table.values[subset].split(BATCH_SIZE), strict=True)
    return LabeledImages(table.names, False, batches, len(subset))


def _training_images(config: dict[str, Any], count: int) -> LabeledImages:
    data = build_data(config)
    train = data.train
    classes = train.attributes is None
    if train.attributes is not None:
        names = data.attributes
        attributes = train.attributes
    elif train.labels is not None and data.num_classes is not None:
        names = tuple(str(label) for label in range(data.num_classes))
        attributes = one_hot(train.labels, data.num_classes)
    else:
        raise UserError(
            "the images of this run have no labels: put CelebA's attribute list into their "
            "folder, sort them into one folder per class, or pass a table with --labels"
        )
    attributes = attributes[hashed_subset(len(train), count)]
    images = data.batches("train", BATCH_SIZE, count)
    batches = zip(images, attributes.split(BATCH_SIZE), strict=True)
    return LabeledImages(names, classes, batches, len(attributes))


def _fractions(is_pair: bool, is_gif: bool) -> Tensor:
    """Return the fractions of the amounts that are shown."""
    start, end = (0.0, 1.0) if is_pair else (-MAX_AMOUNT, MAX_AMOUNT)
    if is_gif:
        return torch.linspace(start, end, GIF_FRAMES)
    return torch.linspace(start, end, 2 if is_pair else STRIP_LENGTH)


def _title(amount_of: dict[str, float], is_pair: bool) -> str:
    if is_pair:
        changes = [f"{attribute} by {amount:g}" for attribute, amount in amount_of.items()]
        return f"the image, and {', '.join(changes)}"
    return f"{', '.join(amount_of)}: from {-MAX_AMOUNT:g} to {MAX_AMOUNT:g}"
