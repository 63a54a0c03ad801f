"""Data sets with fixed training, validation and test splits and a reproducible order."""

import hashlib
import http.client
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath

import torch
from filelock import FileLock
from torch import Tensor

from flowgen.utils.console import log
from flowgen.utils.errors import UserError, check_choice, check_whole
from flowgen.utils.files import data_folder
from flowgen.utils.memory import free_memory

VALIDATION_DIVISOR = 12  # one of 12 training images is a validation image

Batch = tuple[Tensor, Tensor | None]  # images and their labels
Size = int | Sequence[int]  # of images in pixels: one number for squares, or [height, width]


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one split, with labels and attributes if they have any.

    Args:
        images: 8-bit pixel values, uint8 (N, channels, height, width).
        labels: Class of each image, (N,).
        attributes: Attributes of each image, bool (N, number of attributes).
        gray: 8-bit images before random binarization, used to find duplicates; else None.
    """

    images: Tensor
    labels: Tensor | None = None
    attributes: Tensor | None = None
    gray: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | slice) -> "Split":
        return Split(
            **{name: value[index] for name, value in vars(self).items() if value is not None}
        )


def height_and_width(size: Size) -> tuple[int, int]:
    """Return the height and width that `data.size` stands for.

    Example:
        >>> height_and_width(64), height_and_width([48, 64])
        ((64, 64), (48, 64))
    """
    numbers = [size, size] if isinstance(size, int) else size
    if not isinstance(numbers, Sequence) or isinstance(numbers, str) or len(numbers) != 2:
        raise UserError(f"size must be a whole number or [height,width], not {size!r}")
    for number in numbers:
        check_whole(size=number)
    return numbers[0], numbers[1]


def shortest_size(size: Size) -> int | list[int]:
    """Return `data.size` as one number for squares, else as [height, width]."""
    height, width = height_and_width(size)
    return height if height == width else [height, width]


@cache
def hashed_order(count: int) -> Tensor:
    """Return 0..count-1 sorted by the SHA-256 of each number, (count,).

    This permutation is independent of any RNG version.
    """
    digests = [hashlib.sha256(b"%d" % number).digest() for number in range(count)]
    return torch.tensor(sorted(range(count), key=digests.__getitem__), dtype=torch.long)


def hashed_validation_split(images: Split) -> tuple[Split, Split]:
    """Split off one in twelve training images for validation, chosen by the hash of its index.

    Returns:
        Training and validation images: 55,000 and 5,000 of the 60,000 of MNIST.
    """
    count = len(images)
    chosen = hashed_order(count)[: max(1, count // VALIDATION_DIVISOR)]
    is_validation = torch.isin(torch.arange(count), chosen)
    return images[~is_validation], images[is_validation]


def hashed_subset(count: int, limit: int | None) -> Tensor:
    """Return the sorted indices of `limit` of `count` images, chosen by hash, (n,).

    The subsets are nested: a larger limit adds images and removes none.

    Args:
        count: Number of images.
        limit: Size of the subset. None, or `count` and more: all images.
    """
    return hashed_order(count)[:limit].sort().values


def hashed_split(names: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Split file names 8:1:1 into training, validation and test, by the hash of each name.

    The hash ignores directories, and an image stays in its split when others are added. Each split
    of three or more names has at least one name.
    """
    part = {name: hash_name(name) % 10 for name in names}
    test = {name for name in names if part[name] == 0} or set(sorted(names, key=hash_name)[:1])
    rest = [name for name in names if name not in test]
    validation = {name for name in rest if part[name] == 1} or set(sorted(rest, key=hash_name)[:1])
    return (
        [name for name in rest if name not in validation],
        [name for name in names if name in validation],
        [name for name in names if name in test],
    )


