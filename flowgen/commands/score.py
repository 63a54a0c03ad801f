"""A model with what is usual among its validation images, by which other images are judged."""

import csv
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowgen.commands.runs import readable_runs
from flowgen.config.compose import read_config
from flowgen.config.instantiate import build_data, resolve_target
from flowgen.config.loading import data_section, find_model, match_model, same_dataset
from flowgen.config.runs import find_checkpoint
from flowgen.data.dataset import ImageDataset
from flowgen.data.preprocess import ImageStream, check_color_channels
from flowgen.evaluation.ood import AUROC, DEFAULT_SCORE, OODDetector, auroc, png_complexity
from flowgen.models.base import GenerativeModel
from flowgen.training.checkpoint import read_portable_metadata, zoo, zoo_file
from flowgen.training.run_dir import Run, cached_artifact
from flowgen.utils import rendering
from flowgen.utils.console import Progress, progress_bar
from flowgen.utils.errors import UserError, check_folder_of
from flowgen.utils.metrics import BITS_PER_DIM, Metric

BATCH = 50


@dataclass(frozen=True)
class Scorer:
    """A model, its configuration and data, where its pictures go, and the outliers among its images."""

    model: GenerativeModel
    config: dict[str, Any]
    data: ImageDataset
    folder: Path
    outliers: OODDetector

    @property
    def figure(self) -> str:
        """The name of the column that says how likely images are: bits/dim, or nats."""
        return likelihood_of(self.model).name

    def figures(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The likelihood in the model's unit, its percentile, and every score with its p-value: (batch,) each."""
        found = ood_statistics_of(self.model, images, generator)
        scores = self.outliers.scores(found)
        named = {
            self.figure: to_metric_unit(self.model, found["log_prob"]),
            "percentile": self.outliers.percentile(found["log_prob"]),
        }
        for name, p in self.outliers.p_values(scores).items():
            named |= {name: scores[name], f"{name}_p": p}
        return named


def likelihood_of(model: GenerativeModel) -> Metric:
    """What `in_unit` is."""
    return model.metric if model.metric == BITS_PER_DIM else model.score_metric


def to_metric_unit(model: GenerativeModel, log_prob: Tensor) -> Tensor:
    """A log-probability in nats as bits/dim, where the model is compared by these."""
    return (
        log_prob / (-math.log(2) * math.prod(model.image_shape))
        if model.metric == BITS_PER_DIM
        else log_prob
    )


def load_scorer(name: str | None, count: int, seed: int, device: str) -> Scorer:
    """The run's model, with `count` of its validation images judged beforehand. Raises FlowgenError."""
    return make_scorer(*find_model(name, device, GenerativeModel), count, seed)


def make_scorer(
    run: Run,
    checkpoint: dict[str, Any],
    model: GenerativeModel,
    count: int,
    seed: int,
    progress: Progress = progress_bar,
) -> Scorer:
    """The same of what `find_model` gives; `progress` is handed the validation images, a batch at a time."""
    config = checkpoint["config"]
    data = build_data(config)
    data.to(model.device)

    def judged() -> dict[str, Tensor]:
        held_out = min(count, len(data.validation))
        return ood_statistics_of_all(
            model, data.batches("validation", BATCH, held_out), held_out, seed, progress
        )

    settings = (
        sorted(config["data"].items(), key=str),
        checkpoint["metrics"].get("log_z"),
        count,
        seed,
    )
    return Scorer(
        model,
        config,
        data,
        run.folder,
        OODDetector(cached_artifact(run, checkpoint, "validation", settings, judged)),
    )


def ood_statistics_of_all(
    model: GenerativeModel,
    batches: Iterable[Tensor],
    count: int,
    seed: int,
    progress: Progress = progress_bar,
) -> dict[str, Tensor]:
    """See `statistics_of`, of `count` images in batches: (count,) each."""
    generator = torch.Generator(model.device).manual_seed(seed)
    found = [
        ood_statistics_of(model, images, generator)
        for images in progress(batches, "held-out images", -(-count // BATCH))
    ]
    return {name: torch.cat([each[name] for each in found]) for name in found[0]}


@torch.no_grad()
def ood_statistics_of(
    model: GenerativeModel, images: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """What the model says of images and how complex they are, (batch,) each, on the CPU; in float32, as `flowgen evaluate`."""
    found = model.statistics(images.to(model.device), generator)
    return {name: values.cpu() for name, values in found.items()} | {
        "complexity": png_complexity(images.cpu())
    }


RATES = (0.01, 0.05, 0.1)  # of false alarms
log = logging.getLogger("flowgen")


class OODResult(NamedTuple):
    """From the test images of a run to others: AUROC by score, and the false alarms by score at each of `RATES`.

    The error of the latter is that of `images`, the harmonic sum of the test images and of those that calibrate.
    """

    title: str
    found: dict[str, AUROC]
    alarms: dict[str, list[float]]
    images: float


def compare(judge: Scorer, words: list[str], count: int, seed: int, device: str) -> Iterator[str]:
    """AUROC of every score, `count` test images of the run against as many of other data, and back; and the p-values' false alarms.

    `words` are a data set as for training, or the run of a model of it. Without a run the way back is that of the newest model of those
    images. Raises FlowgenError for a data set or a run that there is not.
    """
    if any(word.startswith("data=") for word in words):
        section = data_section(words)
        name = _model_of(section, judge.model.metric)
    else:
        if len(words) > 1:
            raise UserError(
                "--against names several runs: name one, or compare one after the other"
            )
        name = words[0]
        section = find_checkpoint(name)[1]["config"]["data"]
    ways = [(judge, section, images_for(judge, section))]
    if name is None:
        log.warning(
            "the way back needs a model of %s: train one, or name its run by --against RUN",
            _title(section),
        )
    else:
        back = load_scorer(name, count, seed, device)
        ways.append((back, judge.config["data"], images_for(back, judge.config["data"])))
    yield from _ood_table([compare_ood(*way, count, seed) for way in ways])


def images_for(judge: Scorer, section: dict[str, Any]) -> ImageDataset:
    """The images of another data section, made into those that the run's model takes. Raises FlowgenError where these do not fit."""
    other = build_data(
        {
            "data": match_model(
                section, judge.config["data"], judge.model.image_shape, judge.model.bits
            )
        }
    )
    if (other.image_shape, other.bits) != (judge.model.image_shape, judge.model.bits):
        raise UserError(
            f"images of {other.image_shape} do not fit a model of {judge.model.image_shape}: compare data of the same shape"
        )
    return other


def compare_ood(
    judge: Scorer, section: dict[str, Any], other: ImageDataset, count: int, seed: int
) -> OODResult:
    """From the run's test images to the `other` ones of a data section, at most `count` of each."""
    other.to(judge.model.device)
    sides = []
    for data in (judge.data, other):
        batches = data.batches("test", BATCH, count)
        sides.append(
            judge.outliers.scores(
                ood_statistics_of_all(judge.model, batches, min(count, len(data.test)), seed)
            )
        )
    own, others = sides
    p_values = judge.outliers.p_values(own)
    alarms = {
        name: [(p <= rate).double().mean().item() for rate in RATES] for name, p in p_values.items()
    }
    title = f"{_title(judge.config['data'])} -> {_title(section)}"
    independent = 1 / (1 / len(own["likelihood"]) + 1 / len(judge.outliers.calibration["log_prob"]))
    return OODResult(
        title, {name: auroc(own[name], others[name]) for name in own}, alarms, independent
    )


def _ood_table(ways: list[OODResult]) -> Iterator[str]:
    width = max(len(way.title) for way in ways)
    yield f"{'AUROC':18} " + "  ".join(f"{way.title:>{width}}" for way in ways)
    for name in dict.fromkeys(name for way in ways for name in way.found):
        yield f"{name:18} " + "  ".join(f"{way.found.get(name, '')!s:>{width}}" for way in ways)
    for way in ways:
        yield f"\n{'false alarms, %':18} " + "  ".join(
            f"at {100 * rate:2.0f} ± {100 * math.sqrt(rate * (1 - rate) / way.images):.1f}"
            for rate in RATES
        )
        for name, rates in way.alarms.items():
            yield f"{name:18} " + "  ".join(f"{100 * rate:11.1f}" for rate in rates)


def _model_of(section: dict[str, Any], metric: Metric) -> str | None:
    """The newest run, else the model of the zoo, that was trained on these images and is compared by this metric."""
    configs = [
        (str(run.folder), read_config(run.config)) for run in readable_runs() if run.checkpoints()
    ]
    configs += [(name, read_portable_metadata(zoo_file(name))["config"]) for name in zoo()]
    of_it = [(name, config) for name, config in configs if same_dataset(config["data"], section)]
    return next(
        (
            name
            for name, config in of_it
            if getattr(resolve_target("model", config["model"]), "metric", None) == metric
        ),
        None,
    )


def _title(section: dict[str, Any]) -> str:
    return str(
        section.get("name")
        or (section.get("search_dirs") or [section.get("root") or "mnist_sample"])[0]
    )


SHOWN, PICTURED, COLUMNS = 20, 8, 4


class ImageScore(NamedTuple):
    """An image, its figures by name, and how far its likelihood lies from the usual one."""

    name: str
    images: Tensor
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
    judge = load_scorer(name, count, seed, device)
    if by is not None and by not in judge.outliers.names:
        raise UserError(
            f"--by {by} needs a flow, which this model is none: choose one of {', '.join(judge.outliers.names)}"
        )
    if paths:
        yield from _images(judge, paths, by or DEFAULT_SCORE, table, seed, out)
    if against:
        yield from compare(judge, against, count, seed, device)


def _images(
    judge: Scorer, paths: list[Path], by: str, table: Path | None, seed: int, out: Path | None
) -> Iterator[str]:
    channels, size, _ = judge.model.image_shape
    check_color_channels(channels)
    how = {key: judge.config["data"].get(key) for key in ("crop", "binarization")}
    stream = ImageStream(
        paths, size=size, channels=channels, bits=judge.model.bits, seed=seed, **how
    )
    strangest: list[ImageScore] = []
    typical: list[ImageScore] = []
    seen = 0
    with _table(table) as write:
        for scored in _scored(judge, stream, seed):
            write(scored)
            seen += len(scored)
            strangest = sorted(strangest + scored, key=lambda image: -image.figures[by])[:SHOWN]
            typical = sorted(typical + scored, key=lambda image: image.figures["typicality"])[
                :PICTURED
            ]
    if not seen:
        raise UserError("none of the images could be read: name others")
    unit = judge.figure
    yield f"{unit.replace('_', ' '):>14} {'percentile':>11} {'p-value':>8}  image, the strangest by {by} first"
    for image in strangest:
        figures = image.figures
        yield f"{figures[unit]:14.3f} {figures['percentile']:11.1f} {figures[f'{by}_p']:8.4f}  {image.name}"
    if seen > SHOWN:
        yield f"... and {seen - SHOWN} more" + ("" if table else ": --csv FILE writes them all")
    target = out or judge.folder / "score.png"
    titled = [(f"the strangest by {by}", strangest[:PICTURED]), ("the most typical", typical)]
    rendering.stack_titled([(title, _tiles(judge, images, by)) for title, images in titled]).save(
        target
    )
    yield from [str(path) for path in (target, table) if path]


def _scored(judge: Scorer, stream: ImageStream, seed: int) -> Iterator[list[ImageScore]]:
    generator = torch.Generator(judge.model.device).manual_seed(seed)
    for names, images in progress_bar(stream.batches(BATCH), "images", -(-len(stream) // BATCH)):
        figures = judge.figures(images, generator)
        rows = [
            {key: values[place].item() for key, values in figures.items()}
            for place in range(len(names))
        ]
        yield [ImageScore(*each) for each in zip(names, images, rows, strict=True)]


def _tiles(judge: Scorer, images: list[ImageScore], by: str) -> Any:
    titles = [
        f"{Path(image.name).name[-16:]}\n{image.figures[judge.figure]:.3f}, p {image.figures[f'{by}_p']:.3f}"
        for image in images
    ]
    return rendering.titled_tiles(
        torch.stack([image.images for image in images]), judge.model.bits, titles, COLUMNS
    )


@contextmanager
def _table(path: Path | None) -> Iterator[Callable[[list[ImageScore]], None]]:
    """What writes a line for each image into a CSV file, as the scores come; nothing where no file is wanted."""
    if path is None:
        yield lambda scored: None
        return
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)

        def write(scored: list[ImageScore]) -> None:
            if file.tell() == 0:
                writer.writerow(["image", *scored[0].figures])
            writer.writerows(
                [image.name, *(f"{value:.6g}" for value in image.figures.values())]
                for image in scored
            )

        yield write
