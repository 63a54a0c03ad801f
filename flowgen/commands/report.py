"""`flowgen report`: runs as one page that needs nothing but itself."""

import io
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup

from flowgen.commands.runs import readable_runs
from flowgen.config.compose import flatten, read_config
from flowgen.config.runs import OUTPUTS, find_run
from flowgen.training.run_dir import Run, best_metric, validation_rows
from flowgen.utils import plots
from flowgen.utils.errors import UserError, check_folder_of
from flowgen.utils.html import Picture, Section, data_url, image_data_url, write_html
from flowgen.utils.metrics import BITS_PER_DIM, COMPARED, Metric, MetricValue

CAPTIONS = {
    "curves.png": "Training loss, validation figure, learning rate and gradient norm (flowgen train).",
    "features.png": "The weights of the hidden units, the largest first: orange above zero, blue below (flowgen train).",
    "sample.png": "Samples (flowgen sample).",
    "interpolation.png": "From one image to another, through the latents above and the pixels below (flowgen interpolate).",
    "completion.png": "The image, what is kept of it, the mean of the restored ones, and some of them (flowgen complete).",
    "chain_gibbs.gif": "Gibbs chains from white noise (flowgen chain --method gibbs).",
    "chain_tempering.gif": "Chains of parallel tempering from white noise (flowgen chain --method tempering).",
    "chain_mean-field.gif": "Mean field from white noise (flowgen chain --method mean-field).",
}


def report(*, names: list[str], out: Path | None) -> Path:
    """Write one HTML page about the runs `names`, or those below a folder of that name. Raises FlowgenError."""
    if out is not None:
        check_folder_of(out)
    runs = [run for name in names for run in _runs(name)]
    target = out or (runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html"))
    how_many = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    lead = [f"{datetime.now(UTC):%Y-%m-%d}, {how_many}. Errors are standard errors."]
    write_html(target, "flowgen report", lead, sections_of(runs))
    return target


def sections_of(runs: list[Run]) -> list[Section]:
    """All runs side by side, where their configurations differ, and each by itself."""
    configs = [flatten(read_config(run.config)) for run in runs]
    head, *table = overview(runs)
    names = [row[0] for row in table]
    anchors = [f"run{number}" for number in range(1, len(runs) + 1)]
    linked = [
        [Markup('<a href="#{}">{}</a>').format(anchor, row[0]), *row[1:]]
        for anchor, row in zip(anchors, table, strict=True)
    ]
    found = [
        Section(
            "runs",
            "",
            table=[head, *linked],
            pictures=_curves(names, [run.read_metrics() for run in runs]),
        )
    ]
    if differences := {
        key: values for key, values in _differences(configs).items() if key != "output_dir"
    }:
        table = [
            ["setting", *names],
            *([key, *map(str, values)] for key, values in differences.items()),
        ]
        found.append(Section("differences", "Where the configurations differ", table=table))
    return found + [_section(*each) for each in zip(anchors, names, runs, configs, strict=True)]


def overview(runs: list[Run]) -> list[list[str]]:
    """A table with a row for each run: its name, without the folder that all share, what it is, its figure, and what it has cost."""
    table = [["run", "model", "data", "figure", "step", "images/s", "hours", "memory, GiB"]]
    for name, run in zip(_short([str(run.folder) for run in runs]), runs, strict=True):
        config, rows = flatten(read_config(run.config)), run.read_metrics()
        model, data = (
            str(config.get(f"{section}._target_", "")).rpartition(".")[2]
            for section in ("model", "data")
        )
        table.append([name, model, config.get("data.name") or data, *_reached(rows), *_costs(rows)])
    return table


def _reached(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """The test figure with its error, or, before the end, the best on the validation split; and the last step."""
    return str(
        best_metric(rows) or "not evaluated yet"
    ), f"{max((row['step'] for row in rows), default=0):,}"


def _costs(rows: list[dict[str, Any]]) -> tuple[str, str, str]:
    """The median speed, the hours with evaluation and samples, and the most memory, of the GPU or else of the process."""
    train = [row for row in rows if row["split"] == "train" and row.get("images_per_second")]
    if not train:
        return "", "", ""
    speed, memory = (
        median(row["images_per_second"] for row in train),
        max(row.get("memory_gib") or 0.0 for row in train),
    )
    return f"{speed:,.1f}", f"{train[-1].get('seconds', 0.0) / 3600:.2f}", f"{memory:.2f}"


def _runs(name: str) -> list[Run]:
    if not name.strip():
        raise UserError("an empty name is no run: name one, or a folder of runs such as outputs")
    if not any((folder / name).is_dir() for folder in (Path(), OUTPUTS)):
        return [find_run(name)]
    folders = {
        (folder / name).resolve() for folder in (Path(), OUTPUTS) if (folder / name).is_dir()
    }
    below = [run for run in readable_runs(*folders) if run.config.parent.resolve() not in folders]
    return (
        below
        if below and not any((folder / "config.yaml").exists() for folder in folders)
        else [find_run(name)]
    )


def _short(folders: list[str]) -> list[str]:
    """Names without the folder that all of them share."""
    if len(folders) == 1:
        return folders
    parts = [Path(folder).parts for folder in folders]
    shared = next(
        (place for place, each in enumerate(zip(*parts, strict=False)) if len(set(each)) > 1), 0
    )
    return [str(Path(*each[shared:])) if each[shared:] else each[-1] for each in parts]


def _section(anchor: str, name: str, run: Run, config: dict[str, Any]) -> Section:
    samples = sorted(run.folder.glob("samples/step_????????.png"))[-1:]
    own = [run.folder / file for file in CAPTIONS if (run.folder / file).exists()]
    shown = [
        Picture(f"Samples at step {int(path.stem[5:]):,} (flowgen train).", data_url(path))
        for path in samples
    ]
    shown += [Picture(CAPTIONS[path.name], data_url(path)) for path in own]
    best, step = _reached(run.read_metrics())
    settings = "\n".join(f"{key}: {value}" for key, value in config.items())
    return Section(
        anchor,
        name,
        [f"{best}, step {step}. {run.environment()}"],
        pictures=shown,
        details=("Configuration", settings),
    )


def _curves(names: list[str], rows: list[list[dict[str, Any]]]) -> list[Picture]:
    """A picture for each metric and number of bits, since values at different bits do not compare."""
    lines: dict[tuple[Metric, int], dict[str, list[tuple[int, float]]]] = {}
    for name, each in zip(names, rows, strict=True):
        for row in validation_rows(each):
            for metric in COMPARED:
                if measured := MetricValue.from_row(row, metric):
                    lines.setdefault((metric, row.get("bits", 1)), {}).setdefault(name, []).append(
                        (row["step"], measured.value)
                    )
    found = []
    for (metric, bits), of_runs in sorted(
        lines.items(), key=lambda line: (line[0][0].name, line[0][1])
    ):
        file, words = (
            io.BytesIO(),
            metric.name.replace("_", " ") + f" at {bits} bits" * (metric == BITS_PER_DIM),
        )
        label = f"validation {words}, {metric.unit}"
        plots.lines(of_runs, file, xlabel="step", ylabel=label, outliers=(0.05, 0.05))
        found.append(
            Picture(f"Validation {words} against the step.", image_data_url(file.getvalue(), "png"))
        )
    return found


def _differences(configs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    keys = sorted({key for config in configs for key in config})
    table = {key: [config.get(key, "") for config in configs] for key in keys}
    return {
        key: values for key, values in table.items() if any(value != values[0] for value in values)
    }
