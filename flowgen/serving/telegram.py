"""The Telegram bot of `flowgen bot`.

Whoever knows the token of a bot can act as the bot, so the token must not appear in any output.
"""

import asyncio
import logging
import os
import random
import re
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from telegram import Document, Message, PhotoSize, Update
from telegram.error import InvalidToken, NetworkError, TelegramError
from telegram.ext import Application, ApplicationBuilder, ContextTypes, MessageHandler, filters
from torch import Tensor

from flowgen.serving.session import ModelSession, exit_process
from flowgen.utils import rendering
from flowgen.utils.console import log, user_message
from flowgen.utils.errors import UserError

TOKEN_VARIABLE = "FLOWGEN_BOT_TOKEN"
MAX_LOG_CHARACTERS = 300  # per log message
MAX_TEMPERATURE = 1.0
MAX_PHOTO_BYTES = 8 * 2**20
MAX_CONCURRENT_UPDATES = 16
INTERPOLATION_STEPS = 9
SAMPLE_SIDE = 256  # pixels
PHOTOS_NEEDED = {"walk": 2, "score": 1}
HELP = f"""/generate sends an image drawn at temperature 1.
/generate 0.678 sends an image drawn at that temperature, from 0 to {MAX_TEMPERATURE:g}. \
Low temperatures give typical images, high temperatures give varied images.
/walk and two photos: interpolates from one to the other, through the latents and the pixels.
/score and a photo: tells how likely the photo is under the model."""
BUSY = "I am still working on your last request."
Task = Callable[[], Awaitable[None]]


def read_token(path: Path | None) -> str:
    """Read the token of the bot.

    Args:
        path: A file that only its owner may read. None means the environment variable
            FLOWGEN_BOT_TOKEN.

    Raises:
        UserError: If there is no valid token. The message does not contain the token.
    """
    if path is None and not os.environ.get(TOKEN_VARIABLE):
        raise UserError(
            "the bot needs a token: get one from @BotFather on Telegram, and set "
            f"{TOKEN_VARIABLE} or pass the file that contains it with --token-file"
        )
    if path is not None and not path.is_file():
        raise UserError(f"{path} is not a file: pass the file that contains the bot's token")
    if path is not None and path.stat().st_mode & 0o077:
        raise UserError(f"other users can read {path}: run `chmod 600 {path}` first")
    text = path.read_text(errors="replace") if path else os.environ[TOKEN_VARIABLE]
    if not re.fullmatch(r"\d+:[\w-]+", text.strip()):
        raise UserError(
            f"{path or TOKEN_VARIABLE} does not contain a valid token: a token consists of "
            "digits, a colon and letters"
        )
    return text.strip()


class RedactingFormatter(logging.Formatter):
    """Formats a message as one line without the token and without tracebacks.

    Every URL of the Bot API contains the token, so messages of libraries may contain it.
    """

    def __init__(self, token: str):
        super().__init__()
        self.token = token

    def format(self, record: logging.LogRecord) -> str:
        """Return the redacted line."""
        line = " ".join(record.getMessage().replace(self.token, "TOKEN").split())
        return line[:MAX_LOG_CHARACTERS]


def redact_logs(token: str) -> None:
    """Remove the token from all log messages of this process."""
    # Without a handler of the root logger, messages would go to standard error unredacted.
    root_handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(root_handler)
    for handler in (root_handler, *log.handlers):
        handler.setFormatter(RedactingFormatter(token))
    for library in ("httpx", "httpcore", "telegram"):  # they log URLs at level INFO
        logging.getLogger(library).setLevel(logging.WARNING)


@dataclass
class PendingRequest:
    """A command that needs photos, and the file ids of the photos so far."""

    command: str
    photos: list[str] = field(default_factory=list)


