"""Likelihood and out-of-distribution scores of images: `flowgen score`."""

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from heapq import nlargest, nsmallest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
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
from flowgen.training.checkpoint import read_safetensors, zoo, zoo_file
from flowgen.training.run_dir import Run, cached_artifact
from flowgen.utils import rendering
from flowgen.utils.console import Progress, log, progress_bar
from flowgen.utils.errors import UserError, check_folder_of
from flowgen.utils.metrics import BITS_PER_DIM, Metric

BATCH_SIZE = 50
MAX_ROWS = 20  # images in the printed table
MAX_TILES = 8  # images in each half of the picture
SIGNIFICANCE_LEVELS = (0.01, 0.05, 0.1)  # at which false alarms are counted


@dataclass(frozen=True)
class Scorer:
    """A model with an out-of-distribution detector that is calibrated on its validation images."""

    model: GenerativeModel
    config: dict[str, Any]
    data: ImageDataset
    folder: Path  # of the run
    detector: OODDetector


class ImageScore(NamedTuple):
    """An image (channels, height, width) with its metrics."""

    name: str
    image: Tensor
    metrics: dict[str, float]


class OODResult(NamedTuple):
    """Comparison of the test images of a run (in-distribution) with other images."""

    title: str
    aurocs: dict[str, AUROC]  # by score
    false_alarms: dict[str, list[float]]  # rates by score, one per significance level
    effective_count: float  # of images: sets the error of the rates, see `compare_ood`


def score(
    *,
    paths: list[Path],
    run: str | None,
    ood: list[str],
    score: str | None,
    count: int,
    table: Path | None,
    seed: int,
    device: str,
    out: Path | None,
) -> Iterator[str]:
    """Score images, or compare the scores of two data sets, and yield the lines of the report.

    The most anomalous and the most typical images are saved in a picture.

    Args:
        paths: Image files, folders and zip archives.
        run: Name of the run, or None for the most recent one.
        ood: Overrides that describe another data set, or the name of a run on it; empty for no
            comparison.
        score: Score that sorts the images, or None for the default.
        count: Number of validation images for the calibration, and of test images for the
            comparison.
        table: CSV file for all metrics of all images, or None.
        seed: Seed of the dequantization noise.
        device: Name of the device, or "auto".
        out: Picture file, or None for score.png in the folder of the run.
    """
    if table is not None:
        check_folder_of(table)
    scorer = load_scorer(run, count, seed, device)
    if score is not None and score not in scorer.detector.names:
        raise UserError(
            f"--score {score} needs a flow: for this model, choose one of "
            f"{', '.join(scorer.detector.names)}"
        )
    if paths:
        yield from _score_images(scorer, paths, score or DEFAULT_SCORE, table, seed, out)
    if ood:
        yield from ood_comparison(scorer, ood, count, seed, device)


def load_scorer(run: str | None, count: int, seed: int, device: str) -> Scorer:
    """Load the model of a run and calibrate its scores on `count` validation images."""
    return make_scorer(*find_model(run, device, GenerativeModel), count, seed)


def make_scorer(
    run: Run,
    checkpoint: dict[str, Any],
    model: GenerativeModel,
    count: int,
    seed: int,
    progress: Progress = progress_bar,
) -> Scorer:
    """Calibrate the scores of a model on `count` validation images, or use the cached statistics.

    Args:
        run: The run of the model.
        checkpoint: Its checkpoint.
        model: The model of the checkpoint.
        count: Maximum number of validation images.
        seed: Seed of the dequantization noise.
        progress: Progress bar for the batches of validation images.
    """
    config = checkpoint["config"]
    data = build_data(config).to(model.device)
    compute = partial(split_statistics, model, data, "validation", count, seed, progress)
    log_z = checkpoint["metrics"].get("log_z")
    settings = (sorted(config["data"].items(), key=str), log_z, count, seed)
    statistics = cached_artifact(run, checkpoint, "validation", settings, compute)
    return Scorer(model, config, data, run.folder, OODDetector(statistics))


