"""Images in memory, drawn in batches on the device."""

import random
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from flowgen.costs import free_memory
from flowgen.data.ahead import Ahead
from flowgen.data.splits import Split, part
from flowgen.errors import FlowgenError, check_choice, check_whole

BINARISE = ("threshold", "once", "anew")


class Images:
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
        flip: bool,
        binarise: str = "threshold",
        attributes: tuple[str, ...] = (),
        shift: int = 0,
    ):
        check_whole(bits=bits)
        check_whole(0, train.images.shape[-1] - 1, shift=shift)
        check_choice(range(1, 9), bits=bits)
        check_choice((True, False), flip=flip)
        check_choice(BINARISE, binarise=binarise)
        if not (len(train) and len(validation) and len(test)):
            counts = f"{len(train)} training, {len(validation)} validation and {len(test)} test images"
            raise FlowgenError(f"{counts} are too few: at least one of each is needed")
        self.anew = bits == 1 and binarise == "anew"
        if bits == 1 and binarise != "threshold":
            generator = torch.Generator().manual_seed(0)
            test, validation = (replace(split, images=binarised(split.images, generator)) for split in (test, validation))
            train = train if self.anew else replace(train, images=binarised(train.images, generator))
        self.train, self.validation, self.test = train, validation, test
        self.bits, self.flip, self.attributes, self.shift = bits, flip, attributes, shift
        self.device = torch.device("cpu")
        self._order: tuple[tuple[int, int], Tensor] = (-1, 0), torch.empty(0)
        self._ahead: Ahead | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int | None:
        """How many classes the labels tell apart, where there are any."""
        labels = [split.labels for split in (self.train, self.validation, self.test) if split.labels is not None]
        return 1 + int(torch.cat(labels).max()) if labels else None

    def to(self, device: torch.device) -> "Images":
        """Hand out batches on `device`, and keep the images there where they fill at most half of its free memory; else read ahead."""
        self.device = device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
        splits = (self.train, self.validation, self.test)
        if sum(split.images.nbytes for split in splits) > free // 2:
            self._ahead = Ahead(self.draw)
        elif device.type == "cuda":
            self.train, self.validation, self.test = (replace(split, images=split.images.to(device)) for split in splits)
        return self

    def next(self, seen: int, count: int, seed: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What `draw` gives, for a training that goes on from there: the batch after it may be read meanwhile."""
        return (self._ahead or self.draw)(seen, count, seed, rows)

    def draw(self, seen: int, count: int, seed: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The next `count` training images after `seen` of them, flipped at random where `flip` is set, and their labels, if there are any.

        They are moved at random by up to `shift` pixels each way, and their borders repeated. Every epoch is a permutation that `seed` and
        its number alone decide, and flips, moves and bits that are drawn anew are those of `seed` and `seen`: the whole place in the data.
        Of all these images those at the places `rows` are handed out.
        """
        generator = torch.Generator(self.device).manual_seed(random.Random(f"{seed} {seen}").getrandbits(63))
        pieces, wanted = [], count
        while wanted:
            epoch, place = divmod(seen, len(self.train))
            pieces.append(self._permutation(epoch, seed)[place : place + wanted])
            seen, wanted = seen + len(pieces[-1]), wanted - len(pieces[-1])
        indices = torch.cat(pieces)
        mine = slice(None) if rows is None else rows
        early = slice(None) if self.anew else mine  # bits that are drawn anew are drawn of all
        levels = self._levels(self.train.images, indices[early], generator)
        levels = levels[mine] if self.anew else levels
        labels = None if self.train.labels is None else self.train.labels[indices[mine]].to(self.device, torch.long)
        if self.flip:
            mirrored = torch.rand(count, 1, 1, 1, generator=generator, device=self.device) < 0.5
            levels = torch.where(mirrored[mine], levels.flip(3), levels)
        if self.shift:
            by = torch.randint(-self.shift, self.shift + 1, (count, 2), generator=generator, device=self.device)
            levels = moved(levels, by[mine])
        return levels, labels

    def batches(self, split: str, size: int, limit: int | None = None) -> Iterator[Tensor]:
        """The images of a split, or `limit` of them, the same for ever; never flipped, and the last batch may be smaller."""
        images = {"train": self.train, "validation": self.validation, "test": self.test}[split].images
        generator = torch.Generator(self.device).manual_seed(0)  # of what is drawn anew elsewhere
        for indices in part(len(images), limit).split(size):
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
        if self.anew and images is self.train.images:
            chosen = binarised(chosen, generator)
        return chosen >> (8 - self.bits)


def binarised(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """255 with probability value / 255, else 0."""
    uniform = torch.randint(255, images.shape, generator=generator, device=images.device, dtype=torch.uint8)
    return (images > uniform).to(torch.uint8) * 255


def moved(images: Tensor, by: Tensor) -> Tensor:
    """Each image (N, C, H, W) moved down and to the right by its own `by` (N, 2) pixels; what comes in repeats the border."""
    height, width = images.shape[2:]
    rows = (torch.arange(height, device=images.device) - by[:, :1]).clamp(0, height - 1)[:, None, :, None].expand(images.shape)
    columns = (torch.arange(width, device=images.device) - by[:, 1:]).clamp(0, width - 1)[:, None, None].expand(images.shape)
    return images.gather(2, rows).gather(3, columns)