def hash_name(name: str) -> int:
    """Return the first 8 bytes of the SHA-256 of a file's name, without its directories."""
    data = PurePosixPath(name).name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def find_dataset(
    root: str | None,
    search_dirs: Sequence[str],
    download_hint: str,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Return the path of a data set, and download it first if necessary and possible.

    Args:
        root: The path itself, or None to search for it.
        search_dirs: Names to look for in `data_folder()`, in this order. A configuration from a
            stranger must not read or write outside of it.
        download_hint: How to get the data, as one or two full sentences. The error message is
            "PATH does not exist." and the hint.
        files: The MD5 checksum of every file that can be downloaded, by its URL. They are
            downloaded to the first of `search_dirs`.

    Raises:
        UserError: If the path does not exist, or no name was found.
    """
    if not all(
        isinstance(name, str)
        and name
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
        for name in search_dirs
    ):
        raise UserError(
            f"data.search_dirs={list(search_dirs)!r} must be names of directories inside the "
            "data folder: set data.root to use another place"
        )
    paths = (
        [data_folder() / name for name in search_dirs]
        if root is None
        else [Path(root).expanduser()]
    )
    path = next(filter(Path.exists, paths), None)
    if path is None:
        if root is not None or not paths or not files:
            problem = f"{paths[0]} does not exist" if paths else "data.root is not set"
            raise UserError(f"{problem}. {download_hint}")
        path = paths[0]
        download(files, path)
    return path


def download(files: Mapping[str, str], folder: Path) -> None:
    """Download files to a new folder, which is created atomically when all are complete.

    An interrupted download continues with the missing files.

    Args:
        files: MD5 checksum of every file, by its URL.
        folder: The new folder.

    Raises:
        UserError: If a file cannot be downloaded or has another checksum.
    """
    partial = folder.with_name(f".{folder.name}.part")
    url = ""
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # one process downloads
            if folder.exists():
                return
            partial.mkdir(parents=True, exist_ok=True)
            for url, md5 in files.items():
                path = partial / url.rpartition("/")[2]
                if not path.is_file() or _md5(path) != md5:
                    log.info("downloading %s", url)
                    torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
                    if _md5(path) != md5:
                        path.unlink()
                        raise OSError("its checksum is wrong")
            partial.rename(folder)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{url or folder} could not be downloaded ({error}). "
            f"Download it to {folder} yourself, or set data.root to its folder."
        ) from error


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@lru_cache(maxsize=2)  # of the last epoch and of the next one, which may be prefetched
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the training images in an epoch, a permutation (count,).

    Args:
        count: Number of training images.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)


class Prefetcher:
    """Prefetch the next training batch in a background thread.

    The batches are the same as without prefetching, since each depends on its arguments alone.

    Args:
        train_batch: `ImageDataset.train_batch`.
    """

    def __init__(self, train_batch: Callable[..., Batch]):
        self.train_batch = train_batch
        self.pool = ThreadPoolExecutor(1, "prefetch")
        self.futures: dict[tuple[int, int, int], Future[Batch]] = {}

    def __call__(
        self, images_seen: int, batch_size: int, seed: int, rows: Tensor | None = None
    ) -> Batch:
        future = self.futures.get((images_seen, batch_size, seed))
        batch = future.result() if future else self.train_batch(images_seen, batch_size, seed, rows)
        following = (images_seen + batch_size, batch_size, seed)
        self.futures = {following: self.pool.submit(self.train_batch, *following, rows)}
        return batch


class ImageDataset:
    """Training, validation and test images, with labels and attributes if they have any.

    Images are stored as 8-bit, in memory or memory-mapped, and returned at `bits` bit depth. Every
    batch depends on its arguments alone, so that a resumed training run sees the same images.

    Args:
        train: Training images.
        validation: Validation images.
        test: Test images.
        bits: Bits of a pixel value, 1 to 8. Pixel values are 0..2^bits-1.
        random_flip: Mirror half of the training images, chosen at random.
        random_shift: Shift training images at random by up to this many pixels in each direction,
            with edge padding.
        binarization: For `bits=1`. "threshold": a pixel is 1 if its 8-bit value is at least 128.
            "static": it is 1 with probability value / 255, drawn once. "dynamic": it is drawn
            again for every training batch; validation and test images are static.
        attributes: Names of the attributes of the splits.

    Example:
        >>> import torch
        >>> from flowgen.data import ImageDataset, Split
        >>> images = torch.arange(10 * 3 * 4 * 4).view(10, 3, 4, 4).remainder(256).byte()
        >>> data = ImageDataset(Split(images), Split(images[:2]), Split(images[:2]), bits=5)
        >>> data.image_shape, data.bits, data.num_classes
        ((3, 4, 4), 5, None)
        >>> batch, labels = data.train_batch(images_seen=0, batch_size=6, seed=0)
        >>> batch.shape, batch.dtype, int(batch.max())
        (torch.Size([6, 3, 4, 4]), torch.uint8, 31)
    """

    def __init__(
        self,
        train: Split,
        validation: Split,
        test: Split,
        *,
        bits: int = 8,
        random_flip: bool = False,
        random_shift: int = 0,
        binarization: str = "threshold",
        attributes: tuple[str, ...] = (),
    ):
        check_whole(1, 8, bits=bits)
        check_whole(0, min(train.images.shape[2:]) - 1, random_shift=random_shift)
        check_choice((True, False), random_flip=random_flip)
        check_choice(("threshold", "static", "dynamic"), binarization=binarization)
        if not (len(train) and len(validation) and len(test)):
            raise UserError(
                f"{len(train)} training, {len(validation)} validation and {len(test)} test images "
                "are too few: at least one of each is needed"
            )
        self.dynamic = bits == 1 and binarization == "dynamic"
        if bits == 1 and binarization != "threshold":
            generator = torch.Generator().manual_seed(0)
            test = replace(test, images=binarize(test.images, generator), gray=test.images)
            validation = replace(validation, images=binarize(validation.images, generator))
            if not self.dynamic:
                train = replace(train, images=binarize(train.images, generator), gray=train.images)
        self.train = train
        self.validation = validation
        self.test = test
        self.bits = bits
        self.random_flip = random_flip
        self.random_shift = random_shift
        self.attributes = attributes
        self.device = torch.device("cpu")
        # Same as `train_batch`; `to` replaces it by a Prefetcher for large data sets.
        self.next_batch: Callable[..., Batch] = self.train_batch

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return tuple(self.train.images.shape[1:])  # type: ignore[return-value]

    @property
    def splits(self) -> dict[str, Split]:
        """Training, validation and test images by the name of the split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None without labels."""
        labels = [split.labels for split in self.splits.values() if split.labels is not None]
        return 1 + int(torch.cat(labels).max()) if labels else None

    def to(self, device: torch.device) -> "ImageDataset":
        """Return batches on `device` from now on.

        Images that fill at most half of its free memory move there. Batches of larger data sets
        are prefetched.
        """
        self.device = device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
        if sum(split.images.nbytes for split in self.splits.values()) > free // 2:
            self.next_batch = Prefetcher(self.train_batch)
        elif device.type == "cuda":
            self.train, self.validation, self.test = (
                replace(split, images=split.images.to(device)) for split in self.splits.values()
            )
        return self

    def train_batch(
        self, images_seen: int, batch_size: int, seed: int, rows: Tensor | None = None
    ) -> Batch:
        """Return a batch of training images, randomly flipped and shifted, and their labels.

        The order of the images in an epoch depends on `seed` and the epoch. Flips, shifts and
        dynamic binarization depend on `seed` and `images_seen`.

        Args:
            images_seen: Number of training images in all batches before this one.
            batch_size: Number of images in the batch.
            seed: Seed of the order and of the random changes.
            rows: Indices of the rows of the batch to return, (n,). All of them by default.

        Returns:
            Images, uint8 (batch_size or n, channels, height, width), and labels, int64, or None.
        """
        generator = torch.Generator(self.device).manual_seed(
            random.Random(f"{seed} {images_seen}").getrandbits(63)
        )
        indices = self._train_indices(images_seen, batch_size, seed)
        selected = slice(None) if rows is None else rows
        if self.dynamic:  # draw for the whole batch, so that `rows` do not change the result
            images = self._load(self.train.images, indices, generator)[selected]
        else:
            images = self._load(self.train.images, indices[selected], generator)
        if self.random_flip:
            uniform = torch.rand(batch_size, 1, 1, 1, generator=generator, device=self.device)
            images = torch.where((uniform < 0.5)[selected], images.flip(3), images)
        if self.random_shift:
            offsets = torch.randint(
                -self.random_shift,
                self.random_shift + 1,
                (batch_size, 2),
                generator=generator,
                device=self.device,
            )
            images = shift_images(images, offsets[selected])
        if self.train.labels is None:
            return images, None
        return images, self.train.labels[indices[selected]].to(self.device, torch.long)

    def batches(self, split: str, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        """Yield the images of a split in a fixed order, without flips and shifts.

        Args:
            split: "train", "validation" or "test".
            batch_size: Number of images in a batch. The last one may be smaller.
            limit: Number of images, chosen by hash. All of them by default.
        """
        images = self.splits[split].images
        generator = torch.Generator(self.device).manual_seed(0)  # for dynamic binarization
        for indices in hashed_subset(len(images), limit).split(batch_size):
            yield self._load(images, indices, generator)

    def _train_indices(self, images_seen: int, count: int, seed: int) -> Tensor:
        """Return the indices of the next `count` training images, across epochs."""
        size = len(self.train)
        positions = torch.arange(images_seen, images_seen + count)
        return torch.cat(
            [
                epoch_order(size, seed, epoch)[positions[positions // size == epoch] % size]
                for epoch in (positions // size).unique().tolist()
            ]
        )

    def _load(self, images: Tensor, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Return images with `bits` bits on the device."""
        batch = images[indices.to(images.device)]
        if batch.device.type != self.device.type:
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        if self.dynamic and images is self.train.images:
            batch = binarize(batch, generator)
        return batch >> (8 - self.bits)


def binarize(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Binarize 8-bit pixel values at random: v becomes 255 with probability v / 255, else 0.

    Args:
        images: Pixel values, uint8 (N, channels, height, width).
        generator: Random number generator on the device of the images.

    Returns:
        Pixel values 0 and 255, uint8, of the same shape.
    """
    uniform = torch.randint(
        255, images.shape, generator=generator, device=images.device, dtype=torch.uint8
    )
    return (images > uniform).to(torch.uint8) * 255


def shift_images(images: Tensor, offsets: Tensor) -> Tensor:
    """Shift images with edge padding.

    Args:
        images: Pixel values, (N, channels, height, width).
        offsets: Pixels to move each image down and to the right, integers (N, 2).
    """
    height, width = images.shape[2:]
    rows = (torch.arange(height, device=images.device) - offsets[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - offsets[:, 1:]).clamp(0, width - 1)
    rows = rows[:, None, :, None].expand(images.shape)
    return images.gather(2, rows).gather(3, columns[:, None, None].expand(images.shape))
