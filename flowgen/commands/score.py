"""`flowgen score`."""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowgen import pictures
from flowgen.commands.against import compare
from flowgen.commands.judge import BATCH, Judge, judge_of
from flowgen.data import Stream, check_pictures
from flowgen.errors import FlowgenError, check_folder_of
from flowgen.judging.outliers import DEFAULT
from flowgen.progress import bar

SHOWN, PICTURED, COLUMNS = 20, 8, 4


class Scored(NamedTuple):
    """An image, its figures by name, and how far its likelihood lies from the usual one."""

    name: str
    levels: Tensor
    figures: dict[str, float]


def score(
    *,
    paths: list[Path],
    name: str | None,
    against: list[str],
    by: str | None,
    count: int,
    table: Path | None,
    seed: int,
    device: str,
    out: Path | None,
) -> Iterator[str]:
    """Lines that say how strange images are to a model, and, with `against`, how well that tells other data from the run's own.

    The strangest and the most typical go into a picture, all into `table`, a CSV file. Raises FlowgenError.
    """
    if table is not None:
        check_folder_of(table)
    judge = judge_of(name, count, seed, device)
    if by is not None and by not in judge.outliers.names:
        raise FlowgenError(f"--by {by} needs a flow, which this model is none: choose one of {', '.join(judge.outliers.names)}")
    if paths:
        yield from _images(judge, paths, by or DEFAULT, table, seed, out)
    if against:
        yield from compare(judge, against, count, seed, device)


def _images(judge: Judge, paths: list[Path], by: str, table: Path | None, seed: int, out: Path | None) -> Iterator[str]:
    channels, size, _ = judge.model.shape
    check_pictures(channels)
    how = {key: judge.config["data"].get(key) for key in ("crop", "binarise")}
    stream = Stream(paths, size=size, channels=channels, bits=judge.model.bits, seed=seed, **how)
    strangest: list[Scored] = []
    typical: list[Scored] = []
    seen = 0
    with _table(table) as write:
        for scored in _scored(judge, stream, seed):
            write(scored)
            seen += len(scored)
            strangest = sorted(strangest + scored, key=lambda image: -image.figures[by])[:SHOWN]
            typical = sorted(typical + scored, key=lambda image: image.figures["typicality"])[:PICTURED]
    if not seen:
        raise FlowgenError("none of the images could be read: name others")
    unit = judge.figure
    yield f"{unit.replace('_', ' '):>14} {'percentile':>11} {'p-value':>8}  image, the strangest by {by} first"
    for image in strangest:
        figures = image.figures
        yield f"{figures[unit]:14.3f} {figures['percentile']:11.1f} {figures[f'{by}_p']:8.4f}  {image.name}"
    if seen > SHOWN:
        yield f"... and {seen - SHOWN} more" + ("" if table else ": --csv FILE writes them all")
    target = out or judge.folder / "score.png"
    titled = [(f"the strangest by {by}", strangest[:PICTURED]), ("the most typical", typical)]
    pictures.stack([(title, _tiles(judge, images, by)) for title, images in titled]).save(target)
    yield from [str(path) for path in (target, table) if path]


def _scored(judge: Judge, stream: Stream, seed: int) -> Iterator[list[Scored]]:
    generator = torch.Generator(judge.model.device).manual_seed(seed)
    for names, levels in bar(stream.batches(BATCH), "images", -(-len(stream) // BATCH)):
        figures = judge.figures(levels, generator)
        rows = [{key: values[place].item() for key, values in figures.items()} for place in range(len(names))]
        yield [Scored(*each) for each in zip(names, levels, rows, strict=True)]


def _tiles(judge: Judge, images: list[Scored], by: str) -> Any:
    titles = [f"{Path(image.name).name[-16:]}\n{image.figures[judge.figure]:.3f}, p {image.figures[f'{by}_p']:.3f}" for image in images]
    return pictures.tiles(torch.stack([image.levels for image in images]), judge.model.bits, titles, COLUMNS)


@contextmanager
def _table(path: Path | None) -> Iterator[Callable[[list[Scored]], None]]:
    """What writes a line for each image into a CSV file, as the scores come; nothing where no file is wanted."""
    if path is None:
        yield lambda scored: None
        return
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)

        def write(scored: list[Scored]) -> None:
            if file.tell() == 0:
                writer.writerow(["image", *scored[0].figures])
            writer.writerows([image.name, *(f"{value:.6g}" for value in image.figures.values())] for image in scored)

        yield write
