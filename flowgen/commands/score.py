"""Likelihood and out-of-distribution scores of images: `flowgen score`."""

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import nlargest, nsmallest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from flowgen.commands.runs import data_name, readable_runs, run_likelihood
from flowgen.config import compose, instantiate, runs
from flowgen.data.dataset import ImageDataset
from flowgen.data.preprocess import ImageStream, check_color_channels
from flowgen.evaluation.ood import AUROC, DEFAULT_SCORE, OODDetector, auroc, png_complexity
from flowgen.models.base import GenerativeModel
from flowgen.models.likelihood import LikelihoodModel
from flowgen.training.checkpoint import read_safetensors, zoo, zoo_file
from flowgen.training.run_dir import Run, cached_artifact
from flowgen.utils import console, rendering
from flowgen.utils.errors import UserError, check, check_folder_of, check_not_input
from flowgen.utils.files import atomic_write
from flowgen.utils.metrics import BITS_PER_DIM, Metric

BATCH_SIZE = 50
MAX_ROWS = 20  # images in the printed table
MAX_TILES = 8  # images in each half of the picture
SIGNIFICANCE_LEVELS = (0.01, 0.05, 0.1)  # nominal false positive rates


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
    """Comparison of the test images of a run (in-distribution) with other images.

    An inlier is a false positive at a significance level if its p-value is at most that level.
    """

    title: str
    aurocs: dict[str, AUROC]  # by score
    false_positive_rates: dict[str, list[float]]  # by score, one per significance level
    errors: list[float]  # standard errors of these rates, one per significance level


