"""What the bot says to what it is told."""

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import torch
from telegram import Message, Update
from telegram.error import TelegramError
from telegram.ext import ContextTypes

from flowgen import pictures
from flowgen.answers import Answers
from flowgen.errors import FlowgenError
from flowgen.messages import one_sentence

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

    def __init__(self, answers: Answers, allowed: tuple[int, ...] = ()):
        self.answers, self.allowed = answers, allowed
        self.requests: dict[int, Request] = {}
        self.busy: set[int] = set()

    async def hear(self, update: Update, context: ContextTypes.DEFAULT_TYPE) -> None:
        """Any message."""
        message = update.message
        if message is None:
            return
        if self.allowed and message.chat_id not in self.allowed:
            await message.reply_text(f"This bot talks to others only. Your chat is {message.chat_id}.")
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
            except FlowgenError as error:
                await message.reply_text(f"Sorry: {error}.")
            finally:
                self.busy.discard(message.chat_id)

    async def stumble(self, update: object, context: ContextTypes.DEFAULT_TYPE) -> None:
        """After a fault of ours, or of the network."""
        error = context.error
        if isinstance(error, Exception) and not isinstance(error, TelegramError):
            log.error("%s", one_sentence(error))
        else:
            log.error("Telegram: %s", error)
        if isinstance(update, Update) and update.message is not None:
            await update.message.reply_text("Sorry, that went wrong here. Try again.")

    def _answer(self, message: Message) -> str | Work | None:
        """What to say at once, or work to do; nothing while a photo of an album is still to come."""
        words = (message.text or message.caption or "").split()
        name = words[0].partition("@")[0].removeprefix("/") if words and words[0].startswith("/") else ""
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
        levels = await asyncio.to_thread(self.answers.sample, count=1, temperature=temperature, seed=seed)
        figures = await asyncio.to_thread(self._figures, levels)
        picture = pictures.to_image(levels, self.answers.model.bits, 1, SIDE)
        await message.reply_photo(pictures.file_of(picture), caption=f"Temperature {temperature:g}, seed {seed}. {figures}")

    async def _look(self, message: Message, request: Request) -> None:
        files = [await (await message.get_bot().get_file(photo)).download_as_bytearray() for photo in request.photos]
        images = [await asyncio.to_thread(self.answers.read, bytes(file)) for file in files]
        if request.about == "score":
            await message.reply_text(await asyncio.to_thread(self._figures, images[0]))
            return
        latent, pixels = await asyncio.to_thread(self.answers.walk, images[0], images[1], STEPS, False)
        rows = [("through the latents", latent), ("through the pixels", pixels)]
        await message.reply_photo(pictures.file_of(pictures.blocks(rows, self.answers.model.bits, STEPS)))

    def _figures(self, levels: torch.Tensor) -> str:
        value, percentile, p = self.answers.figures(levels)
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
