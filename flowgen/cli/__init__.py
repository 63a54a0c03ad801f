"""The command line. Nothing here, nor at the top of what it imports, imports torch: `flowgen --help` must answer at once."""

import logging
import sys
import threading
import warnings

import click

from flowgen.cli.drawing import chain, complete, edit, interpolate, sample
from flowgen.cli.judging import evaluate, report, runs, score
from flowgen.cli.serving import bot, explore
from flowgen.cli.training import export, push, resume, train
from flowgen.messages import one_sentence, printable
from flowgen.training.threads import prepare_threads

COMMANDS = (train, resume, sample, interpolate, edit, complete, chain, evaluate, score, explore, bot, report, runs, export, push)


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
        logging.lastResort = None  # what Python, torch and Pillow think of a file is no business of the user's
        warnings.simplefilter("ignore")
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
    print(f"flowgen: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(status)
