"""Data sets with fixed training, validation and test splits and a reproducible order."""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from flowgen.data.splits import Split, hashed_subset
from flowgen.utils.errors import UserError, check_choice, check_whole
from flowgen.utils.memory import free_memory

Batch = tuple[Tensor, Tensor | None]  # images and their labels
Size = int | Sequence[int]  # of images in pixels: one number for squares, or [height, width]


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
        train_batch: `ImageDataset.train_batch`, which is called with the same `rows` every time.
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
            random.Random(f"data {seed} {images_seen}").getrandbits(63)
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
