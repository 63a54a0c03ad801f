"""The bot's token, with which anyone could speak in its name: where it comes from, and how it stays out of every output."""

import logging
import os
import re
import sys
from pathlib import Path

from flowgen.errors import FlowgenError

VARIABLE = "FLOWGEN_BOT_TOKEN"
LONGEST = 300  # characters of a message


def read_token(path: Path | None) -> str:
    """From a file that nobody else may read, else from the environment. Raises FlowgenError, in which the token is not."""
    if path is None:
        token, source = os.environ.get(VARIABLE, ""), VARIABLE
        if not token:
            raise FlowgenError(
                f"the bot has no token: get one from Telegram's @BotFather, and set {VARIABLE} or name its file by --token-file"
            )
    else:
        if not path.is_file():
            raise FlowgenError(f"{path} is no file: name the one that holds the bot's token")
        if path.stat().st_mode & 0o077:
            raise FlowgenError(f"{path} may be read by others: `chmod 600 {path}` first")
        token, source = path.read_text(errors="replace"), str(path)
    token = token.strip()
    if not re.fullmatch(r"\d+:[\w-]+", token):
        raise FlowgenError(f"what {source} holds is no token: it should be digits, a colon, and letters")
    return token


class Masked(logging.Formatter):
    """Messages in one line, without tracebacks and without the token, which is part of every address that is asked."""

    def __init__(self, token: str):
        super().__init__()
        self.token = token

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(record.getMessage().replace(self.token, "TOKEN").split())[:LONGEST]


def mask_logs(token: str) -> None:
    """Keep the token out of whatever is logged in this process, and the addresses that httpx logs altogether."""
    screen = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(screen)  # else what has no handler would go to standard error as it is
    for handler in (screen, *logging.getLogger("flowgen").handlers):
        handler.setFormatter(Masked(token))
    for library in ("httpx", "httpcore", "telegram"):
        logging.getLogger(library).setLevel(logging.WARNING)
