"""Self-contained HTML page about runs: `flowgen report`."""

import io
import os
from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup

from flowgen.commands.runs import (
    data_name,
    last_validation,
    model_name,
    readable_runs,
    run_likelihood,
)
from flowgen.config.compose import flatten, read_config
from flowgen.config.runs import HUB_PREFIX, OUTPUTS, find_run
from flowgen.training.checkpoint import EXPORT_SUFFIX
from flowgen.training.run_dir import Run, result_metric, validation_rows
from flowgen.utils import plots
from flowgen.utils.console import count_noun
from flowgen.utils.errors import UserError
from flowgen.utils.html import Picture, Section, data_url, image_data_url, write_html
from flowgen.utils.metrics import BITS_PER_DIM, COMPARED, SAMPLE_METRICS, Metric, MetricValue

TITLE = "flowgen report"  # of the page
COLUMNS = (
    "run",
    "model",
    "data",
    "likelihood",
    "validation",
    "test",
    "step",
    "images/s",
    "hours",
    "memory, GiB",
)
CAPTIONS = {
    "curves.png": "Training loss, validation metric, learning rate and gradient norm "
    "(flowgen train).",
    "features.png": "Weights of the hidden units, largest first: orange is positive, blue is "
    "negative (flowgen train).",
    "interpolation.png": "Interpolation between two images, through the latents above and through "
    "the pixels below (flowgen interpolate).",
    "completion.png": "The image, its known part, mean, spread (twice the standard deviation) and "
    "samples of the inpainting (flowgen complete).",
    "chain_gibbs.gif": "Gibbs chains that start from white noise (flowgen chain --sampler gibbs).",
    "chain_tempering.gif": "Parallel tempering chains that start from white noise "
    "(flowgen chain --sampler tempering).",
    "chain_mean-field.gif": "Mean field iterations that start from white noise "
    "(flowgen chain --sampler mean-field).",
}


def report(*, names: list[str], out: Path | None) -> Path:
    """Write an HTML page about runs.

    Args:
        names: Names of runs, or of folders with runs.
        out: Output file, or None for report.html in the folder of a single run, or else in the
            current folder.

    Returns:
        The path of the file.
    """
    runs = [run for name in names for run in _find_runs(name)]
    count = count_noun(len(runs), "run")
    lead = f"{datetime.now(UTC):%Y-%m-%d}, {count}. Errors are standard errors."
    path = out or (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    if out is None and path.exists() and TITLE not in path.read_text("utf-8", errors="replace"):
        raise UserError(f"{path} is not a report of flowgen: choose another --out")
    write_html(path, TITLE, [lead], sections(runs))
    return path


def _find_runs(name: str) -> list[Run]:
    """Return the run of this name, or all runs in the folder of this name."""
    if not name.strip():
        raise UserError(
            "an empty name is not a run: pass a run, or a folder of runs such as outputs"
        )
    if name.startswith(("zoo/", HUB_PREFIX)) or name.endswith(EXPORT_SUFFIX):
        raise UserError(f"{name} is an exported model without curves: pass a run that was trained")
    paths = {(parent / name).resolve() for parent in (Path(), OUTPUTS)}
    folders = {path for path in paths if path.is_dir()}
    if not folders or any((folder / "config.yaml").exists() for folder in folders):
        return [find_run(name)]
    runs = readable_runs(*folders)
    return [run for run in runs if run.folder.resolve() not in folders] or [find_run(name)]


def sections(runs: list[Run]) -> list[Section]:
    """Return the results of all runs, the differences of their settings, and each run."""
    configs = [flatten(read_config(run.config)) for run in runs]
    metrics = [run.read_metrics() for run in runs]
    head, *rows = overview(runs)
    names = [row[0] for row in rows]
    anchors = [f"run{number}" for number in range(1, len(runs) + 1)]
    links = [
        Markup('<a href="#{}">{}</a>').format(anchor, name)
        for anchor, name in zip(anchors, names, strict=True)
    ]
    table = [head, *([link, *cells] for link, (_, *cells) in zip(links, rows, strict=True))]
    samples = [
        Picture(Markup("{}: {}").format(link, picture.caption), picture.source)
        for link, run in zip(links, runs, strict=True)
        for picture in _sample_pictures(run)
    ]
    result = [Section("results", "Results", table=table, pictures=samples)]
    curves = _validation_curves(dict(zip(names, metrics, strict=True)))
    if curves and len(runs) > 1:  # a single run has its own plot
        result.append(Section("validation", "Validation during training", pictures=curves))
    if quality := _sample_quality(names, runs):
        note = (
            "By flowgen evaluate samples=N, with the values of as many training images in "
            "parentheses (readable: of test images)."
        )
        result.append(Section("quality", "Sample quality", [note], table=quality))
    if differences := _differences(configs):
        table = [["setting", *names], *differences]
        result.append(Section("differences", "Where the configurations differ", table=table))
    for anchor, name, run, config in zip(anchors, names, runs, configs, strict=True):
        settings = "\n".join(f"{key}: {value}" for key, value in config.items())
        result.append(
            Section(
                anchor,
                name,
                [run.environment()],
                pictures=_existing({run.folder / file: text for file, text in CAPTIONS.items()}),
                details=("Configuration", settings),
            )
        )
    return result


def overview(runs: list[Run]) -> list[list[str]]:
    """Return a table with a heading and one row per run: its model, data, results and costs.

    The last validation result compares runs without their test images. The test result follows it.
    """
    table = [list(COLUMNS)]
    for name, run in zip(_short_names([run.folder for run in runs]), runs, strict=True):
        config = read_config(run.config)
        rows = run.read_metrics()
        likelihood = run_likelihood(config["model"], rows)
        table.append(
            [
                name,
                model_name(config["model"]),
                data_name(config["data"]),
                likelihood,
                _result(last_validation(rows), "validation", likelihood),
                _result(result_metric(rows), "test", likelihood),
                f"{max((row['step'] for row in rows), default=0):,}",
                *_costs(rows),
            ]
        )
    return table


def _result(value: MetricValue | None, split: str, likelihood: str) -> str:
    """Return a value without the name of its split, or "" if it is of another split."""
    if value is None or value.split != split:
        return ""
    return str(replace(value, split=None, likelihood=likelihood))


def _short_names(folders: list[Path]) -> list[str]:
    """Return the paths without the leading folders that all of them share."""
    if len(folders) == 1:
        return [str(folders[0])]
    paths = [folder.absolute() for folder in folders]
    shared = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(shared)) for path in paths]


