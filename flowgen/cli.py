"""The command line. Nothing here, nor at the top of what it imports, imports torch: `flowgen --help` must answer at once."""

import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import click

from flowgen.arguments import (
    PATH,
    SAMPLERS,
    Temperature,
    complete_override,
    complete_run,
    device_option,
    out_option,
    run_option,
    seed_option,
)
from flowgen.messages import one_sentence, show_messages
from flowgen.training.threads import prepare_threads, use_threads

HYDRA_FLAGS = {"-m", "--multirun", "--help", "-h", "--cfg", "-c", "--resolve", "--info", "-i", "--package", "-p", "--version"}


def readable(value: Any) -> str:
    return "unknown" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="flowgen", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Train, judge and use likelihood-based image models.

    RUN is a run's folder, a checkpoint file, a name under outputs/, or zoo/NAME, a model that the package brings; without it, the newest
    run that fits.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[OVERRIDE]...", shell_complete=complete_override)
def train(words: tuple[str, ...]) -> None:
    """Train a model: model=glow data=celeba trainer.steps=2000 out=DIR; train --help lists what there is."""
    words = tuple("--help" if word == "-h" else word for word in words)
    unknown = [word for word in words if word.startswith("-") and word.partition("=")[0] not in HYDRA_FLAGS]
    if unknown:
        raise click.UsageError(f"no such option: {unknown[0]}; what to train is said as KEY=VALUE, see `flowgen train --help`")
    _command("train").train(list(words))


@cli.command()
@click.argument("name", metavar="RUN", shell_complete=complete_run)
@click.argument("overrides", nargs=-1, metavar="[OVERRIDE]...", shell_complete=complete_override)
def resume(name: str, overrides: tuple[str, ...]) -> None:
    """Go on from RUN's last good checkpoint, with its own configuration but for each KEY=VALUE."""
    _command("resume").resume(name, list(overrides))


@cli.command()
@run_option
@click.option(
    "--temperature", "temperatures", type=Temperature(), multiple=True, help="May be repeated; by default the run's, 0.7 for flows."
)
@click.option("--count", type=click.IntRange(1), help="Samples for each temperature; by default 32, and 10,000 points in the plane.")
@seed_option
@click.option(
    "--label", type=click.IntRange(0), metavar="N", help="Class to draw, of a flow trained with model.classes; by default each in turn."
)
@click.option("--method", type=click.Choice(SAMPLERS), help="Sampler of an RBM; by default tempering.")
@click.option("--sweeps", type=click.IntRange(1), help="Of it, from white noise; by default 500.")
@device_option
@out_option
def sample(**options: Any) -> None:
    """Draw a grid of samples, a block of rows for each temperature, sorted by log-probability."""
    click.echo(_command("sample", computes=True).sample(**options))


@cli.command()
@click.argument("first", type=PATH, metavar="IMG1")
@click.argument("second", type=PATH, metavar="IMG2")
@run_option
@click.option("--steps", type=click.IntRange(2), default=9, show_default=True, help="Pictures in a row, both ends among them.")
@click.option("--spherical", is_flag=True, help="Along a great circle rather than a line.")
@device_option
@out_option
def interpolate(**options: Any) -> None:
    """Walk from one image to another: through the latents above, through the pixels below. FILE.gif is a film."""
    click.echo(_command("interpolate", computes=True).interpolate(**options))


@cli.command()
@click.argument("image", type=PATH, metavar="IMG")
@click.option("--keep", required=True, metavar="SIDE|MASK", help="What is known: left, right, top, bottom, or an image, white where known.")
@click.option(
    "--method", "methods", type=click.Choice(SAMPLERS), multiple=True, help="May be repeated; by default all, one below the other."
)
@run_option
@click.option("--sweeps", type=click.IntRange(1), default=1000, show_default=True)
@seed_option
@device_option
@out_option
def complete(
    image: Path, keep: str, methods: tuple[str, ...], name: str | None, sweeps: int, seed: int, device: str, out: Path | None
) -> None:
    """Restore the missing part of an image with an RBM: sample what is unknown given what is known."""
    click.echo(_command("complete", computes=True).complete(image, keep, list(methods or SAMPLERS), name, sweeps, seed, device, out))


@cli.command()
@click.option("--method", type=click.Choice(SAMPLERS), default="tempering", show_default=True)
@run_option
@click.option("--count", type=click.IntRange(1), default=64, show_default=True, help="Chains side by side.")
@click.option("--frames", type=click.IntRange(1), default=100, show_default=True)
@click.option("--sweeps", type=click.IntRange(1), default=1, show_default=True, help="From frame to frame.")
@seed_option
@device_option
@out_option
def chain(method: str, name: str | None, count: int, frames: int, sweeps: int, seed: int, device: str, out: Path | None) -> None:
    """Film an RBM's chains growing images from white noise, FILE.gif."""
    if out is not None and out.suffix.lower() != ".gif":
        raise click.UsageError(f"{out} is no name of a film: let it end in .gif")
    click.echo(_command("chain", computes=True).chain(method, name, count, frames, sweeps, seed, device, out))


@cli.command()
@run_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@device_option
@click.argument("overrides", nargs=-1, metavar="[OVERRIDE]...", shell_complete=complete_override)
def evaluate(name: str | None, as_json: bool, device: str, overrides: tuple[str, ...]) -> None:
    """Measure a model on the whole test split, as in `flowgen evaluate draws=8`."""
    figures = _command("evaluate", computes=True).evaluate(name, list(overrides), device)
    if as_json:
        click.echo(json.dumps(figures))
        return
    for key, value in figures.items():
        if key.removesuffix("_error") not in figures or not key.endswith("_error"):
            error = f" +- {readable(figures[f'{key}_error'])}" if f"{key}_error" in figures else ""
            click.echo(f"{key:32} {readable(value)}{error}")


@cli.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN...", shell_complete=complete_run)
@click.option("--out", type=PATH, metavar="FILE.html", help="Where to write; by default report.html here, or in the run's folder.")
def report(names: tuple[str, ...], out: Path | None) -> None:
    """Show runs, or all below a folder, in one page: curves, samples, differences, configuration."""
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise click.UsageError(f"{out} is no name of a page: let it end in .html")
    click.echo(_command("report").report(names=list(names), out=out))


@cli.command()
def runs() -> None:
    """List the runs under outputs/, newest first, and the models of the zoo, with their figures."""
    rows = list(_command("runs").runs())
    if all(row.name.startswith("zoo/") for row in rows):
        click.echo("no runs under outputs/ yet: train one with `flowgen train`")
    for row in rows:
        click.echo(f"{row.name:48}  {row.model:8} {row.data:14} step {row.step:<8} {row.best}")


def _command(module: str, computes: bool = False) -> Any:
    """A module of `flowgen.commands`, imported when its command runs; what `computes` with a model does so on the cores that are free."""
    from importlib import import_module

    show_messages()
    command = import_module(f"flowgen.commands.{module}")
    if computes:
        use_threads()
    return command


def main() -> None:
    """Run the command line; every error ends as one line on standard error and an exit status."""
    prepare_threads()
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if not debug:  # what fails in TensorBoard's thread comes up in this one too, and a log that cannot be written is told by that
        threading.excepthook = lambda failure: None
        logging.raiseExceptions = False
    try:
        cli.main([word for word in arguments if word != "--debug"], prog_name="flowgen", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        _end("interrupted", 130)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "flowgen"
        _end(f"{error.format_message()} (`{command} --help` says more)", 2)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        _end(one_sentence(error), 1)


def _end(message: str, status: int) -> None:
    print(f"flowgen: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
