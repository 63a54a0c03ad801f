"""Training, validation and test images, and orders that are the same for ever."""

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from flowgen.utils.errors import UserError, check_choice, check_whole
from flowgen.utils.memory import free_memory

HELD_OUT = 12
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Split:
    """uint8 images (N, channels, height, width) at 8 bits; their classes (N,) and attributes, bool (N, names), where these are known."""

    images: Tensor
    labels: Tensor | None = None
    attributes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: Tensor | slice) -> "Split":
        labels, attributes = (
            None if known is None else known[chosen] for known in (self.labels, self.attributes)
        )
        return Split(self.images[chosen], labels, attributes)


@cache
def hashed_order(count: int) -> Tensor:
    """0..count-1 by the SHA-256 of each number: a permutation that no version of a random generator can change."""
    digests = [hashlib.sha256(b"%d" % number).digest() for number in range(count)]
    return torch.tensor(sorted(range(count), key=digests.__getitem__), dtype=torch.long)


def validation_mask(count: int) -> Tensor:
    """Which of so many training images, chosen by their places, are for validation: one in twelve, 5,000 of 60,000."""
    apart = torch.zeros(count, dtype=torch.bool)
    apart[hashed_order(count)[: max(1, count // HELD_OUT)]] = True
    return apart


def hashed_subset(count: int, limit: int | None) -> Tensor:
    """The places of `limit` of so many images, drawn by hash, in order; of all where there are no more. A larger part holds the smaller."""
    if limit is None or limit >= count:
        return torch.arange(count)
    return hashed_order(count)[:limit].sort().values


def hash_split(names: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Eight, one and one of ten names, each by the hash of its last part alone; of three or more, at least one each."""
    tenth = {name: digest(name) % 10 for name in names}
    test = {name for name in names if tenth[name] == 0} or set(sorted(names, key=digest)[:1])
    rest = [name for name in names if name not in test]
    validation = {name for name in rest if tenth[name] == 1} or set(sorted(rest, key=digest)[:1])
    return (
        [name for name in rest if name not in validation],
        [name for name in names if name in validation],
        [name for name in names if name in test],
    )


def digest(name: str) -> int:
    return int.from_bytes(
        hashlib.sha256(PurePosixPath(name).name.encode("utf-8", "surrogateescape")).digest()[:8],
        "big",
    )


def data_folder() -> Path:
    """The folder that holds the data sets: `FLOWGEN_DATA`, else `data/` here."""
    return Path(os.environ.get("FLOWGEN_DATA", "data"))


def check_names(names: list[str]) -> None:
    """Raise `FlowgenError` for names of folders that are not in the data folder: what a configuration names is read there, or put there."""
    for name in names:
        if (
            not isinstance(name, str)
            or not name
            or Path(name).is_absolute()
            or ".." in Path(name).parts
        ):
            raise UserError(
                f"data.search_dirs={names!r} must be names of folders inside the data folder: point data.root elsewhere instead"
            )


def find_dataset(root: str | None, names: list[str], cure: str) -> Path:
    """`root` where it is given, else the first of `names` that stands in the data folder.

    Raises FlowgenError with `cure`, a sentence that says how to get the data, where there is none.
    """
    check_names(names)
    if root is not None:
        path = Path(root).expanduser()
        if not path.exists():
            raise UserError(f"data.root={root} does not exist: {cure}")
        return path
    for name in names:
        if (data_folder() / name).exists():
            return data_folder() / name
    place = data_folder() / names[0] if names else "data.root"
    raise UserError(f"{place} does not exist: {cure}")


def download(url: str, md5: str, folder: Path) -> Path:
    """The file behind `url` in `folder`, whole by its checksum. Raises FlowgenError where it cannot be had."""
    from flowgen.utils.vision import datasets

    name = url.rpartition("/")[2]
    try:
        datasets.utils.download_url(url, str(folder), name, md5)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} is not in {folder} and could not be downloaded ({error}): put it there, or set data.root"
        ) from error
    return folder / name


Batch = tuple[Tensor, Tensor | None]


class Prefetcher:
    """`draw` of `Images`, one batch ahead in a thread: the same batches, since each is a function of its place alone."""

    def __init__(self, draw: Callable[..., Batch]):
        self.draw, self.pool = draw, ThreadPoolExecutor(1, "read ahead")
        self.place: tuple[int, ...] = ()
        self.coming: Future[Batch] | None = None

    def __call__(self, seen: int, count: int, seed: int, rows: Tensor | None = None) -> Batch:
        expected = self.coming is not None and self.place == (seen, count, seed)
        batch: Any = (
            self.coming.result() if expected and self.coming else self.draw(seen, count, seed, rows)
        )
        self.place = (seen + count, count, seed)
        self.coming = self.pool.submit(self.draw, *self.place, rows)
        return batch


BINARIZATION = ("threshold", "static", "dynamic")


class ImageDataset:
    """Three splits of uint8 images, (N, channels, height, width), kept at 8 bits and handed out at `bits`, with classes where known.

    They stay where they are, in memory or memory-mapped, until `to` moves them to a device that has room. At one bit a pixel is 1
    where it is at least 128 (`binarise` threshold), or with probability value / 255: drawn once and for all, or anew for every
    training batch and once for the other images. `attributes` are the names of the splits' attributes.
    """

    def __init__(
        self,
        train: Split,
        validation: Split,
        test: Split,
        *,
        bits: int,
        random_flip: bool,
        binarization: str = "threshold",
        attributes: tuple[str, ...] = (),
        random_shift: int = 0,
    ):
        check_whole(bits=bits)
        check_whole(0, train.images.shape[-1] - 1, random_shift=random_shift)
        check_choice(range(1, 9), bits=bits)
        check_choice((True, False), random_flip=random_flip)
        check_choice(BINARIZATION, binarization=binarization)
        if not (len(train) and len(validation) and len(test)):
            counts = (
                f"{len(train)} training, {len(validation)} validation and {len(test)} test images"
            )
            raise UserError(f"{counts} are too few: at least one of each is needed")
        self.dynamic = bits == 1 and binarization == "dynamic"
        if bits == 1 and binarization != "threshold":
            generator = torch.Generator().manual_seed(0)
            test, validation = (
                replace(split, images=binarize(split.images, generator))
                for split in (test, validation)
            )
            train = (
                train if self.dynamic else replace(train, images=binarize(train.images, generator))
            )
        self.train, self.validation, self.test = train, validation, test
        self.bits, self.random_flip, self.attributes, self.random_shift = (
            bits,
            random_flip,
            attributes,
            random_shift,
        )
        self.device = torch.device("cpu")
        self._order: tuple[tuple[int, int], Tensor] = (-1, 0), torch.empty(0)
        self._ahead: Prefetcher | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int | None:
        """How many classes the labels tell apart, where there are any."""
        labels = [
            split.labels
            for split in (self.train, self.validation, self.test)
            if split.labels is not None
        ]
        return 1 + int(torch.cat(labels).max()) if labels else None

    def to(self, device: torch.device) -> "ImageDataset":
        """Hand out batches on `device`, and keep the images there where they fill at most half of its free memory; else read ahead."""
        self.device = device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
        splits = (self.train, self.validation, self.test)
        if sum(split.images.nbytes for split in splits) > free // 2:
            self._ahead = Prefetcher(self.draw)
        elif device.type == "cuda":
            self.train, self.validation, self.test = (
                replace(split, images=split.images.to(device)) for split in splits
            )
        return self

    def next(
        self, seen: int, count: int, seed: int, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What `draw` gives, for a training that goes on from there: the batch after it may be read meanwhile."""
        return (self._ahead or self.draw)(seen, count, seed, rows)

    def draw(
        self, seen: int, count: int, seed: int, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The next `count` training images after `seen` of them, flipped at random where `flip` is set, and their labels, if there are any.

        They are moved at random by up to `shift` pixels each way, and their borders repeated. Every epoch is a permutation that `seed` and
        its number alone decide, and flips, moves and bits that are drawn anew are those of `seed` and `seen`: the whole place in the data.
        Of all these images those at the places `rows` are handed out.
        """
        generator = torch.Generator(self.device).manual_seed(
            random.Random(f"{seed} {seen}").getrandbits(63)
        )
        pieces, wanted = [], count
        while wanted:
            epoch, place = divmod(seen, len(self.train))
            pieces.append(self._permutation(epoch, seed)[place : place + wanted])
            seen, wanted = seen + len(pieces[-1]), wanted - len(pieces[-1])
        indices = torch.cat(pieces)
        mine = slice(None) if rows is None else rows
        early = slice(None) if self.dynamic else mine  # bits that are drawn anew are drawn of all
        images = self._levels(self.train.images, indices[early], generator)
        images = images[mine] if self.dynamic else images
        labels = (
            None
            if self.train.labels is None
            else self.train.labels[indices[mine]].to(self.device, torch.long)
        )
        if self.random_flip:
            mirrored = torch.rand(count, 1, 1, 1, generator=generator, device=self.device) < 0.5
            images = torch.where(mirrored[mine], images.flip(3), images)
        if self.random_shift:
            by = torch.randint(
                -self.random_shift,
                self.random_shift + 1,
                (count, 2),
                generator=generator,
                device=self.device,
            )
            images = random_shift(images, by[mine])
        return images, labels

    def batches(self, split: str, size: int, limit: int | None = None) -> Iterator[Tensor]:
        """The images of a split, or `limit` of them, the same for ever; never flipped, and the last batch may be smaller."""
        images = {"train": self.train, "validation": self.validation, "test": self.test}[
            split
        ].images
        generator = torch.Generator(self.device).manual_seed(0)  # of what is drawn anew elsewhere
        for indices in hashed_subset(len(images), limit).split(size):
            yield self._levels(images, indices, generator)

    def _permutation(self, epoch: int, seed: int) -> Tensor:
        known, order = self._order
        if known != (epoch, seed):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
            order = torch.randperm(len(self.train), generator=generator)
            self._order = (epoch, seed), order  # at once, since two threads may draw
        return order

    def _levels(self, images: Tensor, indices: Tensor, generator: torch.Generator) -> Tensor:
        chosen = images[indices.to(images.device)]
        if chosen.device.type != self.device.type:
            chosen = chosen.pin_memory().to(self.device, non_blocking=True)
        if self.dynamic and images is self.train.images:
            chosen = binarize(chosen, generator)
        return chosen >> (8 - self.bits)


def binarize(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """255 with probability value / 255, else 0."""
    uniform = torch.randint(
        255, images.shape, generator=generator, device=images.device, dtype=torch.uint8
    )
    return (images > uniform).to(torch.uint8) * 255


def random_shift(images: Tensor, by: Tensor) -> Tensor:
    """Each image (N, C, H, W) moved down and to the right by its own `by` (N, 2) pixels; what comes in repeats the border."""
    height, width = images.shape[2:]
    rows = (
        (torch.arange(height, device=images.device) - by[:, :1])
        .clamp(0, height - 1)[:, None, :, None]
        .expand(images.shape)
    )
    columns = (
        (torch.arange(width, device=images.device) - by[:, 1:])
        .clamp(0, width - 1)[:, None, None]
        .expand(images.shape)
    )
    return images.gather(2, rows).gather(3, columns)
