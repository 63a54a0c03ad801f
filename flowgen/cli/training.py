"""Commands that train, and that pass on what was trained: train, resume, export, push."""

from pathlib import Path
from typing import Any

import click

from flowgen.cli.arguments import PATH, command, complete_override, complete_run
from flowgen.launcher import follows

HYDRA_FLAGS = {"-m", "--multirun", "--help", "-h", "--cfg", "-c", "--resolve", "--info", "-i", "--package", "-p", "--version"}


@click.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[OVERRIDE]...", shell_complete=complete_override)
def train(words: tuple[str, ...]) -> None:
    """Train a model: model=glow data=celeba trainer.steps=2000 out=DIR; train --help lists what there is."""
    words = tuple("--help" if word == "-h" else word for word in words)
    unknown = [word for word in words if word.startswith("-") and word.partition("=")[0] not in HYDRA_FLAGS]
    if unknown:
        raise click.UsageError(f"no such option: {unknown[0]}; what to train is said as KEY=VALUE, see `flowgen train --help`")
    command("train").train(words=list(words))


@click.command()
@click.argument("name", metavar="RUN", shell_complete=complete_run)
@click.argument("overrides", nargs=-1, metavar="[OVERRIDE]...", shell_complete=complete_override)
def resume(name: str, overrides: tuple[str, ...]) -> None:
    """Go on from RUN's last good checkpoint, with its own configuration but for each KEY=VALUE."""
    module = command("resume")
    module.follow() if follows() else module.resume(name=name, overrides=list(overrides))


@click.command()
@click.argument("name", metavar="RUN", shell_complete=complete_run)
@click.argument("path", type=PATH, metavar="FILE.safetensors")
def export(name: str, path: Path) -> None:
    """Write RUN's model into one file that --run reads, with a card and samples beside it."""
    for file in command("export", computes=True).export(name=name, path=path):
        click.echo(file)


@click.command()
@click.argument("name", metavar="RUN", shell_complete=complete_run)
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--licence", metavar="NAME", help="Of a model of images whose terms flowgen does not know, as the Hub spells it: cc-by-4.0.")
@click.option("--private", is_flag=True, help="For nobody's eyes but yours, where the repository is new.")
def push(**options: Any) -> None:
    """Put RUN's model on the Hugging Face Hub, with a card and samples; --run hf:OWNER/NAME reads it from there."""
    for line in command("push", computes=True).push(**options):
        click.echo(line)
