"""The command line: options, help and error messages of every command."""

import json
import logging
import math
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import click

from flowgen.config.settings import group_options, setting_names, settings_help
from flowgen.training.threads import prepare_threads, use_threads
from flowgen.utils.console import escape_control, format_table, setup_logging, user_message
from flowgen.utils.errors import UserError, check, check_folder_of

PATH = click.Path(path_type=Path)
SAMPLERS = ("gibbs", "tempering", "mean-field")
DIRECTIONS = ("ridge", "difference")
SHELLS = ("bash", "zsh", "fish")
OOD_SCORES = (
    "likelihood",
    "typicality",
    "complexity",
    "combined",
    "last_level",
    "density_of_states",
)
PICTURE_SUFFIXES = {".gif", ".jpeg", ".jpg", ".png", ".webp"}
MAX_COUNT = 10**9
MAX_WIDTH = 10**6  # characters of a line that is not printed on a terminal
HELP_SECTIONS = {
    "Train": ("train", "resume", "runs", "models", "data"),
    "Draw": ("sample", "interpolate", "complete", "edit", "chain"),
    "Evaluate": ("evaluate", "score", "report"),
    "Compress": ("compress", "decompress"),
    "Share": ("export", "push", "explore", "bot", "shell-completion"),
}
TRAIN_HELP = """\
Usage: flowgen train [OPTION]... [OVERRIDE]...

  Train a model. GROUP=NAME chooses options, KEY=VALUE changes settings:

    flowgen train model=glow data=celeba trainer.minutes=60
    flowgen train experiment=demo
    flowgen train -m model.width=64,128 seed=1,2

Options:
  -m, --multirun      Train one run for each combination of the listed values.
  --cfg job           Print the configuration and exit.
  -h, --help [GROUP]  Show all settings, or those of one group such as model,
                      trainer or model=rbm.

"""


def finite_number(limits: str, minimum: float = -math.inf) -> Callable[[str], float]:
    """Return a parser of finite numbers of at least `minimum`; errors print the `limits`."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            number = float(text)
            if math.isfinite(number) and number >= minimum:
                return number
        raise click.BadParameter(f"{text!r} is not valid: give a number{limits}")

    return parse


def whole_number(low: int = 1, high: int = MAX_COUNT) -> Callable[[str], int]:
    """Return a parser of whole numbers; unlike click.IntRange, help does not show the limits."""

    def parse(text: str) -> int:
        with suppress(ValueError):
            number = int(text)
            if low <= number <= high:
                return number
        raise click.BadParameter(f"{text!r} is not valid: give a whole number from {low} to {high}")

    return parse


def whole_number_option(
    name: str, default: int | None, text: str, low: int = 1, high: int = MAX_COUNT
) -> Callable[[Any], Any]:
    """Return an option for a whole number, whose help shows the default, if any.

    Args:
        name: Name, as in "--count".
        default: Default, or None.
        text: Help text.
        low: Smallest value.
        high: Largest value.
    """
    return click.option(
        name,
        type=whole_number(low, high),
        metavar="N",
        default=default,
        show_default=default is not None,
        help=text,
    )


def check_output(path: Path | None, suffixes: Collection[str], kind: str) -> Path | None:
    """Check the name of an output file before any work is done.

    Args:
        path: The file, or None for the default.
        suffixes: Suffixes of its name that are allowed.
        kind: Kind of file, for the error message.
    """
    if path is None:
        return None
    if path.suffix.lower() not in suffixes:
        *others, last = sorted(suffixes)
        endings = f"{', '.join(others)} or {last}" if others else last
        raise click.UsageError(f"{path} is not the path of {kind}: it must end in {endings}")
    try:
        check_folder_of(path)
        check(not path.is_dir(), f"{path} is a folder: choose another path")
    except UserError as error:
        raise click.UsageError(str(error)) from error
    return path


def complete_override(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete `model=gl` to `model=glow` and `trainer.st` to `trainer.steps=`."""
    group, equals, _ = incomplete.partition("=")
    if equals:
        candidates = [f"{group}={name}" for name in group_options(group)]
    else:
        candidates = [f"{name}=" for name in setting_names()]
    return [candidate for candidate in candidates if candidate.startswith(incomplete)]


