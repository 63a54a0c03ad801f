"""The bot's token, with which anyone could speak in its name: where it comes from, and how it stays out of every output."""

import asyncio
import logging
import math
import os
import random
import re
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from telegram import Message, Update
from telegram.error import InvalidToken, NetworkError, TelegramError
from telegram.ext import ApplicationBuilder, ContextTypes, MessageHandler, filters

from flowgen.serving.session import ModelSession, exit_process
from flowgen.utils import rendering
from flowgen.utils.console import user_message
from flowgen.utils.errors import UserError

VARIABLE = "FLOWGEN_BOT_TOKEN"
LONGEST = 300  # characters of a message


def read_token(path: Path | None) -> str:
    """From a file that nobody else may read, else from the environment. Raises FlowgenError, in which the token is not."""
    if path is None:
        token, source = os.environ.get(VARIABLE, ""), VARIABLE
        if not token:
            raise UserError(
                f"the bot has no token: get one from Telegram's @BotFather, and set {VARIABLE} or name its file by --token-file"
            )
    else:
        if not path.is_file():
            raise UserError(f"{path} is no file: name the one that holds the bot's token")
        if path.stat().st_mode & 0o077:
            raise UserError(f"{path} may be read by others: `chmod 600 {path}` first")
        token, source = path.read_text(errors="replace"), str(path)
    token = token.strip()
    if not re.fullmatch(r"\d+:[\w-]+", token):
        raise UserError(
            f"what {source} holds is no token: it should be digits, a colon, and letters"
        )
    return token


class RedactingFormatter(logging.Formatter):
    """Messages in one line, without tracebacks and without the token, which is part of every address that is asked."""

    def __init__(self, token: str):
        super().__init__()
        self.token = token

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(record.getMessage().replace(self.token, "TOKEN").split())[:LONGEST]


def mask_logs(token: str) -> None:
    """Keep the token out of whatever is logged in this process, and the addresses that httpx logs altogether."""
    screen = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(
        screen
    )  # else what has no handler would go to standard error as it is
    for handler in (screen, *logging.getLogger("flowgen").handlers):
        handler.setFormatter(RedactingFormatter(token))
    for library in ("httpx", "httpcore", "telegram"):
        logging.getLogger(library).setLevel(logging.WARNING)


HOTTEST = 1.0
MOST_BYTES = 8 * 2**20  # of a photo
STEPS, SIDE = 9, 256
NEEDS = {"walk": 2, "score": 1}  # photos
HELP = f"""/generate sends a picture at temperature 1.
/generate 0.678 sends one at that temperature, from 0 to {HOTTEST:g}: low is typical, high is varied.
/walk and two photos: the way from one to the other, through the latents and through the pixels.
/score and a photo: how likely it is."""
BUSY = "One thing at a time: I am still at your last request."
Work = Callable[[], Awaitable[None]]
log = logging.getLogger("flowgen")


@dataclass
class Request:
    """What a chat wants to know of photos, and the file ids of those that it has sent."""

    about: str
    photos: list[str] = field(default_factory=list)


