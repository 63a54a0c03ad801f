"""What the commands share on the command line: kinds of values, options, their completion, and how a command is called."""

import json
import logging
import math
import sys
import threading
import warnings
from collections.abc import Collection
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from flowgen.config.compose import group_options, setting_names
from flowgen.training.threads import prepare_threads, use_threads
from flowgen.utils.console import escape_control, setup_logging, user_message
from flowgen.utils.errors import UserError, check_folder_of
from flowgen.utils.launcher import is_worker

PATH = click.Path(path_type=Path)
SAMPLERS = ("gibbs", "tempering", "mean-field")
PICTURES = {".gif", ".jpg", ".png", ".webp"}


class Number(click.ParamType):
    """A finite number of at least `least`: `what` it is, and an example."""

    name = "number"

    def __init__(self, what: str, example: str, least: float = -math.inf):
        self.what, self.example, self.least = what, example, least

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number < self.least:
            least = "" if self.least == -math.inf else f" of at least {self.least:g}"
            self.fail(
                f"{value!r} is no {self.what}: give a number{least}, such as {self.example}",
                param,
                ctx,
            )
        return number


def check_picture(path: Path | None, more: Collection[str] = ()) -> Path | None:
    """Before the work is done, not after it."""
    endings = sorted({*PICTURES, *more})
    if path is not None and path.suffix.lower() not in endings:
        raise click.UsageError(
            f"{path} is no name of a picture: let it end in one of {', '.join(endings)}"
        )
    try:
        if path is not None:
            check_folder_of(path)
    except UserError as error:
        raise click.UsageError(str(error)) from error
    return path


def complete_override(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """`model=gl` to `model=glow`, and so for every group of the configuration; `trainer.st` to `trainer.steps=`."""
    group, equals, _ = incomplete.partition("=")
    if equals:
        return [
            f"{group}={name}"
            for name in group_options(group)
            if f"{group}={name}".startswith(incomplete)
        ]
    return [f"{name}=" for name in setting_names() if name.startswith(incomplete)]


def complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from flowgen.config.runs import list_runs
    from flowgen.training.checkpoint import zoo

    names = [
        str(run.folder if incomplete.startswith("outputs") else run.folder.relative_to("outputs"))
        for run in list_runs()
    ]
    return [name for name in [*names, *zoo()] if name.startswith(incomplete)]


def command(module: str, computes: bool = False, room: str = "commands") -> Any:
    """A module of `flowgen.commands`, or of another room, imported when its command runs.

    What `computes` with a model does so on the cores that are free.
    """
    setup_logging()
    imported = import_module(f"flowgen.{room}.{module}")
    if computes:
        use_threads()
    return imported


run_option = click.option(
    "--run",
    metavar="RUN",
    shell_complete=complete_run,
    help="Run folder, checkpoint, name under outputs/, zoo/NAME, or hf:OWNER/NAME.",
)
seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, metavar="N", show_default=True
)
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu or cuda."
)
out_option = click.option(
    "--out",
    type=PATH,
    metavar="FILE",
    callback=lambda ctx, param, path: check_picture(path),
    help="Where to write; by default into the run's folder.",
)


HYDRA_FLAGS = {
    "-m",
    "--multirun",
    "--help",
    "-h",
    "--cfg",
    "-c",
    "--resolve",
    "--info",
    "-i",
    "--package",
    "-p",
    "--version",
}


@click.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument(
    "words",
    nargs=-1,
    type=click.UNPROCESSED,
    metavar="[OVERRIDE]...",
    shell_complete=complete_override,
)
def train(words: tuple[str, ...]) -> None:
    """Train a model: model=glow data=celeba trainer.steps=2000 output_dir=DIR; train --help lists what there is."""
    words = tuple("--help" if word == "-h" else word for word in words)
    unknown = [
        word for word in words if word.startswith("-") and word.partition("=")[0] not in HYDRA_FLAGS
    ]
    if unknown:
        raise click.UsageError(
            f"no such option: {unknown[0]}; what to train is said as KEY=VALUE, see `flowgen train --help`"
        )
    command("train").train(words=list(words))


@click.command()
@click.argument("name", metavar="RUN", shell_complete=complete_run)
@click.argument("overrides", nargs=-1, metavar="[OVERRIDE]...", shell_complete=complete_override)
def resume(name: str, overrides: tuple[str, ...]) -> None:
    """Go on from RUN's last good checkpoint, with its own configuration but for each KEY=VALUE."""
    module = command("train")
    module.run_worker() if is_worker() else module.resume(name=name, overrides=list(overrides))


@click.command()
@click.argument("run", metavar="RUN", shell_complete=complete_run)
@click.argument("path", type=PATH, metavar="FILE.safetensors")
def export(run: str, path: Path) -> None:
    """Write RUN's model into one file that --run reads, with a card and samples beside it."""
    for file in command("export", computes=True).export(run=run, path=path):
        click.echo(file)


