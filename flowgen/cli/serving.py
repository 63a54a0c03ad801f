"""Commands that serve a trained model until they are interrupted: explore, bot."""

from importlib.util import find_spec
from typing import Any

import click

from flowgen.cli.arguments import PATH, command, complete_run, device_option
from flowgen.errors import FlowgenError


@click.command()
@click.argument("name", metavar="[RUN]", required=False, shell_complete=complete_run)
@click.option("--port", type=click.IntRange(0, 65535), default=8700, show_default=True, metavar="N", help="0 is any that is free.")
@device_option
def explore(name: str | None, port: int, device: str) -> None:
    """Play with a model on a page at 127.0.0.1: sample, mix, walk, complete, score."""
    command("server", computes=True, room="page").explore(name=name, port=port, device=device, say=click.echo)


@click.command()
@click.argument("name", metavar="[RUN]", required=False, shell_complete=complete_run)
@click.option("--token-file", type=PATH, metavar="FILE", help="Holds the bot's token, mode 600; by default FLOWGEN_BOT_TOKEN does.")
@click.option("--allow", "allowed", type=int, multiple=True, metavar="CHAT", help="Talk to this chat alone; may be repeated.")
@click.option("--api", metavar="URL", help="A server of the Bot API of your own; by default Telegram's.")
@device_option
def bot(**options: Any) -> None:
    """Chat with a model on Telegram: /generate, /walk with two photos, /score with one."""
    if not find_spec("telegram"):
        raise FlowgenError("the bot needs python-telegram-bot: pip install 'flowgen[bot]'")
    command("polling", computes=True, room="bot").bot(say=click.echo, **options)
