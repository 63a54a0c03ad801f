"""A loaded model that answers the requests of the web page and of the Telegram bot."""

import io
import math
import shlex
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from flowgen.commands import complete, edit, interpolate, score
from flowgen.config.runs import find_model, supports
from flowgen.data.preprocess import check_color_channels, preprocess
from flowgen.evaluation import latent_directions, ood
from flowgen.models.base import (
    GenerativeModel,
    SupportsInpainting,
    SupportsMCMC,
    sample_images,
    sort_by_log_prob,
)
from flowgen.utils import console, rendering
from flowgen.utils.errors import UserError
from flowgen.utils.metrics import BITS_PER_DIM

UPLOAD_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
MAX_PIXELS = 40_000_000  # as large as photos get; decoding takes at most half a GB
MAX_CHAINS = 4  # sets of Markov chains that are kept for the page
NUM_VALIDATION_IMAGES = 1000  # the defaults of `flowgen score`, so that both print the same values
SCORE_SEED = 0

T = TypeVar("T")


def decode_png(file: bytes, size: tuple[int, int], channels: int) -> Tensor:
    """Decode a PNG that this program has produced.

    Args:
        file: Content of the file.
        size: Height and width that it must have.
        channels: 1 for gray or 3 for color.

    Returns:
        One 8-bit image (1, channels, *size).

    Raises:
        UserError: If the file is not a PNG with this height and width.
    """
    try:
        if Image.open(io.BytesIO(file), formats=("PNG",)).size == size[::-1]:
            return preprocess(file, size, channels, None)[None]
    except Exception as error:
        raise UserError("an image was not produced by this page: open it again") from error
    raise UserError("an image does not have the size of the model's images: open it again")