@click.command()
@click.argument("run", metavar="RUN", shell_complete=complete_run)
@click.argument("repository", metavar="OWNER/NAME")
@click.option(
    "--license",
    "license_name",
    metavar="NAME",
    help="Of a model of images whose terms flowgen does not know, as the Hub spells it: cc-by-4.0.",
)
@click.option(
    "--private", is_flag=True, help="For nobody's eyes but yours, where the repository is new."
)
def push(**options: Any) -> None:
    """Put RUN's model on the Hugging Face Hub, with a card and samples; --run hf:OWNER/NAME reads it from there."""
    for line in command("export", computes=True).push(**options):
        click.echo(line)


@click.command()
@run_option
@click.option(
    "--temperature",
    "temperatures",
    type=Number("temperature", "0.7", least=0),
    multiple=True,
    help="May be repeated; by default the run's, 0.7 for flows.",
)
@click.option(
    "--count",
    type=click.IntRange(1, 10**9),
    help="Samples for each temperature; by default 32, and 10,000 points in the plane.",
)
@seed_option
@click.option(
    "--label",
    type=click.IntRange(0),
    metavar="N",
    help="Class to draw, of a flow trained with model.num_classes; by default each in turn.",
)
@click.option(
    "--guidance",
    type=click.FloatRange(0),
    metavar="W",
    help="Of a tarflow with classes: the more typical of their class.",
)
@click.option(
    "--jacobi",
    is_flag=True,
    help="Of a tarflow: all patches at once, in sweeps, in place of one after the other.",
)
@click.option(
    "--sampler", type=click.Choice(SAMPLERS), help="Sampler of an RBM; by default tempering."
)
@click.option(
    "--steps", type=click.IntRange(1, 10**9), help="Of it, from white noise; by default 500."
)
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
@click.option(
    "--steps",
    type=click.IntRange(2, 10**6),
    default=9,
    show_default=True,
    help="Pictures in a row, both ends among them.",
)
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
    "--amount",
    "amounts",
    multiple=True,
    type=Number("amount", "1 or -0.5"),
    metavar="A",
    help="1: as far as from images without it to those with it. By default from -2 to 2.",
)
@run_option
@click.option(
    "--labels",
    "table",
    type=PATH,
    metavar="FILE.csv",
    help="Attributes of your own: lines of an image's file and numbers.",
)
@click.option(
    "--direction",
    type=click.Choice(("ridge", "difference")),
    default="ridge",
    show_default=True,
    help="How directions are found: freed of the other attributes, or the plain difference of means.",
)
@click.option(
    "--count",
    type=click.IntRange(2, 10**9),
    default=10_000,
    show_default=True,
    help="Labelled images that they are found from.",
)
@device_option
@out_option
def edit(**options: Any) -> None:
    """Move images along attributes in the latents: a strip, or, with --amount, each image beside what becomes of it. FILE.gif is a film."""
    click.echo(command("edit", computes=True).edit(**options))


@click.command()
@click.argument("image", type=PATH, metavar="IMG")
@click.option(
    "--known",
    required=True,
    metavar="SIDE|MASK",
    help="What is known: left, right, top, bottom, border, random:PERCENT, grayscale, downsample:FACTOR, or an image, white where known.",
)
@click.option(
    "--sampler",
    multiple=True,
    metavar="NAME",
    shell_complete=lambda ctx, param, incomplete: [
        name for name in SAMPLERS if name.startswith(incomplete)
    ],
    help="Of an RBM gibbs, tempering or mean-field; a flow has langevin alone. May be repeated; by default all, one below the other.",
)
@run_option
@click.option(
    "--steps",
    type=click.IntRange(1, 10**9),
    help="Steps of the method; by default 1000 of an RBM's, 400 of a flow's.",
)
@seed_option
@device_option
@out_option
def complete(**options: Any) -> None:
    """Restore the missing part of an image: sample what is unknown given what is known."""
    click.echo(command("complete", computes=True).complete(**options))


@click.command()
@click.option("--sampler", type=click.Choice(SAMPLERS), default="tempering", show_default=True)
@run_option
@click.option(
    "--count",
    type=click.IntRange(1, 10**9),
    default=64,
    show_default=True,
    help="Chains side by side.",
)
@click.option("--frames", type=click.IntRange(1, 10**9), default=100, show_default=True)
@click.option(
    "--steps",
    type=click.IntRange(1, 10**9),
    default=1,
    show_default=True,
    help="From frame to frame.",
)
@seed_option
@device_option
@out_option
def chain(out: Path | None, **options: Any) -> None:
    """Film an RBM's chains growing images from white noise, FILE.gif."""
    if out is not None and out.suffix.lower() != ".gif":
        raise click.UsageError(f"{out} is no name of a film: let it end in .gif")
    click.echo(command("sample", computes=True).chain(out=out, **options))


