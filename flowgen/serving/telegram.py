"""The Telegram bot of `flowgen bot`.

Whoever knows the token of a bot can act as the bot, so the token must not appear in any output.
"""

import asyncio
import logging
import os
import random
import re
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from telegram import Document, Message, PhotoSize, Update
from telegram.error import InvalidToken, NetworkError, TelegramError
from telegram.ext import Application, ApplicationBuilder, ContextTypes, MessageHandler, filters
from torch import Tensor

from flowgen.serving.session import ModelSession
from flowgen.utils import console, rendering
from flowgen.utils.errors import UserError, user_error

TOKEN_VARIABLE = "FLOWGEN_BOT_TOKEN"
MAX_TEMPERATURE = 1.0
MAX_PHOTO_BYTES = 8 * 2**20
INTERPOLATION_STEPS = 9
PHOTOS_NEEDED = {"walk": 2, "score": 1}
HELP = f"""/generate sends an image drawn at temperature 1.
/generate 0.678 sends an image drawn at that temperature, from 0 to {MAX_TEMPERATURE:g}. \
Low temperatures give typical images, high temperatures give varied images.
/walk and two photos: interpolates from one to the other, through the latents and the pixels.
/score and a photo: tells how likely the photo is under the model."""
BUSY = "I am still working on your last request."


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


def redact_logs(token: str) -> None:
    """Make each log message of this process one line without the token and without a traceback.

    Every URL of the Bot API contains the token, so messages of libraries may contain it. Lines are
    cut after 300 characters.
    """

    def redacted_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = logging.LogRecord(*args, **kwargs)
        record.msg = " ".join(record.getMessage().replace(token, "TOKEN").split())[:300]
        record.args = ()
        record.exc_info = None
        return record

    logging.setLogRecordFactory(redacted_record)
    logging.basicConfig(format="%(message)s")  # libraries log warnings to standard error


@dataclass
class PendingRequest:
    """A command that needs photos, and the file ids of the photos so far."""

    command: str
    photos: list[str] = field(default_factory=list)


