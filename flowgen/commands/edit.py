"""Editing of attributes in latent space: `flowgen edit`."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgen.commands.interpolate import read_inputs
from flowgen.config import instantiate, runs
from flowgen.data.attributes import AttributeTable, read_table
from flowgen.data.preprocess import ImageStream
from flowgen.data.splits import hashed_subset
from flowgen.evaluation.latent_directions import (
    BATCH_SIZE,
    Directions,
    Moments,
    check_names,
    class_directions,
    compute_moments,
    fit_directions,
    move_along,
)
from flowgen.models.base import ClassConditional, GenerativeModel
from flowgen.training.run_dir import Run, cached_artifact
from flowgen.utils import console, rendering
from flowgen.utils.errors import UserError, check_not_input

MAX_AMOUNT = 2.0  # both ends of the strip are at this amount of the attributes
STRIP_LENGTH = 9  # images per strip
GIF_FRAMES = 25  # frames of an animation, one way
MAX_CHANGED_SHARE = 0.01  # of the pixel values may be off by rounding at amount 0


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

    An amount of 1 is the mean change of the latents from images without an attribute to images
    with it, with `direction="ridge"` at constant other attributes; for classes, the change from the
    class of the image to another class.

    Args:
        paths: Image files, cropped, resized and quantized like the data of the run.
        attributes: Names of attributes or classes, which are changed together.
        amounts: One amount per attribute, or one for all; each image is then shown before and
            after the change. Empty for a strip from -2 to 2.
        run: Name of the run, or None for the newest one.
        table: CSV file with attributes of images, or None for the labels of the training images.
        direction: "ridge" (regression on all attributes) or "difference" (of means).
        count: Maximum number of labeled images used to find directions.
        device: Name of the device, or "auto".
        out: Output file. A name that ends in .gif selects an animation there and back.

    Returns:
        The path of the file.
    """
    amount_of = _amounts(attributes, amounts)
    check_not_input(out, *paths)
    run_dir, checkpoint, model = runs.find_model(run, device, GenerativeModel)
    model.set_progress(console.progress_bar)
    images = read_inputs(paths, model, checkpoint["config"])
    directions = load_directions(
        run_dir, checkpoint, model, wanted=attributes, table=table, count=count, method=direction
    )
    path = out or run_dir.folder / "edit.png"
    is_gif = path.suffix.lower() == ".gif"
    limits = (0.0, 1.0) if amounts else (-MAX_AMOUNT, MAX_AMOUNT)
    still_length = 2 if amounts else STRIP_LENGTH
    fractions = torch.linspace(*limits, GIF_FRAMES if is_gif else still_length)
    steps = move_along(model, directions, images, amount_of, fractions)
    if (steps[fractions.abs().argmin()] != images).float().mean() > MAX_CHANGED_SHARE:
        console.log.warning(
            "this model does not reconstruct the images from their latents, so more than the "
            "attributes changes"
        )
    if is_gif:
        rendering.save_gif([*steps, *steps[1:-1].flip(0)], model.bits, len(paths), path)
    else:
        title = f"{', '.join(amount_of)}: from {-MAX_AMOUNT:g} to {MAX_AMOUNT:g}"
        if amounts:
            changes = [f"{attribute} by {amount:g}" for attribute, amount in amount_of.items()]
            title = f"the image, and {', '.join(changes)}"
        grid = (title, steps.transpose(0, 1).flatten(0, 1))
        picture = rendering.titled_grids([grid], model.bits, columns=len(fractions))
        rendering.save_picture(picture, path)
    return path


def _amounts(attributes: Sequence[str], amounts: Sequence[float]) -> dict[str, float]:
    """Return the amount of each attribute, 1 by default."""
    if len(set(attributes)) < len(attributes):
        raise UserError("an attribute is given twice: give each attribute once, with its --amount")
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
    count: int = 10_000,
    method: str = "ridge",
    progress: console.Progress = console.progress_bar,
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
        UserError: If the images have no labels.
    """
    if (
        table is None
        and isinstance(model, ClassConditional)
        and model.num_classes is not None
        and set(wanted) <= {str(label) for label in range(model.num_classes)}
    ):
        return class_directions(model)
    config = checkpoint["config"]
    labeled = read_table(table) if table else None

    def find_moments() -> dict[str, Any]:
        names, classes, attributes, images = (
            _table_images(model, config, labeled, count)
            if labeled
            else _training_images(config, count)
        )
        check_names(wanted, names, classes)
        batches = zip(images, attributes.split(BATCH_SIZE), strict=True)
        num_batches = -(-len(attributes) // BATCH_SIZE)
        moments = compute_moments(model, progress(batches, "latents", num_batches))
        kind = "classes" if classes else "attributes"
        console.log.info("directions of %d %s from %d images", len(names), kind, len(attributes))
        return {"names": list(names), "classes": classes, **moments._asdict()}

    source = labeled.fingerprint() if labeled else sorted(config["data"].items(), key=str)
    settings = (source, count)
    cached = cached_artifact(run, checkpoint, "directions", settings, find_moments)
    moments = Moments(*(cached[name] for name in Moments._fields))
    directions = fit_directions(moments, tuple(cached["names"]), cached["classes"], method)
    return replace(directions, changes=directions.changes.to(model.device, model.dtype))


# Names of attributes, whether they are one-hot classes, their values (N, attributes), and batches
# of the images.
LabeledImages = tuple[tuple[str, ...], bool, Tensor, Iterator[Tensor]]


def _table_images(
    model: GenerativeModel, config: dict[str, Any], table: AttributeTable, count: int
) -> LabeledImages:
    subset = hashed_subset(len(table.files), count)
    channels, *size = model.image_shape
    stream = ImageStream(
        [table.files[index] for index in subset.tolist()],
        size=size,
        channels=channels,
        bits=model.bits,
        crop=config["data"].get("crop"),
        binarization=config["data"].get("binarization"),
    )
    images = (images for _, images in stream.batches(BATCH_SIZE))
    return table.names, False, table.values[subset], images


def _training_images(config: dict[str, Any], count: int) -> LabeledImages:
    data = instantiate.build_data(config)
    train = data.train
    if train.attributes is not None:
        names = data.attributes
        attributes = train.attributes
    elif train.labels is not None and data.num_classes is not None:
        names = tuple(str(label) for label in range(data.num_classes))
        attributes = torch.nn.functional.one_hot(train.labels.long(), data.num_classes)
    else:
        raise UserError(
            "the images of this run have no labels: put CelebA's attribute list into their "
            "folder, sort them into one folder per class, or pass a table with --labels"
        )
    attributes = attributes[hashed_subset(len(train), count)]
    return names, train.attributes is None, attributes, data.batches("train", BATCH_SIZE, count)
