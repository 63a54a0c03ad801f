"""`flowgen runs`."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flowgen.config.compose import read_config
from flowgen.config.runs import list_runs
from flowgen.training.checkpoint import read_portable_metadata, zoo, zoo_file
from flowgen.training.run_dir import Run, best_metric
from flowgen.utils.errors import UserError

log = logging.getLogger("flowgen")


class RunSummary(NamedTuple):
    name: str
    model: str
    data: str
    step: int
    best: str


def runs() -> Iterator[RunSummary]:
    """The runs under `outputs/`, newest first, then the models that the package brings, each with its last step and its test figure.

    Before a run's end it is the best validation figure.
    """
    for run in readable_runs():
        yield _row(str(run.folder), read_config(run.config), run.read_metrics())
    for name in zoo():
        about = read_portable_metadata(zoo_file(name))
        yield _row(
            name, about["config"], [{"split": "test", "step": about["step"], **about["metrics"]}]
        )


def _row(name: str, config: dict[str, Any], metrics: list[dict[str, Any]]) -> RunSummary:
    model, data = (
        str(config[section].get("_target_")).rpartition(".")[2] for section in ("model", "data")
    )
    source = config["data"].get("name") or Path(config["data"].get("root") or data).name
    return RunSummary(
        name,
        model,
        source,
        max((row["step"] for row in metrics), default=0),
        str(best_metric(metrics) or "not evaluated yet"),
    )


def readable_runs(*folders: Path) -> list[Run]:
    """`list_runs` without those whose configuration cannot be read, each of which is named in a warning."""
    readable = []
    for run in list_runs(*folders):
        try:
            run.check_contained()
            read_config(run.config)
        except UserError as error:
            log.warning("left out: %s", error)
        else:
            readable.append(run)
    return readable
