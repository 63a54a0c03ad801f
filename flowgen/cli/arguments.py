"""What the commands share on the command line: kinds of values, options, their completion, and how a command is called."""

import math
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from flowgen.config import options, settings
from flowgen.errors import FlowgenError, check_folder_of
from flowgen.messages import show_messages
from flowgen.training.threads import use_threads

PATH = click.Path(path_type=Path)
SAMPLERS = ("gibbs", "tempering", "mean-field")
PICTURES = {".gif", ".jpg", ".png", ".webp"}


class Number(click.ParamType):
    """A finite number of at least `least`: `what` it is, and an example."""

    name = "number"

    def __init__(self, what: str, example: str, least: float = -math.inf):
        self.what, self.example, self.least = what, example, least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number < self.least:
            least = "" if self.least == -math.inf else f" of at least {self.least:g}"
            self.fail(f"{value!r} is no {self.what}: give a number{least}, such as {self.example}", param, ctx)
        return number


def check_picture(path: Path | None, more: Collection[str] = ()) -> Path | None:
    """Before the work is done, not after it."""
    endings = sorted({*PICTURES, *more})
    if path is not None and path.suffix.lower() not in endings:
        raise click.UsageError(f"{path} is no name of a picture: let it end in one of {', '.join(endings)}")
    try:
        if path is not None:
            check_folder_of(path)
    except FlowgenError as error:
        raise click.UsageError(str(error)) from error
    return path


def complete_override(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """`model=gl` to `model=glow`, and so for every group of the configuration; `trainer.st` to `trainer.steps=`."""
    group, equals, _ = incomplete.partition("=")
    if equals:
        return [f"{group}={name}" for name in options(group) if f"{group}={name}".startswith(incomplete)]
    return [f"{name}=" for name in settings() if name.startswith(incomplete)]


def complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from flowgen.training.find import list_runs
    from flowgen.training.portable import zoo

    names = [str(run.folder if incomplete.startswith("outputs") else run.folder.relative_to("outputs")) for run in list_runs()]
    return [name for name in [*names, *zoo()] if name.startswith(incomplete)]


def command(module: str, computes: bool = False, room: str = "commands") -> Any:
    """A module of `flowgen.commands`, or of another room, imported when its command runs.

    What `computes` with a model does so on the cores that are free.
    """
    show_messages()
    imported = import_module(f"flowgen.{room}.{module}")
    if computes:
        use_threads()
    return imported


run_option = click.option(
    "--run",
    "name",
    metavar="RUN",
    shell_complete=complete_run,
    help="Run folder, checkpoint, name under outputs/, zoo/NAME, or hf:OWNER/NAME.",
)
seed_option = click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, metavar="N", show_default=True)
device_option = click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu or cuda.")
out_option = click.option(
    "--out",
    type=PATH,
    metavar="FILE",
    callback=lambda ctx, param, path: check_picture(path),
    help="Where to write; by default into the run's folder.",
)
