"""Images from outside, which nobody vouches for."""

import io
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NoReturn, TypeVar

import torch
from PIL import Image
from torch import Tensor

from flowgen.commands.complete import check_mask, inpaint_image, to_uint8
from flowgen.commands.edit import load_directions
from flowgen.commands.interpolate import interpolate_images
from flowgen.commands.sample import sample_images
from flowgen.commands.score import (
    Scorer,
    likelihood_metric,
    make_scorer,
    ood_statistics_of,
    to_metric_unit,
)
from flowgen.config.loading import find_model
from flowgen.data.preprocess import check_color_channels, preprocess
from flowgen.evaluation.latent_directions import Directions, move_along
from flowgen.evaluation.ood import DEFAULT_SCORE
from flowgen.models.base import ClassConditional, GenerativeModel, SupportsInpainting, SupportsMCMC
from flowgen.utils import rendering
from flowgen.utils.console import user_message
from flowgen.utils.errors import UserError
from flowgen.utils.metrics import BITS_PER_DIM

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
MOST_PIXELS = 40_000_000  # a camera's, and no more than half a GB when decoded


def read_upload(file: bytes, size: int, channels: int, crop: int | None) -> Tensor:
    """An image of any of `FORMATS`, see `prepare`: (1, channels, size, size) at 8 bits. Raises FlowgenError for any other file."""
    try:
        width, height = _size(file, FORMATS)
        if width * height > MOST_PIXELS:
            raise UserError(
                f"is larger than {MOST_PIXELS // 10**6} million pixels: make it smaller first"
            )
        return preprocess(file, size, channels, crop)[None]
    except UserError as error:
        raise UserError(f"the image {error}") from error
    except Exception as error:  # a hostile file makes a decoder raise whatever it does
        raise UserError("the image is not an image, or is cut short") from error


def read_saved(file: bytes, size: int, channels: int) -> Tensor:
    """A PNG of size x size pixels, as those that are handed out: (1, channels, size, size) at 8 bits. Raises FlowgenError for others."""
    try:
        if _size(file, ("PNG",)) == (size, size):
            return preprocess(file, size, channels, None)[None]
    except Exception as error:
        raise UserError("a picture is not one of those from here: open it again") from error
    raise UserError("a picture has another size than the model's: open it again")


def _size(file: bytes, formats: tuple[str, ...]) -> tuple[int, int]:
    """Width and height, as the file's head says."""
    with Image.open(io.BytesIO(file), formats=formats) as image:
        return image.size


T = TypeVar("T")


