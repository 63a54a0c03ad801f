"""`flowgen runs`."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flowgen.config import read_config
from flowgen.errors import FlowgenError
from flowgen.training.find import list_runs
from flowgen.training.run import Run, best_figure

log = logging.getLogger("flowgen")


class Row(NamedTuple):
    name: str
    model: str
    data: str
    step: int
    best: str


def runs() -> Iterator[Row]:
    """The runs under `outputs/`, newest first, each with its last step and its test figure, or, before its end, its best one."""
    for run in readable_runs():
        config, rows = read_config(run.config), run.read_metrics()
        model, data = (str(config[section].get("_target_")).rpartition(".")[2] for section in ("model", "data"))
        source = config["data"].get("name") or Path(config["data"].get("root") or data).name
        yield Row(str(run.folder), model, source, max((row["step"] for row in rows), default=0), best_figure(rows) or "not evaluated yet")


def readable_runs(*folders: Path) -> list[Run]:
    """`list_runs` without those whose configuration cannot be read, each of which is named in a warning."""
    readable = []
    for run in list_runs(*folders):
        try:
            read_config(run.config)
        except FlowgenError as error:
            log.warning("left out: %s", error)
        else:
            readable.append(run)
    return readable