class ModelLock:
    """A lock around a model. It shows the status of the work and can cancel requests.

    Attributes:
        status: Description of the work in progress, or "" if the lock is free.
    """

    def __init__(self) -> None:
        self.status = ""
        self._lock = threading.Lock()
        self._request_id: str | None = None  # of the request that holds the lock
        self._canceled: set[str | None] = set()  # ids of requests

    @contextmanager
    def acquire(self, status: str, request_id: str | None = None) -> Iterator[None]:
        """Hold the lock.

        Args:
            status: Description of the work.
            request_id: Name of the request for `cancel`.

        Raises:
            UserError: If the request was canceled while it waited.
        """
        with self._lock:
            self._request_id = request_id
            try:
                self._raise_if_canceled()
                self.status = status
                yield
            finally:
                self.status = ""
                self._canceled.discard(request_id)

    def cancel(self, request_id: str) -> None:
        """Make a request raise UserError while it waits or at its next `cancellable` step."""
        self._canceled.add(request_id)

    def cancellable(self, steps: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield `steps` and update the status. A `Progress` for code that holds the lock."""
        for index, step in enumerate(steps):
            self._raise_if_canceled()
            self.status = f"{what}: {index} of {total}"
            yield step

    def interleave(self, steps: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield `steps` and hold the lock during each.

        A `Progress` for work during which other threads may take the lock between two steps.
        """
        for step in steps:
            with self.acquire(what):
                yield step
            time.sleep(0.01)  # let another thread take the lock

    def _raise_if_canceled(self) -> None:
        if self._request_id in self._canceled:
            raise UserError("the request was stopped")


class Score(NamedTuple):
    """The likelihood of one image, and its rank among the validation images.

    The rank is missing until `ModelSession.score_validation_images` is done.
    """

    value: float  # in `ModelSession.unit`
    percentile: float | None  # percentage of validation images that are more likely
    p_value: float | None


class ModelSession:
    """The model of a run. Many threads can use it; they take turns.

    Every result depends on the arguments alone, not on earlier calls. Images are uint8 pixel
    values (batch, channels, height, width). Methods raise UserError for impossible requests.

    Args:
        run: A run, a model file or a Hub name. None means the newest run.
        device: "auto", "cpu" or "cuda".
    """

    def __init__(self, run: str | None, device: str = "auto"):
        self.run, self.checkpoint, self.model = find_model(run, device, GenerativeModel)
        self.channels, height, width = self.model.image_shape
        self.size = (height, width)
        check_color_channels(self.channels)
        self.name = run or str(self.run.folder)
        self.scorer: score.Scorer | None = None  # set by `score_validation_images`
        self.scorer_error = ""  # the reason if `score_validation_images` failed
        self.lock = ModelLock()
        self.chains: dict[str, Iterator[Tensor]] = {}
        self.model.set_progress(self.lock.cancellable)

    @property
    def capabilities(self) -> dict[str, bool]:
        """Optional abilities of the model."""
        return {
            "classes": self.model.num_classes is not None,
            "chains": isinstance(self.model, SupportsMCMC),
            "inpainting": supports(self.checkpoint["config"], SupportsInpainting),
        }

    @property
    def samplers(self) -> list[str]:
        """Samplers for inpainting. An RBM uses them for new images too."""
        if isinstance(self.model, SupportsInpainting) and self.capabilities["inpainting"]:
            return list(self.model.samplers)
        return []

    @property
    def unit(self) -> str:
        """Unit of `Score.value`."""
        metric = score.likelihood_metric(self.model)
        name = "" if metric == BITS_PER_DIM else f"{metric.name.replace('_', ' ')}, "
        return name + metric.unit

    @property
    def bound_sign(self) -> str:
        """The sign "<= " or ">= " before a `Score.value` that is a bound, or ""."""
        return score.likelihood_metric(self.model).bound_sign(self.model.likelihood)

    def command_line(self, command: str, *args: str, **options: object) -> str:
        """Return the `flowgen` command that makes the same images.

        Options with the value None or False are omitted. True stands for an option without value.
        """
        words = [
            f"--{key}" if value is True else f"--{key} {value}"
            for key, value in options.items()
            if value is not None and value is not False
        ]
        return " ".join([shlex.join(["flowgen", command, *args, "--run", self.name]), *words])

    def read_upload(self, file: bytes) -> Tensor:
        """Decode an untrusted image file and preprocess it like the training images.

        At one bit, pixels become bits by a threshold, even if the bits of the training images are
        drawn at random.

        Args:
            file: The content of a file in one of `UPLOAD_FORMATS`.

        Returns:
            One image (1, channels, height, width).

        Raises:
            UserError: If the file is not an image, is truncated or is too large.
        """
        crop = self.checkpoint["config"]["data"].get("crop")
        try:
            if math.prod(Image.open(io.BytesIO(file), formats=UPLOAD_FORMATS).size) > MAX_PIXELS:
                raise UserError(
                    f"has more than {MAX_PIXELS // 10**6} million pixels: shrink it first"
                )
            return preprocess(file, self.size, self.channels, crop)[None] >> (8 - self.model.bits)
        except UserError as error:
            raise UserError(f"the image {error}") from error
        except Exception as error:  # decoders raise exceptions of any kind on hostile files
            raise UserError(
                "the file is not an image or is truncated: choose another file"
            ) from error

    def read_image(self, file: bytes) -> Tensor:
        """Return the exact pixel values of a PNG that this program has produced."""
        return decode_png(file, self.size, self.channels) >> (8 - self.model.bits)

    def read_mask(self, file: bytes) -> Tensor:
        """Return a mask (channels, height, width) that is true where a PNG is white."""
        return (decode_png(file, self.size, 1)[0] >= 128).expand(self.model.image_shape)

    def sample(
        self,
        *,
        count: int,
        temperature: float,
        seed: int,
        label: int | None = None,
        sampler: str | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Draw the images of `flowgen sample`, the most probable first.

        Args:
            count: Number of images.
            temperature: See `GenerativeModel.sample`.
            seed: Seed of the random numbers.
            label: Class of all images, or None.
            sampler: Markov chain of an RBM, or None for the default.
            steps: Its number of steps, or None for the default.
        """
        if label is not None and not self.capabilities["classes"]:
            raise UserError("this model is not class-conditional: omit label")
        if (sampler or steps) and not self.capabilities["chains"]:
            raise UserError("this model does not use Markov chains: omit sampler and steps")
        options = {"label": label, "sampler": sampler, "steps": steps}
        kwargs: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
        with self.lock.acquire("drawing samples"):
            images, log_probs = sample_images(self.model, count, temperature, seed, **kwargs)
        return sort_by_log_prob(images, log_probs).cpu()

    def score(self, image: Tensor) -> Score:
        """Return the likelihood of one image as `flowgen score` prints it."""
        generator = torch.Generator(self.model.device).manual_seed(SCORE_SEED)
        with self.lock.acquire("scoring"):
            statistics = score.image_statistics(self.model, image, generator)
        value = score.to_metric_unit(self.model, statistics["log_prob"]).item()
        if self.scorer is None:
            return Score(value, None, None)
        detector = self.scorer.detector
        scores = detector.scores(statistics)
        p_value = detector.p_values(scores)[ood.DEFAULT_SCORE].item()
        return Score(value, detector.percentile(scores).item(), p_value)

    def interpolate(
        self, first: Tensor, second: Tensor, steps: int, spherical: bool
    ) -> tuple[Tensor, Tensor]:
        """Return `steps` images through the latents and `steps` images through the pixels.

        Args:
            first: First image (1, channels, height, width).
            second: Last image.
            steps: Number of images, with both ends.
            spherical: Whether the path through the latents is a great circle.
        """
        with self.lock.acquire("interpolating"):
            return interpolate.interpolate_images(self.model, first, second, steps, spherical)

    @cached_property
    def directions(self) -> latent_directions.Directions:
        """Latent directions of the attributes that `edit` can change.

        The first use may compute them from the training images. Other requests are answered
        between its batches.
        """
        return edit.load_directions(
            self.run, self.checkpoint, self.model, progress=self.lock.interleave
        )

    def edit(self, image: Tensor, amounts: dict[str, float]) -> Tensor:
        """Move one image along attributes as `flowgen edit` does."""
        directions = self.directions  # computed before this thread holds the lock
        with self.lock.acquire("editing"):
            return latent_directions.move_along(
                self.model, directions, image, amounts, torch.ones(1)
            )[0]

    def inpaint(
        self,
        image: Tensor,
        known: Tensor,
        *,
        sampler: str,
        steps: int,
        seed: int,
        request_id: str | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Draw the unknown pixels of an image as `flowgen complete` does.

        Args:
            image: One image (1, channels, height, width).
            known: Mask (channels, height, width), true where pixels are known.
            sampler: One of `samplers`.
            steps: Number of steps of the sampler.
            seed: Seed of the random numbers.
            request_id: Name of the request for `ModelLock.cancel`.

        Returns:
            8-bit images (2 + draws, channels, height, width): the mean, twice the standard
            deviation and the draws; and diagnostics of the sampler.
        """
        if not self.samplers:
            raise UserError("this model does not support inpainting: use the run of a flow")
        assert isinstance(self.model, SupportsInpainting)
        complete.check_mask(known, "the mask")
        with self.lock.acquire("completing", request_id):
            (draws, mean, _, metrics), spread = complete.inpaint_image(
                self.model,
                image.to(self.model.device),
                known.to(self.model.device),
                sampler,
                steps,
                seed,
            )
        return rendering.to_uint8(torch.cat((mean[None], spread[None], draws))), dict(metrics)

    def start_chains(self, *, sampler: str, seed: int, count: int) -> str:
        """Start Markov chains in white noise and return their id for `advance_chains`.

        Only the `MAX_CHAINS` newest sets of chains are kept.

        Args:
            sampler: Markov chain of an RBM.
            seed: Seed of the random numbers.
            count: Number of chains.
        """
        if not isinstance(self.model, SupportsMCMC):
            raise UserError("this model does not use Markov chains: use the run of an RBM")
        with self.lock.acquire("starting chains"):
            chain_id = f"{time.monotonic_ns():x}"
            self.chains[chain_id] = self.model.iter_chains(
                count, sampler, torch.Generator(self.model.device).manual_seed(seed)
            )
            if len(self.chains) > MAX_CHAINS:
                del self.chains[next(iter(self.chains))]
        return chain_id

    def advance_chains(self, chain_id: str, steps: int) -> Tensor:
        """Advance chains by `steps` and return P(v = 1) of every chain as 8-bit images.

        The first step returns the initial noise.
        """
        with self.lock.acquire("running chains"), torch.no_grad():
            if chain_id not in self.chains:
                raise UserError("these chains have ended: start new ones")
            return rendering.to_uint8(next(islice(self.chains[chain_id], steps - 1, None)))

    def filters(self) -> Image.Image:
        """Return the weights of hidden units as a grid of images."""
        filters = self.model.filters()
        if filters is None:
            raise UserError("this model has no filters: use the run of an RBM")
        return rendering.weight_grid(filters, columns=10, max_tiles=100)

    def score_validation_images(self) -> None:
        """Score validation images so that `score` can return percentiles.

        This is work for a background thread. Other requests are answered between its batches.
        Errors are logged and stored in `scorer_error`.
        """
        if self.model.likelihood == "none":
            self.scorer_error = "this model has no likelihood of images"
            return
        try:
            self.scorer = score.make_scorer(
                self.run,
                self.checkpoint,
                self.model,
                NUM_VALIDATION_IMAGES,
                SCORE_SEED,
                progress=self.lock.interleave,
            )
        except UserError:  # its message is about downloads and folders: too long for the page
            self.scorer_error = (
                "the validation images are missing or damaged: "
                f"`{self.command_line('evaluate')}` tells what to do"
            )
        except Exception as error:  # nobody sees an exception of a background thread
            self.scorer_error = console.user_message(error)
        if self.scorer_error:
            console.log.error("percentiles are unavailable: %s", self.scorer_error)
