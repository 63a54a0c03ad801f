"""Commands that draw pictures with a model: sample, interpolate, edit, complete, chain."""

from pathlib import Path
from typing import Any

import click

from flowgen.cli.arguments import (
    PATH,
    SAMPLERS,
    Number,
    check_picture,
    command,
    device_option,
    out_option,
    run_option,
    seed_option,
)


@click.command()
@run_option
@click.option(
    "--temperature",
    "temperatures",
    type=Number("temperature", "0.7", least=0),
    multiple=True,
    help="May be repeated; by default the run's, 0.7 for flows.",
)
@click.option("--count", type=click.IntRange(1, 10**9), help="Samples for each temperature; by default 32, and 10,000 points in the plane.")
@seed_option
@click.option(
    "--label", type=click.IntRange(0), metavar="N", help="Class to draw, of a flow trained with model.classes; by default each in turn."
)
@click.option("--guidance", type=click.FloatRange(0), metavar="W", help="Of a tarflow with classes: the more typical of their class.")
@click.option("--jacobi", is_flag=True, help="Of a tarflow: all patches at once, in sweeps, in place of one after the other.")
@click.option("--method", type=click.Choice(SAMPLERS), help="Sampler of an RBM; by default tempering.")
@click.option("--sweeps", type=click.IntRange(1, 10**9), help="Of it, from white noise; by default 500.")
@device_option
@click.option(
    "--out",
    type=PATH,
    metavar="FILE|FILE.zip",
    callback=lambda ctx, param, path: check_picture(path, more={".zip"}),
    help="Where to write; by default into the run's folder. A zip holds each sample by itself.",
)
def sample(**options: Any) -> None:
    """Draw a grid of samples, a block of rows for each temperature, sorted by log-probability."""
    click.echo(command("sample", computes=True).sample(**options))


@click.command()
@click.argument("first", type=PATH, metavar="IMG1")
@click.argument("second", type=PATH, metavar="IMG2")
@run_option
@click.option("--steps", type=click.IntRange(2, 10**6), default=9, show_default=True, help="Pictures in a row, both ends among them.")
@click.option("--spherical", is_flag=True, help="Along a great circle rather than a line.")
@device_option
@out_option
def interpolate(**options: Any) -> None:
    """Walk from one image to another: through the latents above, through the pixels below. FILE.gif is a film."""
    click.echo(command("interpolate", computes=True).interpolate(**options))


@click.command()
@click.argument("paths", nargs=-1, required=True, type=PATH, metavar="IMG...")
@click.option(
    "--attribute",
    "attributes",
    multiple=True,
    required=True,
    metavar="NAME",
    help="As CelebA's list has it, of a table's column, or a class: 8. May be repeated.",
)
@click.option(
    "--by",
    "amounts",
    multiple=True,
    type=Number("amount", "1 or -0.5"),
    metavar="A",
    help="1: as far as from images without it to those with it. By default from -2 to 2.",
)
@run_option
@click.option("--labels", "table", type=PATH, metavar="FILE.csv", help="Attributes of your own: lines of an image's file and numbers.")
@click.option(
    "--method",
    type=click.Choice(("ridge", "difference")),
    default="ridge",
    show_default=True,
    help="How directions are found: freed of the other attributes, or the plain difference of means.",
)
@click.option("--count", type=click.IntRange(2, 10**9), default=10_000, show_default=True, help="Labelled images that they are found from.")
@device_option
@out_option
def edit(**options: Any) -> None:
    """Move images along attributes in the latents: a strip, or, with --by, each image beside what becomes of it. FILE.gif is a film."""
    click.echo(command("edit", computes=True).edit(**options))


@click.command()
@click.argument("image", type=PATH, metavar="IMG")
@click.option(
    "--keep",
    required=True,
    metavar="SIDE|MASK",
    help="What is known: left, right, top, bottom, border, random:PERCENT, grey, smaller:FACTOR, or an image, white where known.",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME",
    shell_complete=lambda ctx, param, incomplete: [name for name in SAMPLERS if name.startswith(incomplete)],
    help="Of an RBM gibbs, tempering or mean-field; a flow has langevin alone. May be repeated; by default all, one below the other.",
)
@run_option
@click.option("--sweeps", type=click.IntRange(1, 10**9), help="Steps of the method; by default 1000 of an RBM's, 400 of a flow's.")
@seed_option
@device_option
@out_option
def complete(**options: Any) -> None:
    """Restore the missing part of an image: sample what is unknown given what is known."""
    click.echo(command("complete", computes=True).complete(**options))


@click.command()
@click.option("--method", type=click.Choice(SAMPLERS), default="tempering", show_default=True)
@run_option
@click.option("--count", type=click.IntRange(1, 10**9), default=64, show_default=True, help="Chains side by side.")
@click.option("--frames", type=click.IntRange(1, 10**9), default=100, show_default=True)
@click.option("--sweeps", type=click.IntRange(1, 10**9), default=1, show_default=True, help="From frame to frame.")
@seed_option
@device_option
@out_option
def chain(out: Path | None, **options: Any) -> None:
    """Film an RBM's chains growing images from white noise, FILE.gif."""
    if out is not None and out.suffix.lower() != ".gif":
        raise click.UsageError(f"{out} is no name of a film: let it end in .gif")
    click.echo(command("chain", computes=True).chain(out=out, **options))
