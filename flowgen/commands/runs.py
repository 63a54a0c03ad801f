"""`flowgen runs`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from flowgen.config import compose, instantiate, settings
from flowgen.config.runs import list_runs
from flowgen.training.checkpoint import read_safetensors, zoo, zoo_file
from flowgen.training.run_dir import Run, result_metric
from flowgen.utils.errors import UserError, log
from flowgen.utils.metrics import COMPARED, MetricValue, recorded_likelihood


class RunSummary(NamedTuple):
    """One line of `flowgen runs`."""

    name: str
    model: str
    data: str
    step: int
    likelihood: str
    result: str


def runs() -> Iterator[RunSummary]:
    """Yield the runs under `outputs/`, the newest first, and then the included models.

    `result` is the test metric of a finished run, or the best validation metric until then, and the
    last validation metric.
    """
    for run in readable_runs():
        yield _summary(str(run.folder), compose.read_config(run.config), run.read_metrics())
    for name in zoo():
        metadata = read_safetensors(zoo_file(name), with_weights=False)
        row = {"split": "test", "step": metadata["step"], **metadata["metrics"]}
        yield _summary(name, metadata["config"], [row])


def _summary(name: str, config: dict[str, Any], metrics: list[dict[str, Any]]) -> RunSummary:
    step = max((row["step"] for row in metrics), default=0)
    model = model_name(config["model"])
    likelihood = run_likelihood(config["model"], metrics)
    values = [result_metric(metrics), last_validation(metrics)]
    best, last = (value and replace(value, likelihood=likelihood) for value in values)
    result = f"{best or 'not evaluated yet'}{f', last {last}' if last else ''}"
    return RunSummary(name, model, data_name(config["data"]), step, likelihood, result)


def run_likelihood(section: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """Return the kind of likelihood of a run without importing its model.

    Args:
        section: The section `model` of the configuration.
        metrics: Rows of metrics.jsonl. If none records the kind, it is that of the model.
    """
    recorded = list(filter(None, map(recorded_likelihood, metrics)))
    if recorded:
        return recorded[-1]
    if str(section.get("dequantization")).startswith("gaussian"):
        return "none"
    model = model_name(section)
    return settings.likelihood(model) if model in settings.group_options("model") else "unknown"


def model_name(section: dict[str, Any]) -> str:
    """Return NAME of the option model=NAME of a model section, or else the name of its class."""
    target = str(section.get("_target_"))
    texts = {name: settings.read_text(f"model/{name}") for name in settings.group_options("model")}
    names = (name for name, text in texts.items() if f"_target_: {target}\n" in text)
    return next(names, target.rpartition(".")[2])


def data_name(section: dict[str, Any]) -> str:
    """Return NAME of the option data=NAME of a data section, or else of its folder or class."""
    for name in settings.group_options("data"):
        if instantiate.same_dataset(settings.read_yaml(f"data/{name}"), section):
            return name
    class_name = str(section.get("_target_")).rpartition(".")[2]
    return str(section.get("name") or Path(str(section.get("root") or "")).name or class_name)


def last_validation(rows: list[dict[str, Any]]) -> MetricValue | None:
    """Return the metric of the last validation, which compares runs without their test images."""
    validations = [row for row in rows if row["split"] == "validation"]
    values = [MetricValue.from_row(row, metric) for row in validations[-1:] for metric in COMPARED]
    return next(filter(None, values), None)


def readable_runs(*folders: Path) -> list[Run]:
    """Return `list_runs` without runs whose configuration is not readable, with a warning each."""
    readable = []
    for run in list_runs(*folders):
        try:
            run.check_contained()
            compose.read_config(run.config)
        except UserError as error:
            log.warning("skipped: %s", error)
        else:
            readable.append(run)
    return readable