def exit_process() -> NoReturn:
    """End the process at once and well: torch, at work in other threads, does not survive the interpreter's own end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class ModelLock:
    """A lock around a model; `doing` says what is done in the turn that is taken, nothing where none is."""

    def __init__(self) -> None:
        self.doing = ""
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._asked: dict[
            str | None, threading.Event
        ] = {}  # what stops each question that waits or is answered

    @contextmanager
    def take(self, doing: str, question: str | None = None) -> Iterator[None]:
        """Wait for the turn and take it. Raises FlowgenError where the `question` that it is for has been stopped."""
        stopped = self._asked[question] = threading.Event()
        try:
            with self._lock:
                _check(stopped)
                self.doing, self._stopped = doing, stopped
                try:
                    yield
                finally:
                    self.doing = ""
        finally:
            self._asked.pop(question, None)

    def stop(self, question: str) -> None:
        """End the work on a question, where it waits for its turn or goes by `watched` steps: it raises FlowgenError."""
        if stopped := self._asked.get(question):
            stopped.set()

    def watched(self, steps: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """A `Progress` for work within a turn."""
        for number, step in enumerate(steps):
            _check(self._stopped)
            self.doing = f"{what}: {number} of {total}"
            yield step

    def each(self, steps: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """A `Progress` that takes a turn for every step, so that others come in between."""
        for step in steps:
            with self.take(what):
                yield step
            time.sleep(0.01)  # in which another thread takes the lock


def _check(stopped: threading.Event) -> None:
    if stopped.is_set():
        raise UserError("stopped")


CHAINS_KEPT = 4
HELD_OUT, SEED = 1000, 0  # as `flowgen score`, so that figures are the same
log = logging.getLogger("flowgen")


class ModelSession:
    """The model of a run, asked by many threads in turn; every answer depends on its question alone.

    Images are levels (batch, channels, height, width). What cannot be answered raises FlowgenError, here and below.
    """

    def __init__(self, name: str | None, device: str = "auto"):
        self.run, self.checkpoint, self.model = find_model(name, device, GenerativeModel)
        self.channels, self.size, _ = self.model.image_shape
        check_color_channels(self.channels)
        self.name = name or str(self.run.folder)
        self.judge: Scorer | None = None  # until validation images have been judged
        self.no_judge = ""  # why there will be none
        self.directions: Directions | None = None  # until they have been asked for
        self.turns = ModelLock()
        self.films: dict[str, Iterator[Tensor]] = {}
        self.model.set_progress(self.turns.watched)

    @property
    def capabilities(self) -> dict[str, bool]:
        """What the model can be asked for, beside samples, scores and walks."""
        classes = isinstance(self.model, ClassConditional) and self.model.num_classes is not None
        return {
            "classes": classes,
            "chains": isinstance(self.model, SupportsMCMC),
            "complete": isinstance(self.model, SupportsInpainting),
        }

    @property
    def methods(self) -> list[str]:
        """By which it completes, and an RBM draws."""
        return list(self.model.completions) if isinstance(self.model, SupportsInpainting) else []

    @property
    def unit(self) -> str:
        metric = likelihood_metric(self.model)
        return (
            metric.unit
            if metric == BITS_PER_DIM
            else f"{metric.name.replace('_', ' ')}, {metric.unit}"
        )

    def command(self, name: str, *words: str, **options: Any) -> str:
        """The command line that makes the same picture; options that are None or False are left out, and those that are True bare."""
        given = {"run": self.name} | {
            key: value for key, value in options.items() if value is not None and value is not False
        }
        line = [
            word
            for key, value in given.items()
            for word in (f"--{key}", str(value))[: 1 + (value is not True)]
        ]
        return shlex.join(["flowgen", name, *words, *line])

    def read(self, file: bytes) -> Tensor:
        """An image from outside, prepared like the data of the run."""
        crop = self.checkpoint["config"]["data"].get("crop")
        return read_upload(file, self.size, self.channels, crop) >> (8 - self.model.bits)

    def exactly(self, file: bytes) -> Tensor:
        """The levels that a picture from here holds."""
        return read_saved(file, self.size, self.channels) >> (8 - self.model.bits)

    def mask(self, file: bytes) -> Tensor:
        """True where a picture of the model's size is white: (channels, height, width)."""
        return (read_saved(file, self.size, 1)[0] >= 128).expand(self.model.image_shape)

    def sample(
        self,
        *,
        count: int,
        temperature: float,
        seed: int,
        label: int | None = None,
        method: str | None = None,
        sweeps: int | None = None,
    ) -> Tensor:
        """As `flowgen sample` draws them, the most probable first."""
        if label is not None and not self.capabilities["classes"]:
            raise UserError("this model knows no classes: leave label out")
        if (method or sweeps) and not self.capabilities["chains"]:
            raise UserError("this model draws by no Markov chains: leave method and sweeps out")
        how = {
            key: value
            for key, value in {"label": label, "method": method, "sweeps": sweeps}.items()
            if value is not None
        }
        with self.turns.take("drawing samples"):
            images, scores = sample_images(self.model, count, temperature, seed, **how)
        return images[scores.argsort(descending=True)].cpu()

    def figures(self, images: Tensor) -> tuple[float, float | None, float | None]:
        """Of one image, as `flowgen score` gives them: its likelihood in `unit`; percentile and p-value, once there is a `judge`."""
        with self.turns.take("scoring"):
            found = ood_statistics_of(
                self.model, images, torch.Generator(self.model.device).manual_seed(SEED)
            )
        value = to_metric_unit(self.model, found["log_prob"]).item()
        if self.judge is None:
            return value, None, None
        outliers = self.judge.detector
        return (
            value,
            outliers.percentile(found["log_prob"]).item(),
            outliers.p_values(outliers.scores(found))[DEFAULT_SCORE].item(),
        )

    def walk(
        self, first: Tensor, second: Tensor, steps: int, spherical: bool
    ) -> tuple[Tensor, Tensor]:
        """As `flowgen interpolate`: through the latents, and through the pixels."""
        with self.turns.take("walking"):
            return interpolate_images(self.model, first, second, steps, spherical)

    def attributes(self) -> tuple[str, ...]:
        """The names along which `edit` moves; at first they may have to be found among the training images, between others' questions."""
        self.directions = self.directions or load_directions(
            self.run, self.checkpoint, self.model, progress=self.turns.each
        )
        return self.directions.names

    def edit(self, images: Tensor, amounts: dict[str, float]) -> Tensor:
        """As `flowgen edit` moves one image along attributes."""
        self.attributes()
        assert self.directions is not None
        with self.turns.take("editing"):
            return move_along(self.model, self.directions, images, amounts, torch.ones(1))[0]

    def inpaint(
        self,
        images: Tensor,
        known: Tensor,
        *,
        method: str,
        sweeps: int,
        seed: int,
        question: str | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """As `flowgen complete`, as levels of 8 bits: the mean, the spread, the draws; and what tells how the method fared.

        `turns.stop` ends it by the name of the question.
        """
        model = self.model
        if not isinstance(model, SupportsInpainting):
            raise UserError("this model restores no pixels: use a run of another")
        check_mask(known, "the mask")
        with self.turns.take("completing", question):
            images, known = images.to(model.device), known.to(model.device)
            (draws, mean, figures), spread = inpaint_image(
                model, images, known, method, sweeps, seed
            )
        return to_uint8(torch.cat((mean[None], spread[None], draws))), dict(figures)

    def start_chains(self, *, method: str, seed: int, count: int) -> str:
        """The name of chains that begin in white noise, see `advance`; the oldest make room for them."""
        if not isinstance(self.model, SupportsMCMC):
            raise UserError("this model draws by no Markov chains: use a run of an RBM")
        with self.turns.take("starting chains"):
            name = f"{time.monotonic_ns():x}"
            self.films[name] = self.model.iter_chains(
                count, method, torch.Generator(self.model.device).manual_seed(seed)
            )
            while len(self.films) > CHAINS_KEPT:
                del self.films[next(iter(self.films))]
        return name

    def advance(self, name: str, sweeps: int) -> Tensor:
        """P(v = 1) of every chain after so many more sweeps, at first the noise itself, as levels of 8 bits."""
        with self.turns.take("running chains"), torch.no_grad():
            if name not in self.films:
                raise UserError("these chains have ended: start new ones")
            return to_uint8(next(islice(self.films[name], sweeps - 1, None)))

    def filters(self) -> Image.Image:
        """The weights of hidden units as a grid."""
        features = self.model.filters()
        if features is None:
            raise UserError("this model has no filters that can be drawn: use a run of an RBM")
        return rendering.weight_grid(features, columns=10, max_tiles=100)

    def score_validation_images(self, count: int = HELD_OUT) -> None:
        """So that percentiles can be told; others are answered between one batch and the next."""
        try:
            self.judge = make_scorer(
                self.run, self.checkpoint, self.model, count, SEED, progress=self.turns.each
            )
        except Exception as error:  # in a thread of its own, where nobody else would hear of it
            self.no_judge = user_message(error)
            log.error("no percentiles: %s", self.no_judge)
