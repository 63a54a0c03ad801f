"""`flowgen runs`."""

from collections.abc import Iterator
from typing import NamedTuple

from flowgen.commands.report import best_figure
from flowgen.config import read_config
from flowgen.errors import FlowgenError
from flowgen.training.find import list_runs


class Row(NamedTuple):
    name: str
    model: str
    data: str
    step: int
    best: str


def runs() -> Iterator[Row]:
    """The runs under `outputs/`, newest first, each with its last step and its best test figure."""
    for run in list_runs():
        try:
            config = read_config(run.config)
        except FlowgenError:
            continue
        rows = run.read_metrics()
        target = str(config["model"].get("_target_")).rpartition(".")[2]
        source = config["data"].get("name") or str(config["data"].get("_target_")).rpartition(".")[2]
        yield Row(str(run.folder), target, source, max((row["step"] for row in rows), default=0), best_figure(rows) or "not evaluated yet")
