"""The directions of attributes in a run's latents, found once and kept with the run."""

import hashlib
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from flowgen.commands.kept import kept
from flowgen.config import build_data
from flowgen.data import Stream, part, read_table
from flowgen.directions import BATCH, Directions, Moments, class_directions, directions_from, moments, one_hot
from flowgen.errors import FlowgenError
from flowgen.models import Classifies, GenerativeModel
from flowgen.progress import Progress, bar
from flowgen.training.run import Run

COUNT = 10_000  # images at most that they are found from
log = logging.getLogger("flowgen")


def directions_of(
    run: Run,
    checkpoint: dict[str, Any],
    model: GenerativeModel,
    *,
    wanted: Collection[str] = (),
    table: Path | None = None,
    count: int = COUNT,
    method: str = "ridge",
    progress: Progress = bar,
) -> Directions:
    """Of the attributes in `table`, a CSV file, else of what the training images are known to have: CelebA's attributes, or classes.

    A model that knows classes itself needs no images for them, unless it is something else that is `wanted`. Raises FlowgenError where no
    attribute is known.
    """
    if isinstance(model, Classifies) and model.classes is not None and table is None and set(wanted) <= set(map(str, range(model.classes))):
        return class_directions(model)
    config = checkpoint["config"]
    of_images = hashlib.sha256(table.read_bytes()).hexdigest() if table and table.is_file() else sorted(config["data"].items(), key=str)

    def find() -> dict[str, Any]:
        names, classes, images, total = _from_table(model, config, table, count) if table else _from_training(config, count)
        found = moments(model, progress(images, "latents", -(-total // BATCH)))
        log.info("directions of %d %s from %d images", len(names), "classes" if classes else "attributes", total)
        return {"names": list(names), "classes": classes, **found._asdict()}

    found = kept(run, checkpoint, "directions", (of_images, table and str(table.resolve()), count), find)
    of_latents = Moments(*(found[name] for name in Moments._fields))
    directions = directions_from(of_latents, tuple(found["names"]), found["classes"], method)
    return Directions(directions.names, directions.changes.to(model.device, model.dtype), directions.classes)


Labelled = tuple[tuple[str, ...], bool, Iterator[tuple[Tensor, Tensor]], int]


def _from_training(config: dict[str, Any], count: int) -> Labelled:
    data = build_data(config)
    train = data.train
    if train.attributes is not None:
        names, classes, attributes = data.attributes, False, train.attributes
    elif train.labels is not None and data.classes is not None:
        names, classes, attributes = tuple(map(str, range(data.classes))), True, one_hot(train.labels, data.classes)
    else:
        raise FlowgenError(
            "nothing is known of this run's images: put CelebA's list beside them, sort them into folders, or name a table with --labels"
        )
    chosen = attributes[part(len(train), count)]
    return names, classes, zip(data.batches("train", BATCH, count), chosen.split(BATCH), strict=True), len(chosen)


def _from_table(model: GenerativeModel, config: dict[str, Any], path: Path, count: int) -> Labelled:
    table = read_table(path)
    chosen = part(len(table.files), count)
    how = {key: config["data"].get(key) for key in ("crop", "binarise")}
    channels, size, _ = model.shape
    stream = Stream([table.files[place] for place in chosen.tolist()], size=size, channels=channels, bits=model.bits, **how)
    pairs = zip((levels for _, levels in stream.batches(BATCH)), table.values[chosen].split(BATCH), strict=True)
    return table.names, False, pairs, len(chosen)
