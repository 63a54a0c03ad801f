"""`flowgen edit`."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from flowgen import pictures
from flowgen.commands.directions import directions_of
from flowgen.config import find_model
from flowgen.data import read_levels
from flowgen.directions import move_along
from flowgen.errors import FlowgenError
from flowgen.models import GenerativeModel
from flowgen.progress import bar

FARTHEST, STEPS, FRAMES = 2.0, 9, 25
ALIKE = 0.01  # of the pixels may fall into the next level by rounding
log = logging.getLogger("flowgen")


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
        raise FlowgenError("an attribute is named twice: name each once, with its --by")
    if len(amounts) not in (0, 1, len(attributes)):
        raise FlowgenError(f"{len(amounts)} times --by does not fit {len(attributes)} times --attribute: give one for each, or one for all")
    run, checkpoint, model = find_model(name, device, GenerativeModel)
    model.watch(bar)
    channels, size, _ = model.shape
    crop = checkpoint["config"]["data"].get("crop")
    levels = torch.cat([read_levels(path, size, channels, crop, model.bits) for path in paths])
    found = directions_of(run, checkpoint, model, wanted=attributes, table=table, count=count, method=method)
    per = dict(zip(attributes, list(amounts) * (len(attributes) if len(amounts) == 1 else 1) or [1.0] * len(attributes), strict=True))
    target = out or run.folder / "edit.png"
    film = target.suffix.lower() == ".gif"
    start, end = (0.0, 1.0) if amounts else (-FARTHEST, FARTHEST)
    shares = torch.linspace(start, end, FRAMES if film else 2 if amounts else STEPS)
    rows = move_along(model, found, levels, per, shares)
    if (rows[shares.abs().argmin()] != levels).float().mean() > ALIKE:  # at share 0
        log.warning("this model does not restore the images from their latents: what changes is not the attributes alone")
    if film:
        frames = list(rows)
        pictures.film([*frames, *frames[-2:0:-1]], model.bits, len(paths), target)
    else:
        said = ", ".join(f"{attribute} by {by:g}" if amounts else attribute for attribute, by in per.items())
        title = f"the image, and {said}" if amounts else f"{said}: from {start:g} to {end:g}"
        pictures.blocks([(title, rows.transpose(0, 1).flatten(0, 1))], model.bits, columns=len(shares)).save(target)
    return target