OUTLIER_SCORES = (
    "likelihood",
    "typicality",
    "complexity",
    "combined",
    "last_level",
    "density_of_states",
)


@click.command()
@run_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@device_option
@click.argument("overrides", nargs=-1, metavar="[OVERRIDE]...", shell_complete=complete_override)
def evaluate(run: str | None, as_json: bool, device: str, overrides: tuple[str, ...]) -> None:
    """Measure a model on the whole test split, as in `flowgen evaluate num_importance_samples=8`."""
    found = command("evaluate", computes=True).evaluate(
        name=run, overrides=list(overrides), device=device
    )
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
    "--ood",
    multiple=True,
    metavar="data=NAME|RUN",
    shell_complete=complete_override,
    help="How well each score tells the test images of the run from those of other data, and back; data.root= may be added.",
)
@click.option(
    "--score", type=click.Choice(OUTLIER_SCORES), help="Score that tells which are the strangest."
)
@click.option(
    "--count",
    type=click.IntRange(2),
    default=1000,
    show_default=True,
    help="Validation images, and test images of --ood.",
)
@click.option(
    "--csv", "table", type=PATH, metavar="FILE", help="Write every score of every image here."
)
@seed_option
@device_option
@out_option
def score(paths: tuple[Path, ...], ood: tuple[str, ...], **options: Any) -> None:
    """Tell how likely and how strange images are: bits/dim, percentile among validation images, scores, p-values."""
    if not paths and not ood:
        raise click.UsageError(
            "nothing to score: name images, a folder or a zip of them, or compare data by --ood data=NAME"
        )
    for line in command("score", computes=True).score(paths=list(paths), ood=list(ood), **options):
        click.echo(line)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN...", shell_complete=complete_run)
@click.option(
    "--out",
    type=PATH,
    metavar="FILE.html",
    help="Where to write; by default report.html here, or in the run's folder.",
)
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
        click.echo(
            escape_control(
                f"{row.name:48}  {row.model:8} {row.data:14} step {row.step:<8} {row.best}"
            )
        )


def _readable(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "unknown"


@click.command()
@click.argument("name", metavar="[RUN]", required=False, shell_complete=complete_run)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8700,
    show_default=True,
    metavar="N",
    help="0 is any that is free.",
)
@device_option
def explore(name: str | None, port: int, device: str) -> None:
    """Play with a model on a page at 127.0.0.1: sample, mix, walk, complete, score."""
    command("app", computes=True, room="serving.web").explore(
        name=name, port=port, device=device, say=click.echo
    )


@click.command()
@click.argument("name", metavar="[RUN]", required=False, shell_complete=complete_run)
@click.option(
    "--token-file",
    type=PATH,
    metavar="FILE",
    help="Holds the bot's token, mode 600; by default FLOWGEN_BOT_TOKEN does.",
)
@click.option(
    "--allow",
    "allowed",
    type=int,
    multiple=True,
    metavar="CHAT",
    help="Talk to this chat alone; may be repeated.",
)
@click.option(
    "--api", metavar="URL", help="A server of the Bot API of your own; by default Telegram's."
)
@device_option
def bot(**options: Any) -> None:
    """Chat with a model on Telegram: /generate, /walk with two photos, /score with one."""
    if not find_spec("telegram"):
        raise UserError("the bot needs python-telegram-bot: pip install 'flowgen[bot]'")
    command("telegram", computes=True, room="serving").bot(say=click.echo, **options)


COMMANDS = (
    train,
    resume,
    sample,
    interpolate,
    edit,
    complete,
    chain,
    evaluate,
    score,
    explore,
    bot,
    report,
    runs,
    export,
    push,
)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="flowgen", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Train, judge and use likelihood-based image models.

    RUN is a run's folder, a checkpoint file, a name under outputs/, zoo/NAME, a model that the package brings, or hf:OWNER/NAME, one on the
    Hugging Face Hub; without it, the newest run that fits.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for each in COMMANDS:
    cli.add_command(each)


def main() -> None:
    """Run the command line; every error ends as one line on standard error and an exit status."""
    prepare_threads()
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if not debug:  # what fails in TensorBoard's thread comes up in this one too, and a log that cannot be written is told by that
        threading.excepthook = lambda failure: None
        logging.raiseExceptions = False
        logging.lastResort = (
            None  # what Python, torch and Pillow think of a file is no business of the user's
        )
        warnings.simplefilter("ignore")
    try:
        cli.main(
            [word for word in arguments if word != "--debug"],
            prog_name="flowgen",
            standalone_mode=False,
        )
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
        _end(user_message(error), 1)


def _end(message: str, status: int) -> None:
    print(f"flowgen: {escape_control(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(status)