class Chat:
    """Handlers for the messages of all chats.

    A chat has one request in progress at a time. Different chats do not wait for each other.

    Args:
        session: The model.
        allowed_chats: Ids of the chats that are answered. Empty means all chats.
    """

    def __init__(self, session: ModelSession, allowed_chats: tuple[int, ...] = ()):
        self.session = session
        self.allowed_chats = allowed_chats
        self.pending: dict[int, PendingRequest] = {}
        self.busy: set[int] = set()

    async def on_message(self, update: Update, context: ContextTypes.DEFAULT_TYPE) -> None:
        """Answer a message."""
        message = update.message
        if message is None:
            return
        reply = self._handle(message)
        if callable(reply) and message.chat_id in self.busy:
            reply = BUSY
        if isinstance(reply, str):
            await message.reply_text(reply)
        elif reply is not None:
            self.busy.add(message.chat_id)
            try:
                await reply()
            except UserError as error:
                await message.reply_text(f"Sorry: {error}.")
            finally:
                self.busy.discard(message.chat_id)

    async def on_error(self, update: object, context: ContextTypes.DEFAULT_TYPE) -> None:
        """Log an unexpected error and apologize."""
        error = context.error
        if error is None or isinstance(error, TelegramError):
            log.error("Telegram: %s", error)
        else:
            log.error("%s", user_message(error))
        if isinstance(update, Update) and update.message is not None:
            await update.message.reply_text("Sorry, something went wrong. Try again.")

    def _handle(self, message: Message) -> str | Task | None:
        """Return a reply, or a task, or None if a photo of an album is still missing."""
        chat_id = message.chat_id
        if self.allowed_chats and chat_id not in self.allowed_chats:
            return f"This bot does not answer this chat. Its id is {chat_id}."
        first, *arguments = (message.text or message.caption or "").split() or [""]
        command = first.removeprefix("/").partition("@")[0] if first.startswith("/") else ""
        if command in PHOTOS_NEEDED:
            self.pending[chat_id] = PendingRequest(command)
        files = [message.document] if message.document else message.photo
        if files:
            return self._add_photo(files[-1], message)  # the largest copy of the photo
        if command == "generate":
            temperature = _temperature(arguments)
            if temperature is None:
                return (
                    f"The temperature must be a number from 0 to {MAX_TEMPERATURE:g} with a "
                    "decimal point, such as /generate 0.678."
                )
            return lambda: self._generate(message, temperature)
        replies = {
            "start": f"Hello! I draw images with {self.session.name}.\n{HELP}",
            "help": HELP,
            "walk": "Send me two photos, one after the other.",
            "score": "Send me a photo.",
        }
        return replies.get(command, f"I do not understand that.\n{HELP}")

    def _add_photo(self, file: Document | PhotoSize, message: Message) -> str | Task | None:
        request = self.pending.get(message.chat_id)
        if request is None:
            return "Send /score or /walk first, so that I know what to do with the photo."
        if (file.file_size or 0) > MAX_PHOTO_BYTES:
            return f"The photo is too large. Send at most {MAX_PHOTO_BYTES // 2**20} MiB."
        is_last = len(request.photos) + 1 == PHOTOS_NEEDED[request.command]
        if is_last and message.chat_id in self.busy:  # the request stays pending
            return f"{BUSY} Send me this photo again after that."
        request.photos.append(file.file_id)
        if not is_last:
            return None if message.media_group_id else "Now send the other photo."
        del self.pending[message.chat_id]
        return lambda: self._run(message, request)

    async def _generate(self, message: Message, temperature: float) -> None:
        seed = random.randrange(2**31)
        image = await asyncio.to_thread(
            self.session.sample, count=1, temperature=temperature, seed=seed
        )
        score = await asyncio.to_thread(self._describe_score, image)
        picture = rendering.image_grid(image, self.session.model.bits, 1, SAMPLE_SIDE)
        await message.reply_photo(
            rendering.to_png(picture),
            caption=f"Temperature {temperature:g}, seed {seed}. {score}",
        )

    async def _run(self, message: Message, request: PendingRequest) -> None:
        images = []
        for file_id in request.photos:
            file = await message.get_bot().get_file(file_id)
            data = bytes(await file.download_as_bytearray())
            images.append(await asyncio.to_thread(self.session.read_upload, data))
        if request.command == "score":
            await message.reply_text(await asyncio.to_thread(self._describe_score, images[0]))
            return
        latent, pixels = await asyncio.to_thread(
            self.session.interpolate, images[0], images[1], INTERPOLATION_STEPS, False
        )
        rows = [("through the latents", latent), ("through the pixels", pixels)]
        picture = rendering.titled_grids(rows, self.session.model.bits, INTERPOLATION_STEPS)
        await message.reply_photo(rendering.to_png(picture))

    def _describe_score(self, image: Tensor) -> str:
        score = self.session.score(image)
        text = f"{score.value:.3f} {self.session.unit}"
        if score.percentile is None:
            return f"{text}."
        return (
            f"{text}. {score.percentile:.0f} % of the validation images are more likely. "
            f"p = {score.p_value:.3f}."
        )


def _temperature(words: list[str]) -> float | None:
    """Parse the arguments of /generate. None means that they are invalid."""
    try:
        (temperature,) = map(float, words or [str(MAX_TEMPERATURE)])
    except ValueError:
        return None
    return temperature if 0 <= temperature <= MAX_TEMPERATURE else None


def bot(
    *,
    run: str | None,
    token_file: Path | None,
    allowed_chats: tuple[int, ...],
    api_url: str | None,
    device: str,
    echo: Callable[[str], None],
) -> None:
    """Answer messages until Ctrl-C.

    Args:
        run: A run, a model file or a Hub name. None means the newest run.
        token_file: The file that contains the token, see `read_token`.
        allowed_chats: Ids of the chats that are answered. Empty means all chats.
        api_url: A server of the Bot API. None means Telegram's server.
        device: "auto", "cpu" or "cuda".
        echo: Prints a message when the bot starts.

    Raises:
        UserError: If Telegram rejects the token or is unreachable.
    """
    token = read_token(token_file)
    session = ModelSession(run, device)
    redact_logs(token)

    # Start the thread only after Telegram has accepted the token: if the process ends while
    # torch computes in another thread, the interpreter aborts.
    async def score_in_background(_: Application) -> None:
        threading.Thread(target=session.score_validation_images, daemon=True).start()

    builder = (
        ApplicationBuilder()
        .token(token)
        .concurrent_updates(MAX_CONCURRENT_UPDATES)
        .post_init(score_in_background)
    )
    if api_url is not None:
        base_url = api_url.rstrip("/")
        builder = builder.base_url(f"{base_url}/bot").base_file_url(f"{base_url}/file/bot")
    application = builder.build()
    chat = Chat(session, allowed_chats)
    application.add_handler(MessageHandler(filters.ALL, chat.on_message))
    application.add_error_handler(chat.on_error)
    echo(f"{session.name} answers on Telegram until Ctrl-C")
    try:
        application.run_polling(allowed_updates=["message"])
    except InvalidToken:  # its message contains the token, so do not chain it
        raise UserError("Telegram rejects the token: get another one from @BotFather") from None
    except NetworkError as error:
        raise UserError(
            f"Telegram is unreachable ({type(error).__name__}): try again later"
        ) from None
    except Exception as error:
        raise UserError(user_message(error).replace(token, "TOKEN")) from None
    exit_process()