def score(
    *,
    paths: Sequence[Path],
    run: str | None,
    ood: Sequence[str],
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
        run: Name of the run, or None for the newest one.
        ood: What to compare with: the name of one run, or data=NAME and its settings
            data.KEY=VALUE; empty for no comparison.
        score: Name of the score that ranks the images, or None for the default.
        count: Maximum number of validation images for the calibration, and of test images for
            the comparison.
        table: CSV file for all metrics of all images, or None.
        seed: Seed of the dequantization noise.
        device: Name of the device, or "auto".
        out: Picture file, or None for score.png in the folder of the run.
    """
    check_not_input(out, *paths)
    if table is not None:
        check_folder_of(table)
        check_not_input(table, *paths)
        check(not table.is_dir(), f"{table} is a folder: choose another file for --csv")
        check(table != out, f"{table} is the path of the picture too: choose another --csv")
    scorer = load_scorer(run, count, seed, device)
    if score is not None and score not in scorer.detector.calibration_scores:
        raise UserError(
            f"--score {score} needs a flow: for this model, choose one of "
            f"{', '.join(scorer.detector.calibration_scores)}"
        )
    if paths:
        yield from _score_images(scorer, paths, score or DEFAULT_SCORE, table, seed, out)
    if ood:
        yield from ood_comparison(scorer, ood, count, seed, device)


def load_scorer(run: str | None, count: int, seed: int, device: str) -> Scorer:
    """Load the model of a run and calibrate its scores on `count` validation images.

    Args:
        run: The run, or None for the newest one.
        count: Number of validation images.
        seed: Seed of the dequantization noise.
        device: "cpu", "cuda" or "auto".
    """
    return make_scorer(*runs.find_model(run, device, GenerativeModel), count, seed)


def make_scorer(
    run: Run,
    checkpoint: dict[str, Any],
    model: GenerativeModel,
    count: int,
    seed: int,
    progress: console.Progress = console.progress_bar,
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
    model.check_likelihood()
    config = checkpoint["config"]
    data = instantiate.build_data(config).to(model.device)
    settings = (
        sorted(config["data"].items(), key=str),
        checkpoint["metrics"].get("log_z"),
        count,
        seed,
    )
    compute = partial(split_statistics, model, data, "validation", count, seed, progress)
    statistics = cached_artifact(run, checkpoint, "validation", settings, compute)
    return Scorer(model, config, data, run.folder, OODDetector(statistics))


def split_statistics(
    model: GenerativeModel,
    data: ImageDataset,
    split: str,
    count: int,
    seed: int,
    progress: console.Progress = console.progress_bar,
) -> dict[str, Tensor]:
    """Return the `image_statistics` of a split, each of shape (images,).

    Args:
        model: The model.
        data: Data set of the images.
        split: "train", "validation" or "test".
        count: Maximum number of images, chosen by hash.
        seed: Seed of the dequantization noise.
        progress: Progress bar for the batches.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    num_batches = -(-min(count, len(data.splits[split])) // BATCH_SIZE)
    batches = progress(data.batches(split, BATCH_SIZE, count), "images", num_batches)
    statistics = [image_statistics(model, images, generator) for images in batches]
    return {name: torch.cat([batch[name] for batch in statistics]) for name in statistics[0]}


@torch.no_grad()
def image_statistics(
    model: GenerativeModel, images: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the statistics that the detector needs, each of shape (batch,), on the CPU.

    These are the statistics of the model, in float32 as in `flowgen evaluate`, and the complexity
    of the images.

    Args:
        model: The model.
        images: Pixel values (batch, channels, height, width).
        generator: Random number generator of the noise.
    """
    statistics = model.statistics(images.to(model.device), generator)
    on_cpu = {name: values.cpu() for name, values in statistics.items()}
    return on_cpu | {"complexity": png_complexity(images.cpu())}


def likelihood_metric(model: GenerativeModel) -> Metric:
    """Return the metric of the values of `to_metric_unit`."""
    return model.metric if model.metric == BITS_PER_DIM else model.score_metric


def to_metric_unit(model: GenerativeModel, log_prob: Tensor) -> Tensor:
    """Convert log-probabilities in nats to bits/dim if the model reports bits/dim."""
    if isinstance(model, LikelihoodModel) and model.metric == BITS_PER_DIM:
        return model.bits_per_dim(log_prob)
    return log_prob


def likelihood_columns(model: GenerativeModel, log_prob: Tensor) -> dict[Metric, Tensor]:
    """Return the values of `to_metric_unit`, and of binary images the log-probabilities too.

    These are on one scale for all models of binary images.
    """
    columns = {likelihood_metric(model): to_metric_unit(model, log_prob)}
    return columns | ({model.score_metric: log_prob} if model.bits == 1 else {})


def _score_images(
    scorer: Scorer,
    paths: Sequence[Path],
    score_name: str,
    table: Path | None,
    seed: int,
    out: Path | None,
) -> Iterator[str]:
    most_anomalous: list[ImageScore] = []
    most_typical: list[ImageScore] = []
    count = 0
    batches = _nonempty(_score_batches(scorer, paths, seed))
    for batch in _write_csv(table, batches) if table else batches:
        count += len(batch)
        most_anomalous = nlargest(
            MAX_ROWS, most_anomalous + batch, key=lambda item: item.metrics[score_name]
        )
        most_typical = nsmallest(
            MAX_TILES, most_typical + batch, key=lambda item: item.metrics["typicality"]
        )
    yield from _format_table(scorer.model, score_name, most_anomalous)
    if count > MAX_ROWS:
        yield f"... and {count - MAX_ROWS} more{'' if table else ': --csv FILE writes them all'}"
    num_calibration = len(scorer.detector.calibration_scores[score_name])
    yield (
        f"smallest possible p-value: {1 / (num_calibration + 1):.4f}, because {num_calibration} "
        "validation images calibrate it"
    )
    picture = out or scorer.folder / "score.png"
    blocks = [
        (f"most anomalous by {score_name}", _tiles(scorer, most_anomalous[:MAX_TILES], score_name)),
        ("most typical", _tiles(scorer, most_typical, "typicality")),
    ]
    rendering.save_picture(rendering.stack_titled(blocks), picture)
    yield from map(str, filter(None, (picture, table)))


def _nonempty(batches: Iterable[list[ImageScore]]) -> Iterator[list[ImageScore]]:
    """Yield the batches; without any, raise a UserError before a file is replaced."""
    is_empty = True
    for batch in batches:
        is_empty = False
        yield batch
    if is_empty:
        raise UserError("no image could be read: choose other images")


def _write_csv(path: Path, batches: Iterable[list[ImageScore]]) -> Iterator[list[ImageScore]]:
    """Yield the batches and write them to a CSV file."""
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file)
        for index, batch in enumerate(batches):
            if index == 0:
                writer.writerow(["image", *batch[0].metrics])
            writer.writerows(
                [name, *(f"{value:.6g}" for value in metrics.values())]
                for name, _, metrics in batch
            )
            yield batch


def _score_batches(scorer: Scorer, paths: Sequence[Path], seed: int) -> Iterator[list[ImageScore]]:
    """Yield images with their metrics.

    The metrics are the likelihood, its percentile (the percentage of validation images that are
    more likely), and every score NAME with its p-value NAME_p.
    """
    channels, *size = scorer.model.image_shape
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
    batches = console.progress_bar(
        stream.batches(BATCH_SIZE), "images", -(-len(stream) // BATCH_SIZE)
    )
    for names, images in batches:
        statistics = image_statistics(scorer.model, images, generator)
        scores = scorer.detector.scores(statistics)
        columns = likelihood_columns(scorer.model, statistics["log_prob"])
        metrics = {
            **{metric.name: values for metric, values in columns.items()},
            "percentile": scorer.detector.percentile(scores),
        }
        for name, p_values in scorer.detector.p_values(scores).items():
            metrics |= {name: scores[name], f"{name}_p": p_values}
        rows = zip(*(values.tolist() for values in metrics.values()), strict=True)
        yield [
            ImageScore(name, image, dict(zip(metrics, row, strict=True)))
            for name, image, row in zip(names, images, rows, strict=True)
        ]


def _format_table(model: GenerativeModel, score_name: str, items: list[ImageScore]) -> list[str]:
    columns = likelihood_columns(model, torch.zeros(0))
    widths = [max(14, len(metric.name)) for metric in columns]
    titles = [metric.name.replace("_", " ") for metric in columns]

    def row(likelihoods: Iterable[str], percentile: str, p_value: str, name: str) -> str:
        cells = [f"{text:>{width}}" for text, width in zip(likelihoods, widths, strict=True)]
        return f"{' '.join(cells)} {percentile:>11} {p_value:>8}  {name}"

    return [
        row(titles, "percentile", "p-value", f"image, most anomalous by {score_name} first")
    ] + [
        row(
            [
                f"{metric.bound_sign(model.likelihood)}{metrics[metric.name]:.3f}"
                for metric in columns
            ],
            f"{metrics['percentile']:.1f}",
            f"{metrics[f'{score_name}_p']:.4f}",
            name,
        )
        for name, _, metrics in items
    ]


def _tiles(scorer: Scorer, items: list[ImageScore], score_name: str) -> Image.Image:
    metric = likelihood_metric(scorer.model)
    sign = metric.bound_sign(scorer.model.likelihood)
    titles = [
        f"{Path(name).name[-16:]}\n"
        f"{sign}{metrics[metric.name]:.3f}, p {metrics[f'{score_name}_p']:.3f}"
        for name, _, metrics in items
    ]
    images = torch.stack([item.image for item in items])
    return rendering.titled_tiles(images, scorer.model.bits, titles, columns=4)


def ood_comparison(
    scorer: Scorer, ood: Sequence[str], count: int, seed: int, device: str
) -> list[str]:
    """Return a table of AUROCs and false positive rates between the run's data and other data.

    The comparison is made with the model of the run and, if there is one, in the other direction
    with a model of the other data.

    Args:
        scorer: The scorer of the run.
        ood: Name of one run; or data=NAME and its settings, such as data.root=FOLDER, for which
            the newest run on these data makes the comparison in the other direction.
        count: Maximum number of test images of each data set.
        seed: Seed of the dequantization noise.
        device: Name of the device, or "auto".
    """
    names_data = any(text.startswith("data=") for text in ood)
    if len(ood) > 1 and not names_data:
        raise UserError("--ood accepts one run, or data=NAME with its settings data.KEY=VALUE")
    section = (
        compose.data_section(ood)
        if names_data
        else runs.find_checkpoint(ood[0])[1]["config"]["data"]
    )
    other_run = _find_run_on(section, scorer.model.metric) if names_data else ood[0]
    directions = [(scorer, section, images_for(scorer, section))]
    if other_run is None:
        console.log.warning(
            "the reverse comparison needs a model trained on %s: "
            "train one, or pass its run with --ood RUN",
            data_name(section),
        )
    else:
        other_scorer = load_scorer(other_run, count, seed, device)
        own_section = scorer.config["data"]
        directions.append((other_scorer, own_section, images_for(other_scorer, own_section)))
    return _format_ood_table([compare_ood(*items, count, seed) for items in directions])


def _find_run_on(section: dict[str, Any], metric: Metric) -> str | None:
    """Return the newest run with a likelihood, or the zoo model, on these data with this metric."""
    configs = [
        (str(run.folder), compose.read_config(run.config))
        for run in readable_runs()
        if run.checkpoints()
    ]
    configs += [
        (name, read_safetensors(zoo_file(name), with_weights=False)["config"]) for name in zoo()
    ]
    matches = (
        name
        for name, config in configs
        if instantiate.same_dataset(config["data"], section)
        and run_likelihood(config["model"], []) != "none"
        and getattr(instantiate.resolve_target("model", config["model"]), "metric", None) == metric
    )
    return next(matches, None)


def images_for(scorer: Scorer, section: dict[str, Any]) -> ImageDataset:
    """Build another data set with images of the shape and bits that the scorer's model takes."""
    model = scorer.model
    matched = instantiate.match_data_to_model(
        section, scorer.config["data"], model.image_shape, model.bits
    )
    data = instantiate.build_data({"data": matched})
    if (data.image_shape, data.bits) != (model.image_shape, model.bits):
        raise UserError(
            f"images of shape {data.image_shape} do not fit a model of {model.image_shape}: "
            "compare data of the same shape"
        )
    return data


def compare_ood(
    scorer: Scorer, section: dict[str, Any], other: ImageDataset, count: int, seed: int
) -> OODResult:
    """Compare the run's test images with those of another data set.

    A false positive rate has two sources of error: the test images, and the images that calibrate
    the p-values. Its standard error is sqrt(rate (1 - rate) (1/n_test + 1/n_calibration)).

    Args:
        scorer: The scorer of the run.
        section: Data section of the other data set, which gives its name.
        other: The other data set.
        count: Maximum number of test images of each data set.
        seed: Seed of the dequantization noise.
    """
    detector = scorer.detector
    inliers, outliers = (
        detector.scores(split_statistics(scorer.model, data, "test", count, seed))
        for data in (scorer.data, other.to(scorer.model.device))
    )
    counts = (len(inliers["likelihood"]), len(detector.calibration_scores["likelihood"]))
    variance_factor = sum(1 / count for count in counts)
    return OODResult(
        title=f"{data_name(scorer.config['data'])} -> {data_name(section)}",
        aurocs={name: auroc(inliers[name], outliers[name]) for name in inliers},
        false_positive_rates={
            name: [(p_values <= level).double().mean().item() for level in SIGNIFICANCE_LEVELS]
            for name, p_values in detector.p_values(inliers).items()
        },
        errors=[math.sqrt(rate * (1 - rate) * variance_factor) for rate in SIGNIFICANCE_LEVELS],
    )


def _format_ood_table(results: list[OODResult]) -> list[str]:
    width = max(18, *(len(result.title) for result in results))

    def row(name: str, *cells: object) -> str:
        return f"{name:18} " + "  ".join(f"{cell!s:>{width}}" for cell in cells)

    lines = [row("AUROC", *(result.title for result in results))]
    for name in dict.fromkeys(name for result in results for name in result.aurocs):
        lines.append(row(name, *(result.aurocs.get(name, "") for result in results)))
    for title, _, rates_by_score, errors in results:
        nominal_rates = [
            f"nominal {100 * level:.0f}% ± {100 * error:.1f}"
            for level, error in zip(SIGNIFICANCE_LEVELS, errors, strict=True)
        ]
        lines += ["", title, row("false positives, %", *nominal_rates)]
        for name, rates in rates_by_score.items():
            lines.append(row(name, *(f"{100 * rate:.1f}" for rate in rates)))
    return lines
