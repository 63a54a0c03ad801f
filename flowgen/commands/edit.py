"""The directions of attributes in a run's latents, found once and kept with the run."""

import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

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

COUNT = 10_000  # images at most that they are found from
log = logging.getLogger("flowgen")


def load_directions(
    run: Run,
    checkpoint: dict[str, Any],
    model: GenerativeModel,
    *,
    wanted: Collection[str] = (),
    table: Path | None = None,
    count: int = COUNT,
    method: str = "ridge",
    progress: Progress = progress_bar,
) -> Directions:
    """Of the attributes in `table`, a CSV file, else of what the training images are known to have: CelebA's attributes, or classes.

    A model that knows classes itself needs no images for them, unless it is something else that is `wanted`. Raises FlowgenError where no
    attribute is known.
    """
    if (
        isinstance(model, ClassConditional)
        and model.num_classes is not None
        and table is None
        and set(wanted) <= set(map(str, range(model.num_classes)))
    ):
        return class_directions(model)
    config = checkpoint["config"]
    of_images = (
        hashlib.sha256(table.read_bytes()).hexdigest()
        if table and table.is_file()
        else sorted(config["data"].items(), key=str)
    )

    def find() -> dict[str, Any]:
        names, classes, images, total = (
            _from_table(model, config, table, count) if table else _from_training(config, count)
        )
        found = compute_moments(model, progress(images, "latents", -(-total // BATCH_SIZE)))
        log.info(
            "directions of %d %s from %d images",
            len(names),
            "classes" if classes else "attributes",
            total,
        )
        return {"names": list(names), "classes": classes, **found._asdict()}

    found = cached_artifact(
        run, checkpoint, "directions", (of_images, table and str(table.resolve()), count), find
    )
    of_latents = Moments(*(found[name] for name in Moments._fields))
    directions = fit_directions(of_latents, tuple(found["names"]), found["classes"], method)
    return Directions(
        directions.names, directions.changes.to(model.device, model.dtype), directions.classes
    )


Labelled = tuple[tuple[str, ...], bool, Iterator[tuple[Tensor, Tensor]], int]


def _from_training(config: dict[str, Any], count: int) -> Labelled:
    data = build_data(config)
    train = data.train
    if train.attributes is not None:
        names, classes, attributes = data.attributes, False, train.attributes
    elif train.labels is not None and data.num_classes is not None:
        names, classes, attributes = (
            tuple(map(str, range(data.num_classes))),
            True,
            one_hot(train.labels, data.num_classes),
        )
    else:
        raise UserError(
            "nothing is known of this run's images: put CelebA's list beside them, sort them into folders, or name a table with --labels"
        )
    chosen = attributes[hashed_subset(len(train), count)]
    return (
        names,
        classes,
        zip(data.batches("train", BATCH_SIZE, count), chosen.split(BATCH_SIZE), strict=True),
        len(chosen),
    )


def _from_table(model: GenerativeModel, config: dict[str, Any], path: Path, count: int) -> Labelled:
    table = read_table(path)
    chosen = hashed_subset(len(table.files), count)
    how = {key: config["data"].get(key) for key in ("crop", "binarization")}
    channels, size, _ = model.image_shape
    stream = ImageStream(
        [table.files[place] for place in chosen.tolist()],
        size=size,
        channels=channels,
        bits=model.bits,
        **how,
    )
    pairs = zip(
        (images for _, images in stream.batches(BATCH_SIZE)),
        table.values[chosen].split(BATCH_SIZE),
        strict=True,
    )
    return table.names, False, pairs, len(chosen)


FARTHEST, STEPS, FRAMES = 2.0, 9, 25
ALIKE = 0.01  # of the pixels may fall into the next level by rounding


def edit(
    *,
    paths: Sequence[Path],
    attributes: Sequence[str],
    amounts: Sequence[float],
    name: str | None,
    table: Path | None,
    method: str,
    count: int,
    device: str,
    out: Path | None,
) -> Path:
    """Save images as they change along attributes, a row each: from -2 to 2, or, with `amounts`, beside what these make of them.

    An amount of 1 leads from the images without an attribute to those with it, or from the image's class to another. A path that ends
    in .gif becomes a film there and back. Raises FlowgenError.
    """
    if len(set(attributes)) < len(attributes):
        raise UserError("an attribute is named twice: name each once, with its --by")
    if len(amounts) not in (0, 1, len(attributes)):
        raise UserError(
            f"{len(amounts)} times --by does not fit {len(attributes)} times --attribute: give one for each, or one for all"
        )
    run, checkpoint, model = find_model(name, device, GenerativeModel)
    model.set_progress(progress_bar)
    channels, size, _ = model.image_shape
    crop = checkpoint["config"]["data"].get("crop")
    images = torch.cat([read_images(path, size, channels, crop, model.bits) for path in paths])
    found = load_directions(
        run, checkpoint, model, wanted=attributes, table=table, count=count, method=method
    )
    per = dict(
        zip(
            attributes,
            list(amounts) * (len(attributes) if len(amounts) == 1 else 1)
            or [1.0] * len(attributes),
            strict=True,
        )
    )
    target = out or run.folder / "edit.png"
    film = target.suffix.lower() == ".gif"
    start, end = (0.0, 1.0) if amounts else (-FARTHEST, FARTHEST)
    shares = torch.linspace(start, end, FRAMES if film else 2 if amounts else STEPS)
    rows = move_along(model, found, images, per, shares)
    if (rows[shares.abs().argmin()] != images).float().mean() > ALIKE:  # at share 0
        log.warning(
            "this model does not restore the images from their latents: what changes is not the attributes alone"
        )
    if film:
        frames = list(rows)
        rendering.save_gif([*frames, *frames[-2:0:-1]], model.bits, len(paths), target)
    else:
        said = ", ".join(
            f"{attribute} by {by:g}" if amounts else attribute for attribute, by in per.items()
        )
        title = f"the image, and {said}" if amounts else f"{said}: from {start:g} to {end:g}"
        rendering.titled_grids(
            [(title, rows.transpose(0, 1).flatten(0, 1))], model.bits, columns=len(shares)
        ).save(target)
    return target