class Chat:
    """The bot's side of every chat; one request of a chat is worked on at a time, and only `allowed` chats are listened to, if any."""

    def __init__(self, answers: ModelSession, allowed: tuple[int, ...] = ()):
        self.answers, self.allowed = answers, allowed
        self.requests: dict[int, Request] = {}
        self.busy: set[int] = set()

    async def hear(self, update: Update, context: ContextTypes.DEFAULT_TYPE) -> None:
        """Any message."""
        message = update.message
        if message is None:
            return
        if self.allowed and message.chat_id not in self.allowed:
            await message.reply_text(
                f"This bot talks to others only. Your chat is {message.chat_id}."
            )
            return
        answer = self._answer(message)
        if isinstance(answer, str):
            await message.reply_text(answer)
        elif answer is not None and message.chat_id in self.busy:
            await message.reply_text(BUSY)
        elif answer is not None:
            self.busy.add(message.chat_id)
            try:
                await answer()
            except UserError as error:
                await message.reply_text(f"Sorry: {error}.")
            finally:
                self.busy.discard(message.chat_id)

    async def stumble(self, update: object, context: ContextTypes.DEFAULT_TYPE) -> None:
        """After a fault of ours, or of the network."""
        error = context.error
        if isinstance(error, Exception) and not isinstance(error, TelegramError):
            log.error("%s", user_message(error))
        else:
            log.error("Telegram: %s", error)
        if isinstance(update, Update) and update.message is not None:
            await update.message.reply_text("Sorry, that went wrong here. Try again.")

    def _answer(self, message: Message) -> str | Work | None:
        """What to say at once, or work to do; nothing while a photo of an album is still to come."""
        words = (message.text or message.caption or "").split()
        name = (
            words[0].partition("@")[0].removeprefix("/")
            if words and words[0].startswith("/")
            else ""
        )
        if name in NEEDS:
            self.requests[message.chat_id] = Request(name)
        photo = _photo(message)
        if photo is not None:
            return self._with(photo, message)
        if name == "generate":
            temperature = _temperature(words[1]) if len(words) > 1 else HOTTEST
            if temperature is None or len(words) > 2:
                return f"A temperature is a number from 0 to {HOTTEST:g} with a point, as in /generate 0.678"
            return lambda: self._generate(message, temperature)
        said = {
            "start": f"Hello! I draw pictures with {self.answers.name}.\n{HELP}",
            "help": HELP,
            "walk": "Send me two photos, one after the other.",
            "score": "Send me a photo.",
        }
        return said.get(name, f"I do not understand that.\n{HELP}")

    def _with(self, photo: tuple[str, int], message: Message) -> str | Work | None:
        request = self.requests.get(message.chat_id)
        if request is None:
            return "What shall I do with it? Say /score or /walk first."
        if photo[1] > MOST_BYTES:
            return f"A photo may have {MOST_BYTES // 2**20} MiB at most."
        last = len(request.photos) + 1 == NEEDS[request.about]
        if last and message.chat_id in self.busy:  # the request stays as it is
            return f"{BUSY} Send me this photo again after that."
        request.photos.append(photo[0])
        if not last:
            return None if message.media_group_id else "And the other one?"
        del self.requests[message.chat_id]
        return lambda: self._look(message, request)

    async def _generate(self, message: Message, temperature: float) -> None:
        seed = random.randrange(2**31)
        images = await asyncio.to_thread(
            self.answers.sample, count=1, temperature=temperature, seed=seed
        )
        figures = await asyncio.to_thread(self._figures, images)
        picture = rendering.image_grid(images, self.answers.model.bits, 1, SIDE)
        await message.reply_photo(
            rendering.to_png(picture),
            caption=f"Temperature {temperature:g}, seed {seed}. {figures}",
        )

    async def _look(self, message: Message, request: Request) -> None:
        files = [
            await (await message.get_bot().get_file(photo)).download_as_bytearray()
            for photo in request.photos
        ]
        images = [await asyncio.to_thread(self.answers.read, bytes(file)) for file in files]
        if request.about == "score":
            await message.reply_text(await asyncio.to_thread(self._figures, images[0]))
            return
        latent, pixels = await asyncio.to_thread(
            self.answers.walk, images[0], images[1], STEPS, False
        )
        rows = [("through the latents", latent), ("through the pixels", pixels)]
        await message.reply_photo(
            rendering.to_png(rendering.titled_grids(rows, self.answers.model.bits, STEPS))
        )

    def _figures(self, images: torch.Tensor) -> str:
        value, percentile, p = self.answers.figures(images)
        said = f"{value:.3f} {self.answers.unit}"
        if percentile is None:
            return f"{said}."
        return f"{said}, percentile {percentile:.0f}: so many of a hundred validation images are likelier. p = {p:.3f}."


def _photo(message: Message) -> tuple[str, int] | None:
    """The file of the largest copy of a photo, or of an image that was sent as a file, and its size."""
    sizes = [message.document] if message.document else message.photo
    return (sizes[-1].file_id, sizes[-1].file_size or 0) if sizes else None


def _temperature(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return number if math.isfinite(number) and 0 <= number <= HOTTEST else None


AT_ONCE = 16  # chats


def bot(
    *,
    name: str | None,
    token_file: Path | None,
    allowed: tuple[int, ...],
    api: str | None,
    device: str,
    say: Callable[[str], None],
) -> None:
    """Answer until interrupted; `api` is a server of the Bot API other than Telegram's own. Raises FlowgenError."""
    token = read_token(token_file)
    answers = ModelSession(name, device)
    mask_logs(token)

    async def begin(
        _: object,
    ) -> (
        None
    ):  # once Telegram has taken the token: a thread at work would abort a process that ends before
        threading.Thread(target=answers.score_validation_images, daemon=True).start()

    builder = ApplicationBuilder().token(token).concurrent_updates(AT_ONCE).post_init(begin)
    if api is not None:
        builder = builder.base_url(f"{api.rstrip('/')}/bot").base_file_url(
            f"{api.rstrip('/')}/file/bot"
        )
    application = builder.build()
    chat = Chat(answers, allowed)
    application.add_handler(MessageHandler(filters.ALL, chat.hear))
    application.add_error_handler(chat.stumble)
    say(f"{answers.name} chats until Ctrl-C")
    try:
        application.run_polling(allowed_updates=["message"])
    except InvalidToken:
        raise UserError(
            "Telegram refuses the token: get another from @BotFather"
        ) from None  # its own sentence holds the token
    except NetworkError as error:
        raise UserError(
            f"Telegram cannot be reached ({type(error).__name__}): try again later"
        ) from None
    except Exception as error:
        raise UserError(user_message(error).replace(token, "TOKEN")) from None
    exit_process()