def split_statistics(
    model: GenerativeModel,
    data: ImageDataset,
    split: str,
    count: int,
    seed: int,
    progress: Progress = progress_bar,
) -> dict[str, Tensor]:
    """Return the `ood_statistics_of` at most `count` images of a split, (images,) each."""
    generator = torch.Generator(model.device).manual_seed(seed)
    num_batches = -(-min(count, len(getattr(data, split))) // BATCH_SIZE)
    batches = progress(data.batches(split, BATCH_SIZE, count), "held-out images", num_batches)
    statistics = [ood_statistics_of(model, images, generator) for images in batches]
    return {name: torch.cat([batch[name] for batch in statistics]) for name in statistics[0]}


@torch.no_grad()
def ood_statistics_of(
    model: GenerativeModel, images: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the statistics that the detector needs, (batch,) each, on the CPU.

    These are the statistics of the model, in float32 as in `flowgen evaluate`, and the complexity
    of the images.
    """
    statistics = model.statistics(images.to(model.device), generator)
    on_cpu = {name: values.cpu() for name, values in statistics.items()}
    return on_cpu | {"complexity": png_complexity(images.cpu())}


def likelihood_metric(model: GenerativeModel) -> Metric:
    """Return the metric of the values of `to_metric_unit`."""
    return model.metric if model.metric == BITS_PER_DIM else model.score_metric


def to_metric_unit(model: GenerativeModel, log_prob: Tensor) -> Tensor:
    """Convert log-probabilities in nats to bits/dim if the model reports bits/dim."""
    is_bits = model.metric == BITS_PER_DIM
    return log_prob / (-math.log(2) * math.prod(model.image_shape)) if is_bits else log_prob


def _score_images(
    scorer: Scorer, paths: list[Path], score: str, table: Path | None, seed: int, out: Path | None
) -> Iterator[str]:
    most_anomalous: list[ImageScore] = []
    most_typical: list[ImageScore] = []
    count = 0
    batches = _score_batches(scorer, paths, seed)
    for batch in _write_csv(table, batches) if table else batches:
        count += len(batch)
        most_anomalous = nlargest(
            MAX_ROWS, most_anomalous + batch, key=lambda item: item.metrics[score]
        )
        most_typical = nsmallest(
            MAX_TILES, most_typical + batch, key=lambda item: item.metrics["typicality"]
        )
    if not count:
        raise UserError("no image could be read: choose other images")
    yield from _format_table(likelihood_metric(scorer.model).name, score, most_anomalous)
    if count > MAX_ROWS:
        yield f"... and {count - MAX_ROWS} more{'' if table else ': --csv FILE writes them all'}"
    picture = out or scorer.folder / "score.png"
    blocks = [
        (f"most anomalous by {score}", _tiles(scorer, most_anomalous[:MAX_TILES], score)),
        ("most typical", _tiles(scorer, most_typical, score)),
    ]
    rendering.stack_titled(blocks).save(picture)
    yield str(picture)
    if table:
        yield str(table)


def _write_csv(path: Path, batches: Iterable[list[ImageScore]]) -> Iterator[list[ImageScore]]:
    """Yield the batches and write them to a CSV file."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        for index, batch in enumerate(batches):
            if index == 0:
                writer.writerow(["image", *batch[0].metrics])
            for item in batch:
                writer.writerow([item.name, *(f"{value:.6g}" for value in item.metrics.values())])
            yield batch


def _score_batches(scorer: Scorer, paths: list[Path], seed: int) -> Iterator[list[ImageScore]]:
    """Yield images with their metrics.

    The metrics are the likelihood, its percentile among the validation images, and every score
    NAME with its p-value NAME_p.
    """
    channels, size, _ = scorer.model.image_shape
    check_color_channels(channels)
    stream = ImageStream(
        paths,
        size=size,
        channels=channels,
        bits=scorer.model.bits,
        seed=seed,
        crop=scorer.config["data"].get("crop"),
        binarization=scorer.config["data"].get("binarization"),
    )
    generator = torch.Generator(scorer.model.device).manual_seed(seed)
    batches = progress_bar(stream.batches(BATCH_SIZE), "images", -(-len(stream) // BATCH_SIZE))
    for names, images in batches:
        statistics = ood_statistics_of(scorer.model, images, generator)
        metrics = {
            likelihood_metric(scorer.model).name: to_metric_unit(
                scorer.model, statistics["log_prob"]
            ),
            "percentile": scorer.detector.percentile(statistics["log_prob"]),
        }
        scores = scorer.detector.scores(statistics)
        for name, p_values in scorer.detector.p_values(scores).items():
            metrics |= {name: scores[name], f"{name}_p": p_values}
        rows = zip(*(values.tolist() for values in metrics.values()), strict=True)
        yield [
            ImageScore(name, image, dict(zip(metrics, row, strict=True)))
            for name, image, row in zip(names, images, rows, strict=True)
        ]


def _format_table(metric_name: str, score: str, items: list[ImageScore]) -> Iterator[str]:
    heading = metric_name.replace("_", " ")
    yield f"{heading:>14} {'percentile':>11} {'p-value':>8}  image, most anomalous by {score} first"
    for name, _, metrics in items:
        percentile = metrics["percentile"]
        p_value = metrics[f"{score}_p"]
        yield f"{metrics[metric_name]:14.3f} {percentile:11.1f} {p_value:8.4f}  {name}"


def _tiles(scorer: Scorer, items: list[ImageScore], score: str) -> Image.Image:
    titles = [
        f"{Path(name).name[-16:]}\n"
        f"{metrics[likelihood_metric(scorer.model).name]:.3f}, p {metrics[f'{score}_p']:.3f}"
        for name, _, metrics in items
    ]
    images = torch.stack([item.image for item in items])
    return rendering.titled_tiles(images, scorer.model.bits, titles, columns=4)


def ood_comparison(
    scorer: Scorer, ood: list[str], count: int, seed: int, device: str
) -> Iterator[str]:
    """Yield a table of AUROCs and false alarm rates between the run's data and other data.

    The comparison is made with the model of the run and, if there is one, in the other direction
    with a model of the other data.

    Args:
        scorer: The scorer of the run.
        ood: Overrides such as data=NAME and data.root=FOLDER, which select the most recent run on
            these data for the other direction, or the name of a run.
        count: Maximum number of test images of each data set.
        seed: Seed of the dequantization noise.
        device: Name of the device, or "auto".
    """
    if any(override.startswith("data=") for override in ood):
        section = data_section(ood)
        other_run = _find_run_on(section, scorer.model.metric)
    else:
        if len(ood) > 1:
            raise UserError("--ood names several runs: compare with one run at a time")
        other_run = ood[0]
        section = find_checkpoint(other_run)[1]["config"]["data"]
    directions = [(scorer, section, images_for(scorer, section))]
    if other_run is None:
        log.warning(
            "the reverse comparison needs a model trained on %s: "
            "train one, or pass its run with --ood RUN",
            _dataset_title(section),
        )
    else:
        other_scorer = load_scorer(other_run, count, seed, device)
        own_data = images_for(other_scorer, scorer.config["data"])
        directions.append((other_scorer, scorer.config["data"], own_data))
    yield from _format_ood_table([compare_ood(*each, count, seed) for each in directions])


def _find_run_on(section: dict[str, Any], metric: Metric) -> str | None:
    """Return the most recent run, or else the zoo model, on these data with this metric."""
    configs = [
        (str(run.folder), read_config(run.config)) for run in readable_runs() if run.checkpoints()
    ]
    configs += [
        (name, read_safetensors(zoo_file(name), with_weights=False)["config"]) for name in zoo()
    ]
    matches = (
        name
        for name, config in configs
        if same_dataset(config["data"], section)
        and getattr(resolve_target("model", config["model"]), "metric", None) == metric
    )
    return next(matches, None)


def images_for(scorer: Scorer, section: dict[str, Any]) -> ImageDataset:
    """Build another data set with images of the shape and bits that the scorer's model takes."""
    model = scorer.model
    matched = match_model(section, scorer.config["data"], model.image_shape, model.bits)
    data = build_data({"data": matched})
    if (data.image_shape, data.bits) != (model.image_shape, model.bits):
        raise UserError(
            f"images of shape {data.image_shape} do not fit a model of {model.image_shape}: "
            "compare data of the same shape"
        )
    return data


def compare_ood(
    scorer: Scorer, section: dict[str, Any], other: ImageDataset, count: int, seed: int
) -> OODResult:
    """Compare the run's test images with those of another data set, at most `count` of each.

    A false alarm rate has two sources of error: the test images and the images that calibrate the
    p-values. Its standard error is sqrt(rate (1 - rate) / n) with 1/n = 1/n_test + 1/n_calibration.
    """
    detector = scorer.detector
    inliers, outliers = (
        detector.scores(split_statistics(scorer.model, data, "test", count, seed))
        for data in (scorer.data, other.to(scorer.model.device))
    )
    false_alarms = {
        name: [(p_values <= level).double().mean().item() for level in SIGNIFICANCE_LEVELS]
        for name, p_values in detector.p_values(inliers).items()
    }
    counts = (len(inliers["likelihood"]), len(detector.calibration["log_prob"]))
    return OODResult(
        title=f"{_dataset_title(scorer.config['data'])} -> {_dataset_title(section)}",
        aurocs={name: auroc(inliers[name], outliers[name]) for name in inliers},
        false_alarms=false_alarms,
        effective_count=1 / sum(1 / count for count in counts),
    )


def _format_ood_table(results: list[OODResult]) -> Iterator[str]:
    width = max(len(result.title) for result in results)
    yield f"{'AUROC':18} " + "  ".join(f"{result.title:>{width}}" for result in results)
    for name in dict.fromkeys(name for result in results for name in result.aurocs):
        cells = [str(result.aurocs.get(name, "")) for result in results]
        yield f"{name:18} " + "  ".join(f"{cell:>{width}}" for cell in cells)
    for result in results:
        errors = [math.sqrt(a * (1 - a) / result.effective_count) for a in SIGNIFICANCE_LEVELS]
        levels = [
            f"at {100 * level:2.0f} ± {100 * error:.1f}"
            for level, error in zip(SIGNIFICANCE_LEVELS, errors, strict=True)
        ]
        yield f"\n{'false alarms, %':18} {'  '.join(levels)}"
        for name, rates in result.false_alarms.items():
            yield f"{name:18} " + "  ".join(f"{100 * rate:11.1f}" for rate in rates)


def _dataset_title(section: dict[str, Any]) -> str:
    search_dirs = section.get("search_dirs") or [section.get("root") or "mnist_sample"]
    return str(section.get("name") or search_dirs[0])