def complete_eval_override(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[str]:
    """Complete `sam` to `samples=`: a setting of an evaluation."""
    section = "evaluation."
    candidates = [
        f"{name.removeprefix(section)}=" for name in setting_names() if name.startswith(section)
    ]
    return [candidate for candidate in candidates if candidate.startswith(incomplete)]


def complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a run or of a model in the zoo."""
    from flowgen.config.runs import OUTPUTS, list_runs
    from flowgen.training.checkpoint import zoo

    folders = [run.folder for run in list_runs()]
    if not incomplete.startswith(OUTPUTS.name):
        folders = [folder.relative_to(OUTPUTS) for folder in folders]
    candidates = [*map(str, folders), *zoo()]
    return [candidate for candidate in candidates if candidate.startswith(incomplete)]


def import_command(module: str, needs_compute: bool = False) -> Any:
    """Import the module of a command when it runs.

    Args:
        module: Its name.
        needs_compute: Whether it computes with a model, on all free cores.
    """
    setup_logging()
    if needs_compute:
        use_threads()
    return import_module(f"flowgen.{module}")


run_argument = click.argument("run", metavar="RUN", shell_complete=complete_run)
optional_run_argument = click.argument(
    "run", metavar="[RUN]", required=False, shell_complete=complete_run
)
overrides_argument = click.argument(
    "overrides", nargs=-1, metavar="[OVERRIDE]...", shell_complete=complete_override
)
run_option = click.option(
    "--run",
    metavar="RUN",
    shell_complete=complete_run,
    help="Run folder, checkpoint file, name under outputs/, zoo/NAME or hf:OWNER/NAME.",
)
seed_option = whole_number_option("--seed", 0, "Random seed.", low=0, high=2**63 - 1)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Device: auto, cpu or cuda.",
)
out_option = click.option(
    "--out",
    type=PATH,
    metavar="FILE",
    callback=lambda ctx, param, path: check_output(path, PICTURE_SUFFIXES, "an image"),
    help="Output file; by default in the folder of the run.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


class GroupedCommands(click.Group):
    """A group whose help lists the commands in sections, with complete summaries."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for title, names in HELP_SECTIONS.items():
            rows = [(name.ljust(width), self.commands[name].short_help or "") for name in names]
            with formatter.section(title):
                formatter.write_dl(rows)


@click.group(
    cls=GroupedCommands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="flowgen", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")  # handled by `main`
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Train, evaluate and use likelihood-based image models.

    RUN is the folder of a run, a checkpoint file, a name under outputs/, an included model
    (zoo/NAME) or a model of the Hugging Face Hub (hf:OWNER/NAME). Without it, a command uses the
    newest run that fits. `flowgen COMMAND --help` shows the options of a command.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command(add_help_option=False, short_help="Train a model on images.")
@overrides_argument
@click.option("-m", "--multirun", is_flag=True, help="Train all combinations of listed values.")
@click.option("--cfg", type=click.Choice(["job"]), help="Print the configuration and exit.")
@click.option("-h", "--help", "show_help", is_flag=True, help="Show the settings.")
def train(overrides: tuple[str, ...], multirun: bool, cfg: str | None, show_help: bool) -> None:
    """Train a model: GROUP=NAME chooses options, KEY=VALUE changes settings."""
    if show_help:
        width = min(max(shutil.get_terminal_size().columns, 80), 120)
        text = settings_help(overrides, width)
        click.echo(text if overrides else TRAIN_HELP + text)
    elif cfg:
        if multirun:
            raise click.UsageError("--cfg job shows one configuration: leave -m out")
        click.echo(
            import_command("commands.train").config_text(overrides=list(overrides)), nl=False
        )
    else:
        import_command("commands.train").train(overrides=list(overrides), multirun=multirun)


@cli.command(short_help="Continue a run from its last checkpoint.")
@run_argument
@overrides_argument
def resume(run: str, overrides: tuple[str, ...]) -> None:
    """Continue RUN from its last valid checkpoint, or from a checkpoint file.

    It keeps its own configuration, except for overrides such as trainer.minutes=60.
    """
    import_command("commands.train").resume(run=run, overrides=list(overrides))


@cli.command(short_help="List runs and the included models.")
def runs() -> None:
    """List the runs under outputs/, the newest first, and the included models.

    The result is the test metric of a finished run, or the best validation metric until then.
    """
    rows = list(import_command("commands.runs").runs())
    if all(row.name.startswith("zoo/") for row in rows):
        click.echo("no runs under outputs/ yet: train one with `flowgen train`")
    echo_table(("run", "model", "data", "step", "likelihood", "result"), rows)


@cli.command(short_help="List the models that can be trained.")
@json_option
def models(as_json: bool) -> None:
    """List the models that can be trained with model=NAME, with their papers.

    The likelihood that a model reports is exact, a bound, an estimate, or none.
    """
    echo_list(("model", "likelihood", "description"), import_command("api").list_models(), as_json)


@cli.command(short_help="List the data sets that can be trained on.")
@json_option
def data(as_json: bool) -> None:
    """List the data sets of data=NAME and whether they are present.

    flowgen looks for them in the folder of the environment variable FLOWGEN_DATA, or in data/.
    """
    echo_list(
        ("data", "availability", "description"), import_command("api").list_datasets(), as_json
    )


def echo_list(titles: Sequence[str], rows: Sequence[Any], as_json: bool) -> None:
    """Print named tuples as JSON, or as a table with the description and its source last."""
    if as_json:
        click.echo(json.dumps([row._asdict() for row in rows]))
        return
    table = [
        (name, kind, f"{description} ({source})" if source else description)
        for name, description, source, kind in rows
    ]
    echo_table(titles, table)


def echo_table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table that fits the terminal; without a terminal, each row is one line."""
    width = shutil.get_terminal_size(fallback=(MAX_WIDTH, 0)).columns
    for line in format_table([titles, *rows], width):
        click.echo(line)


@cli.command(short_help="Draw a grid of samples.")
@run_option
@click.option(
    "--temperature",
    "temperatures",
    type=finite_number(" of at least 0, such as 0.7", minimum=0),
    multiple=True,
    metavar="T",
    help="May be repeated; by default that of the run.",
)
@whole_number_option(
    "--count", None, "Samples per temperature; by default 32 images or 10,000 points."
)
@seed_option
@whole_number_option(
    "--label",
    None,
    "Class of a class-conditional model; by default all classes in turn.",
    low=0,
)
@click.option(
    "--guidance",
    type=finite_number(" of at least 0", minimum=0),
    metavar="W",
    help="Weight of classifier-free guidance (class-conditional TarFlow).",
)
@click.option(
    "--jacobi", is_flag=True, help="Sample all patches in parallel by Jacobi iteration (TarFlow)."
)
@click.option(
    "--sampler", type=click.Choice(SAMPLERS), help="Sampler of an RBM; by default tempering."
)
@whole_number_option("--steps", None, "Steps of this sampler; by default 500.")
@device_option
@click.option(
    "--out",
    type=PATH,
    metavar="FILE|FILE.zip",
    callback=lambda ctx, param, path: check_output(path, {*PICTURE_SUFFIXES, ".zip"}, "an image"),
    help="Output file, by default in the folder of the run; a zip has one file per sample.",
)
def sample(**options: Any) -> None:
    """Draw a grid of samples, one block per temperature, sorted by log-probability if known."""
    click.echo(import_command("commands.sample", needs_compute=True).sample(**options))


@cli.command(short_help="Interpolate between two images.")
@click.argument("first", type=PATH, metavar="IMG1")
@click.argument("second", type=PATH, metavar="IMG2")
@run_option
@whole_number_option("--steps", 9, "Images in a row, including both ends.", low=2, high=10**6)
@click.option("--spherical", is_flag=True, help="Follow a great circle instead of a line.")
@device_option
@out_option
def interpolate(**options: Any) -> None:
    """Interpolate between two images in the latent space, and in pixels for comparison.

    FILE.gif is an animation.
    """
    click.echo(import_command("commands.interpolate", needs_compute=True).interpolate(**options))


@cli.command(short_help="Fill in the missing part of an image.")
@click.argument("image", type=PATH, metavar="IMG")
@click.option(
    "--known",
    required=True,
    metavar="SIDE|border|random:PERCENT|grayscale|downsample:FACTOR|MASK",
    help="Known part: left, right, top, bottom, border, random:PERCENT of the pixels, the "
    "grayscale or downsampled image, or a mask image that is white at known pixels.",
)
@click.option(
    "--sampler",
    multiple=True,
    metavar="NAME",
    shell_complete=lambda ctx, param, incomplete: [
        name for name in (*SAMPLERS, "hmc", "metropolis") if name.startswith(incomplete)
    ],
    help="gibbs, tempering or mean-field for RBMs, hmc for flows, metropolis for PixelCNNs. May be "
    "repeated; by default all.",
)
@run_option
@whole_number_option(
    "--steps",
    None,
    "Steps of the sampler; by default 1000 (RBM), 400 (flow) or 100 (PixelCNN); with --log-prob "
    "1000, 100 or 256.",
)
@click.option(
    "--log-prob",
    is_flag=True,
    help="Print log P(unknown | known) of the pixels in IMG instead of drawing them.",
)
@seed_option
@device_option
@out_option
def complete(log_prob: bool, **options: Any) -> None:
    """Fill in the missing part of an image: sample unknown pixels given the known ones."""
    if log_prob:
        if options.pop("sampler") or options.pop("out"):
            raise click.UsageError("--log-prob draws no picture: leave out --sampler and --out")
        text = import_command("commands.complete", needs_compute=True).log_prob(**options)
        click.echo(text)
    else:
        click.echo(import_command("commands.complete", needs_compute=True).complete(**options))


@cli.command(short_help="Change attributes of images, such as a smile.")
@click.argument("paths", nargs=-1, required=True, type=PATH, metavar="IMG...")
@click.option(
    "--attribute",
    "attributes",
    multiple=True,
    required=True,
    metavar="NAME",
    help="Attribute of CelebA, column of --labels, or class such as 8. May be repeated.",
)
@click.option(
    "--amount",
    "amounts",
    multiple=True,
    type=finite_number(", such as 1 or -0.5"),
    metavar="A",
    help="1 is the mean change from images without it to images with it; by default -2 to 2.",
)
@run_option
@click.option(
    "--labels",
    "table",
    type=PATH,
    metavar="FILE.csv",
    help="Your own attributes: one line per image with its file name and numbers.",
)
@click.option(
    "--direction",
    type=click.Choice(DIRECTIONS),
    default="ridge",
    show_default=True,
    help="Latent direction: ridge regression on all attributes, or difference of means.",
)
@whole_number_option("--count", 10_000, "Labeled images to compute the directions from.", low=2)
@device_option
@out_option
def edit(**options: Any) -> None:
    """Move images along attributes in the latent space.

    The result is a strip of amounts or, with --amount, each image next to its edit. FILE.gif is
    an animation.
    """
    click.echo(import_command("commands.edit", needs_compute=True).edit(**options))


@cli.command(short_help="Animate the Markov chains of an RBM.")
@click.option(
    "--sampler",
    type=click.Choice(SAMPLERS),
    default="tempering",
    show_default=True,
    help="Sampler of the chains.",
)
@run_option
@whole_number_option("--count", 64, "Number of chains.")
@whole_number_option("--frames", 100, "Number of frames.")
@whole_number_option("--steps", 1, "Steps of the sampler per frame.")
@seed_option
@device_option
@click.option(
    "--out",
    type=PATH,
    metavar="FILE.gif",
    callback=lambda ctx, param, path: check_output(path, {".gif"}, "an animation"),
    help="Output file; by default in the folder of the run.",
)
def chain(**options: Any) -> None:
    """Animate the Markov chains of an RBM, which start from white noise."""
    click.echo(import_command("commands.sample", needs_compute=True).chain(**options))


@cli.command(short_help="Evaluate a model on the test images.")
@run_option
@json_option
@device_option
@click.argument(
    "overrides", nargs=-1, metavar="[OVERRIDE]...", shell_complete=complete_eval_override
)
def evaluate(run: str | None, as_json: bool, device: str, overrides: tuple[str, ...]) -> None:
    """Evaluate a model on the test split.

    An OVERRIDE changes a setting of the evaluation, such as num_importance_samples=8.
    `flowgen evaluate samples=1000` also compares 1000 samples with as many test images, next to the
    same values for training images. `flowgen train --help evaluation` lists the settings.
    """
    report = import_command("api", needs_compute=True).evaluate(run, *overrides, device=device)
    click.echo(json.dumps(report.row()) if as_json else report)


@cli.command(short_help="Score images and find unusual ones.")
@click.argument("paths", nargs=-1, type=PATH, metavar="[IMG|FOLDER|ZIP]...")
@run_option
@click.option(
    "--ood",
    multiple=True,
    metavar="data=NAME|RUN",
    shell_complete=complete_override,
    help="Compare with the test images of other data, in both directions: one run, or data=NAME "
    "and, each after its own --ood, its settings such as data.root=FOLDER.",
)
@click.option(
    "--score",
    type=click.Choice(OOD_SCORES),
    metavar="NAME",
    help=f"Score that ranks the images by anomaly: {', '.join(OOD_SCORES)}.",
)
@whole_number_option("--count", 1000, "Validation images, and test images of --ood.", low=4)
@click.option(
    "--csv", "table", type=PATH, metavar="FILE", help="Write all scores of all images to this file."
)
@seed_option
@device_option
@out_option
def score(paths: tuple[Path, ...], ood: tuple[str, ...], **options: Any) -> None:
    """Score images: bits/dim, percentile, anomaly scores and their p-values.

    The percentile is the percentage of validation images that are more likely than the image.
    """
    if not paths and not ood:
        raise click.UsageError(
            "nothing to score: give images, a folder or a zip, or compare data with --ood data=NAME"
        )
    for line in import_command("commands.score", needs_compute=True).score(
        paths=paths, ood=ood, **options
    ):
        click.echo(line)


@cli.command(short_help="Compare runs on one HTML page.")
@click.argument("names", nargs=-1, required=True, metavar="RUN...", shell_complete=complete_run)
@click.option(
    "--out",
    type=PATH,
    metavar="FILE.html",
    callback=lambda ctx, param, path: check_output(path, {".htm", ".html"}, "a page"),
    help="Output file; by default report.html here, or in the folder of a single run.",
)
def report(names: tuple[str, ...], out: Path | None) -> None:
    """Compare runs, or all runs in a folder, on one page: curves, samples and settings."""
    click.echo(import_command("commands.report").report(names=list(names), out=out))


@cli.command(short_help="Compress images without loss.")
@click.argument("paths", nargs=-1, type=PATH, metavar="[IMG|FOLDER|ZIP]...")
@run_option
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    help="Compress this split of the data of the run.",
)
@whole_number_option("--count", None, "Maximum number of images; of a split, chosen by hash.")
@click.option(
    "--prepared",
    is_flag=True,
    help="Accept images that must be resized or reduced for the model, and keep the result only.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Decode each batch again and compare it, which adds 50 to 95 % to the time.",
)
@whole_number_option(
    "--annealing-steps",
    1000,
    "Annealing steps of an RBM: more steps make a shorter file and take more time.",
    high=10**6,
)
@click.option("--overwrite", is_flag=True, help="Replace FILE.")
@json_option
@click.option("--out", type=PATH, required=True, metavar="FILE", help="Output file.")
def compress(as_json: bool, **options: Any) -> None:
    """Compress images into one file, from which `decompress` restores every pixel.

    The size of the file proves the bits/dim of the model. Images must have the size, channels and
    bits of the model, unless --prepared is given.
    """
    report = import_command("commands.compress", needs_compute=True).compress(**options)
    click.echo(json.dumps(report.row()) if as_json else report)


@cli.command(short_help="Restore compressed images.")
@click.argument("file", type=PATH, metavar="FILE")
@run_option
@click.option("--overwrite", is_flag=True, help="Replace images in FOLDER.")
@click.option("--out", type=PATH, required=True, metavar="FOLDER", help="Output folder.")
def decompress(**options: Any) -> None:
    """Restore the images of FILE as PNG files with their original names or numbers.

    RUN is the model that compressed them; by default the one that FILE names, if it is in the zoo
    or under outputs/. A model with fewer than 8 bits restores its own pixel values, scaled to 8
    bits.
    """
    click.echo(import_command("commands.compress", needs_compute=True).decompress(**options))


@cli.command(short_help="Export a model to one file.")
@run_argument
@click.argument("path", type=PATH, metavar="FILE.safetensors")
def export(run: str, path: Path) -> None:
    """Export the model of RUN to a file that --run reads, with a model card and samples."""
    for file in import_command("commands.export", needs_compute=True).export(run=run, path=path):
        click.echo(file)


@cli.command(short_help="Upload a model to the Hugging Face Hub.")
@run_argument
@click.argument("repository", metavar="OWNER/NAME")
@click.option(
    "--license",
    "license_name",
    metavar="NAME",
    help="License in the spelling of the Hub, such as cc-by-4.0, if flowgen does not know it.",
)
@click.option("--private", is_flag=True, help="Create a private repository.")
def push(**options: Any) -> None:
    """Upload the model of RUN with a model card and samples; --run hf:OWNER/NAME reads it."""
    for line in import_command("commands.export", needs_compute=True).push(**options):
        click.echo(line)


@cli.command(short_help="Use a model in the browser.")
@optional_run_argument
@click.option(
    "--port",
    type=whole_number(0, 65535),
    default=8700,
    show_default=True,
    metavar="N",
    help="Port; 0 chooses a free one.",
)
@device_option
def explore(**options: Any) -> None:
    """Use a model on a page at 127.0.0.1: sample, interpolate, edit, complete and score."""
    import_command("serving.web.app", needs_compute=True).explore(echo=click.echo, **options)


@cli.command(short_help="Run a Telegram bot that uses a model.")
@optional_run_argument
@click.option(
    "--token-file",
    type=PATH,
    metavar="FILE",
    help="File with the bot's token and mode 600; by default the variable FLOWGEN_BOT_TOKEN.",
)
@click.option(
    "--allow-chat",
    "allowed_chats",
    type=int,
    multiple=True,
    metavar="CHAT",
    help="Answer only in this chat. May be repeated.",
)
@click.option("--api-url", metavar="URL", help="Server of the Bot API; by default Telegram's.")
@device_option
def bot(**options: Any) -> None:
    """Chat with a model on Telegram: /generate, /walk with two photos, /score with one."""
    if not find_spec("telegram"):
        raise UserError(
            "the bot needs the package python-telegram-bot: pip install python-telegram-bot"
        )
    import_command("serving.telegram", needs_compute=True).bot(echo=click.echo, **options)


@cli.command("shell-completion", short_help="Complete commands with the Tab key.")
@click.argument("action", type=click.Choice(["install"]), metavar="install")
@click.option("--shell", type=click.Choice(SHELLS), help="By default that of the variable SHELL.")
def shell_completion(action: str, shell: str | None) -> None:
    """Install completion of commands, options, settings and runs with the Tab key.

    It writes a script, and for bash and zsh two lines in ~/.bashrc or ~/.zshrc. Running it again
    changes nothing.
    """
    for line in import_command("commands.shell_completion").install(shell=shell):
        click.echo(line)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Every error is one line on standard error and an exit status.

    Args:
        arguments: Words after `flowgen`; by default those of this process.
    """
    prepare_threads()
    for name in ("stdout", "stderr"):  # None if they are closed, as for a daemon
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if "_FLOWGEN_COMPLETE" in os.environ:
        import_module("flowgen.commands.shell_completion")  # registers completion for bash
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    if not debug:
        # Errors of TensorBoard's thread are raised here too, and warnings of libraries about a
        # file do not help its user.
        threading.excepthook = lambda failure: None
        logging.raiseExceptions = False
        logging.lastResort = None
        warnings.simplefilter("ignore")
    try:
        cli.main(
            [word for word in arguments if word != "--debug"],
            prog_name="flowgen",
            standalone_mode=False,
        )
    except (KeyboardInterrupt, click.Abort):
        _exit("interrupted", 130)
    except click.UsageError as error:
        name = error.ctx.command_path if error.ctx else "flowgen"
        _exit(f"{error.format_message().rstrip('.')} (see `{name} --help`)", 2)
    except SystemExit:
        if type(sys.stdout).__name__.endswith("PacifyFlushWrapper"):
            sys.exit(0)  # a closed pipe, as in `| head`, for which click exits with 1
        raise
    except Exception as error:
        if debug:
            raise
        _exit(user_message(error), 1)


def _exit(message: str, status: int) -> NoReturn:
    print(f"flowgen: {escape_control(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(status)
