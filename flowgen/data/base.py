"""Images in memory, drawn in batches on the device."""

from collections.abc import Iterator

import torch
from torch import Tensor

from flowgen.errors import FlowgenError, check_choice, check_whole


class Images:
    """A training and a test split of uint8 images, (N, channels, height, width), kept at 8 bits and handed out at `bits`.

    Both stay where they are, in memory or memory-mapped, until `to` moves them to a device that has room.
    """

    def __init__(self, train: Tensor, test: Tensor, *, bits: int, flip: bool):
        check_whole(bits=bits)
        check_choice(range(1, 9), bits=bits)
        check_choice((True, False), flip=flip)
        if not len(train) or not len(test):
            raise FlowgenError(f"{len(train)} training and {len(test)} test images are too few: at least one of each is needed")
        self.train, self.test = train, test
        self.bits, self.flip = bits, flip
        self.device = torch.device("cpu")
        self._order_of, self._order = (-1, 0), torch.empty(0)

    def to(self, device: torch.device) -> "Images":
        """Hand out batches on `device`, and keep the images there where they fill at most half of its free memory."""
        self.device = device
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self.train.nbytes + self.test.nbytes < free // 2:
                self.train, self.test = self.train.to(device), self.test.to(device)
        return self

    def draw(self, seen: int, count: int, seed: int) -> Tensor:
        """The next `count` training images after `seen` of them: levels, flipped at random where `flip` is set.

        Every epoch is a permutation that `seed` and its number alone decide, so `seen` is the whole place in the data.
        """
        pieces, wanted = [], count
        while wanted:
            epoch, place = divmod(seen, len(self.train))
            pieces.append(self._permutation(epoch, seed)[place : place + wanted])
            seen, wanted = seen + len(pieces[-1]), wanted - len(pieces[-1])
        levels = self._levels(self.train, torch.cat(pieces))
        if self.flip:
            mirrored = torch.rand(count, 1, 1, 1, device=self.device) < 0.5
            levels = torch.where(mirrored, levels.flip(3), levels)
        return levels

    def batches(self, split: str, size: int, limit: int | None = None) -> Iterator[Tensor]:
        """The first `limit` images of a split, in order, never flipped; the last batch may be smaller."""
        images = {"train": self.train, "test": self.test}[split]
        for indices in torch.arange(min(limit or len(images), len(images))).split(size):
            yield self._levels(images, indices)

    def _permutation(self, epoch: int, seed: int) -> Tensor:
        if self._order_of != (epoch, seed):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            self._order_of, self._order = (epoch, seed), torch.randperm(len(self.train), generator=generator)
        return self._order

    def _levels(self, images: Tensor, indices: Tensor) -> Tensor:
        return images[indices.to(images.device)].to(self.device, non_blocking=True) >> (8 - self.bits)