def _costs(rows: list[dict[str, Any]]) -> tuple[str, str, str]:
    """Return median images per second, hours, and peak memory (of the GPU if there is one).

    The hours include evaluation and sampling.
    """
    train = [row for row in rows if row["split"] == "train" and row.get("images_per_second")]
    if not train:
        return "", "", ""
    return (
        f"{median(row['images_per_second'] for row in train):,.1f}",
        f"{train[-1].get('seconds', 0.0) / 3600:.2f}",
        f"{max(row.get('memory_gib') or 0.0 for row in train):.2f}",
    )


def _validation_curves(rows: dict[str, list[dict[str, Any]]]) -> list[Picture]:
    """Plot each metric at each number of bits: values at different bits are not comparable.

    Args:
        rows: Rows of metrics.jsonl, by the name of the run. Curves with one point are skipped.
    """
    curves: dict[tuple[Metric, int], dict[str, list[tuple[int, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for name, rows_of_run in rows.items():
        for row, metric in product(validation_rows(rows_of_run), COMPARED):
            if value := MetricValue.from_row(row, metric):
                curves[metric, row.get("bits", 1)][name].append((row["step"], value.value))
    pictures = []
    for metric, bits in sorted(curves, key=lambda key: (key[0].name, key[1])):
        named = {name: points for name, points in curves[metric, bits].items() if len(points) > 1}
        if not named:
            continue
        at_bits = f" at {bits} bits" if metric == BITS_PER_DIM else ""
        text = metric.name.replace("_", " ") + at_bits
        file = io.BytesIO()
        plots.lines(
            named,
            file,
            xlabel="step",
            ylabel=f"validation {text}, {metric.unit}",
            outliers=(0.05, 0.05),
        )
        url = image_data_url(file.getvalue(), "png")
        of_run = f" of {next(iter(named))}" if len(named) == 1 else ""  # the plot has no legend
        pictures.append(Picture(f"Validation {text}{of_run} against the step.", url))
    return pictures


def _sample_quality(names: list[str], runs: list[Run]) -> list[list[str]]:
    """Return a table of the runs whose samples were evaluated, or []."""
    evaluations = {}
    for name, run in zip(names, runs, strict=True):
        checkpoint = run.latest_valid_checkpoint() if run.evaluation.is_file() else None
        results = run.load_evaluation(checkpoint) if checkpoint else {}
        if results.get("sample_count"):
            evaluations[name] = results
    metrics = [
        name
        for name in SAMPLE_METRICS
        if any(results.get(f"sample_{name}") is not None for results in evaluations.values())
    ]
    rows = [
        [
            name,
            f"{results['sample_count']:,}",
            str(results.get("sample_temperature", "")),
            *(_quality_cell(results, metric) for metric in metrics),
        ]
        for name, results in evaluations.items()
    ]
    head = ["run", "samples", "temperature", *metrics]
    return [head, *rows] if rows else []


def _quality_cell(results: dict[str, Any], name: str) -> str:
    """Return the value of the samples with its error, and that of real images."""
    value = results.get(f"sample_{name}")
    if value is None:
        return ""
    error = results.get(f"sample_{name}_error")
    real = results.get(f"training_{name}", results.get(f"test_{name}"))
    text = f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
    return text if real is None else f"{text} ({real:.3f})"


def _differences(configs: list[dict[str, Any]]) -> list[list[str]]:
    """Return a row for every setting that differs between the runs."""
    keys = sorted({key for config in configs for key in config} - {"output_dir"})
    settings = {key: [config.get(key, "") for config in configs] for key in keys}
    return [
        [key, *map(str, values)]
        for key, values in settings.items()
        if any(value != values[0] for value in values)
    ]


def _sample_pictures(run: Run) -> list[Picture]:
    """Return the samples of `flowgen sample` and the last ones of training, if they exist."""
    captions = {run.folder / "sample.png": "Samples (flowgen sample)."}
    for path in sorted(run.folder.glob("samples/step_????????.png"))[-1:]:
        step = int(path.stem.removeprefix("step_"))
        captions[path] = f"Samples at step {step:,} (flowgen train)."
    return _existing(captions)


def _existing(captions: dict[Path, str]) -> list[Picture]:
    """Return the pictures that exist, with their captions."""
    return [Picture(caption, data_url(path)) for path, caption in captions.items() if path.exists()]