@dataclass
class ChatHandlers:
    """Handlers for the messages of all chats.

    A chat has one request in progress at a time. Different chats do not wait for each other.

    Args:
        session: The model.
        allowed_chats: Ids of the chats that are answered. Empty means all chats.
        pending: Commands that wait for photos, by the id of the chat.
        busy: Ids of the chats with a request in progress.
    """

    session: ModelSession
    allowed_chats: tuple[int, ...] = ()
    pending: dict[int, PendingRequest] = field(default_factory=dict)
    busy: set[int] = field(default_factory=set)

    async def on_message(self, update: Update, context: ContextTypes.DEFAULT_TYPE) -> None:
        """Answer a message."""
        message = update.message
        assert message is not None  # the bot asks Telegram for nothing else
        try:
            text = await self._answer(message)
        except UserError as error:
            text = f"Sorry: {error}."
        if text:
            await message.reply_text(text)

    async def on_error(self, update: object, context: ContextTypes.DEFAULT_TYPE) -> None:
        """Log an unexpected error and apologize."""
        error = context.error
        console.log.error(
            "%s",
            f"Telegram: {error}"
            if error is None or isinstance(error, TelegramError)
            else console.user_message(error),
        )
        if isinstance(update, Update) and update.message is not None:
            await update.message.reply_text("Sorry, something went wrong. Try again.")

    async def _answer(self, message: Message) -> str | None:
        """Do what a message asks for. Return the text of the reply, or None without a text."""
        chat_id = message.chat_id
        if self.allowed_chats and chat_id not in self.allowed_chats:
            return f"This bot does not answer this chat. Its id is {chat_id}."
        first, *arguments = (message.text or message.caption or "").split() or [""]
        command = first.removeprefix("/").partition("@")[0] if first.startswith("/") else ""
        if command in PHOTOS_NEEDED:
            self.pending[chat_id] = PendingRequest(command)
        files = [message.document] if message.document else message.photo
        if files:
            return await self._add_photo(message, files[-1])  # the largest copy of the photo
        if command == "generate":
            return await self._run(message, self._generate, arguments)
        replies = {
            "start": f"Hello! I draw images with {self.session.name}.\n{HELP}",
            "help": HELP,
            "walk": "Send me two photos, one after the other.",
            "score": "Send me a photo.",
        }
        return replies.get(command, f"I do not understand that.\n{HELP}")

    async def _add_photo(self, message: Message, file: Document | PhotoSize) -> str | None:
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
        return await self._run(message, self._use_photos, request)

    async def _run(
        self,
        message: Message,
        task: Callable[[Message, Any], Awaitable[str | None]],
        argument: object,
    ) -> str | None:
        """Run a task unless the chat is busy, and return the text of the reply."""
        if message.chat_id in self.busy:
            return BUSY
        self.busy.add(message.chat_id)
        try:
            return await task(message, argument)
        finally:
            self.busy.discard(message.chat_id)

    async def _generate(self, message: Message, arguments: list[str]) -> None:
        with user_error(
            f"the temperature must be a number from 0 to {MAX_TEMPERATURE:g} with a decimal "
            "point, such as /generate 0.678"
        ):
            (temperature,) = map(float, arguments or [str(MAX_TEMPERATURE)])
            if not 0 <= temperature <= MAX_TEMPERATURE:
                raise ValueError(temperature)
        seed = random.randrange(2**31)
        image = await asyncio.to_thread(
            self.session.sample, count=1, temperature=temperature, seed=seed
        )
        caption = f"Temperature {temperature:g}, seed {seed}."
        if self.session.model.likelihood != "none":
            caption += " " + await asyncio.to_thread(self._describe_score, image)
        picture = rendering.image_grid(image, self.session.model.bits, columns=1, side=256)
        await message.reply_photo(rendering.to_png(picture), caption=caption)

    async def _use_photos(self, message: Message, request: PendingRequest) -> str | None:
        files = [await message.get_bot().get_file(file_id) for file_id in request.photos]
        images = [
            await asyncio.to_thread(
                self.session.read_upload, bytes(await file.download_as_bytearray())
            )
            for file in files
        ]
        if request.command == "score":
            return await asyncio.to_thread(self._describe_score, images[0])
        latent, pixels = await asyncio.to_thread(
            self.session.interpolate, images[0], images[1], INTERPOLATION_STEPS, False
        )
        picture = rendering.titled_grids(
            [("through the latents", latent), ("through the pixels", pixels)],
            self.session.model.bits,
            columns=INTERPOLATION_STEPS,
        )
        await message.reply_photo(rendering.to_png(picture))
        return None

    def _describe_score(self, image: Tensor) -> str:
        score = self.session.score(image)
        text = f"{self.session.bound_sign}{score.value:.3f} {self.session.unit}."
        if score.percentile is None:
            return text
        return (
            f"{text} {score.percentile:.0f} % of the validation images are more likely. "
            f"p = {score.p_value:.3f}."
        )


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
    handlers = ChatHandlers(session, allowed_chats)
    redact_logs(token)

    # The thread starts after Telegram has accepted the token, since an exit by an error aborts the
    # interpreter if torch still computes in another thread.
    async def score_in_background(_: Application) -> None:
        threading.Thread(target=session.score_validation_images, daemon=True).start()

    server = (api_url or "https://api.telegram.org").rstrip("/")
    application = (
        ApplicationBuilder()
        .token(token)
        .base_url(f"{server}/bot")
        .base_file_url(f"{server}/file/bot")
        .concurrent_updates(16)
        .post_init(score_in_background)
        .build()
    )
    application.add_handler(MessageHandler(filters.ALL, handlers.on_message))
    application.add_error_handler(handlers.on_error)
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
        raise UserError(console.user_message(error).replace(token, "TOKEN")) from None
    os._exit(0)  # a regular exit aborts the interpreter if torch still computes in another thread
