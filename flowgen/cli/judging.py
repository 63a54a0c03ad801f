"""Commands that tell how good models are: evaluate, score, report, runs."""

import json
import math
from pathlib import Path
from typing import Any

import click

from flowgen.cli.arguments import PATH, command, complete_override, complete_run, device_option, out_option, run_option, seed_option
from flowgen.messages import printable

OUTLIER_SCORES = ("likelihood", "typicality", "complexity", "combined", "last_level", "density_of_states")


@click.command()
@run_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@device_option
@click.argument("overrides", nargs=-1, metavar="[OVERRIDE]...", shell_complete=complete_override)
def evaluate(name: str | None, as_json: bool, device: str, overrides: tuple[str, ...]) -> None:
    """Measure a model on the whole test split, as in `flowgen evaluate draws=8`."""
    found = command("evaluate", computes=True).evaluate(name=name, overrides=list(overrides), device=device)
    if as_json:
        click.echo(json.dumps(found.row()))
        return
    for key, fact in found.of.items():
        click.echo(f"{key:32} {fact}")
    for key, each in found.judgement.measured.items():
        error = "" if each.error is None else f" +- {_readable(each.error)}"
        click.echo(f"{key:32} {_readable(each.value)}{error} {each.metric.unit}".rstrip())
    for key, fact in found.judgement.facts.items():
        click.echo(f"{key:32} {fact}")


@click.command()
@click.argument("paths", nargs=-1, type=PATH, metavar="[IMG|FOLDER|ZIP]...")
@run_option
@click.option(
    "--against",
    multiple=True,
    metavar="data=NAME|RUN",
    shell_complete=complete_override,
    help="How well each score tells the test images of the run from those of other data, and back; data.root= may be added.",
)
@click.option("--by", type=click.Choice(OUTLIER_SCORES), help="Score that tells which are the strangest.")
@click.option("--count", type=click.IntRange(2), default=1000, show_default=True, help="Validation images, and test images of --against.")
@click.option("--csv", "table", type=PATH, metavar="FILE", help="Write every score of every image here.")
@seed_option
@device_option
@out_option
def score(paths: tuple[Path, ...], against: tuple[str, ...], **options: Any) -> None:
    """Tell how likely and how strange images are: bits/dim, percentile among validation images, scores, p-values."""
    if not paths and not against:
        raise click.UsageError("nothing to score: name images, a folder or a zip of them, or compare data by --against data=NAME")
    for line in command("score", computes=True).score(paths=list(paths), against=list(against), **options):
        click.echo(line)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN...", shell_complete=complete_run)
@click.option("--out", type=PATH, metavar="FILE.html", help="Where to write; by default report.html here, or in the run's folder.")
def report(names: tuple[str, ...], out: Path | None) -> None:
    """Show runs, or all below a folder, in one page: curves, samples, differences, configuration."""
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise click.UsageError(f"{out} is no name of a page: let it end in .html")
    click.echo(command("report").report(names=list(names), out=out))


@click.command()
def runs() -> None:
    """List the runs under outputs/, newest first, and the models of the zoo, with their figures."""
    rows = list(command("runs").runs())
    if all(row.name.startswith("zoo/") for row in rows):
        click.echo("no runs under outputs/ yet: train one with `flowgen train`")
    for row in rows:
        click.echo(printable(f"{row.name:48}  {row.model:8} {row.data:14} step {row.step:<8} {row.best}"))


def _readable(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "unknown"
