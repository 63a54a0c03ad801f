"""`flowgen runs`."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flowgen.config.compose import read_config
from flowgen.config.runs import list_runs
from flowgen.training.checkpoint import read_safetensors, zoo, zoo_file
from flowgen.training.run_dir import Run, best_metric
from flowgen.utils.errors import UserError
from flowgen.utils.metrics import COMPARED, MetricValue

log = logging.getLogger("flowgen")


class RunSummary(NamedTuple):
    """One line of `flowgen runs`."""

    name: str
    model: str
    data: str
    step: int
    best: str


def runs() -> Iterator[RunSummary]:
    """Yield the runs under `outputs/`, the newest first, and then the models of the zoo.

    `best` is the test metric of a finished run, or the best validation metric until then, and the
    last validation metric.
    """
    for run in readable_runs():
        yield _summary(str(run.folder), read_config(run.config), run.read_metrics())
    for name in zoo():
        metadata = read_safetensors(zoo_file(name), with_weights=False)
        row = {"split": "test", "step": metadata["step"], **metadata["metrics"]}
        yield _summary(name, metadata["config"], [row])


def _summary(name: str, config: dict[str, Any], metrics: list[dict[str, Any]]) -> RunSummary:
    model = str(config["model"].get("_target_")).rpartition(".")[2]
    data = config["data"]
    folder = data.get("root") or str(data.get("_target_")).rpartition(".")[2]
    step = max((row["step"] for row in metrics), default=0)
    best = str(best_metric(metrics) or "not evaluated yet")
    if validation := last_validation(metrics):
        best += f", last {validation}"
    return RunSummary(name, model, data.get("name") or Path(folder).name, step, best)


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
            read_config(run.config)
        except UserError as error:
            log.warning("skipped: %s", error)
        else:
            readable.append(run)
    return readable
