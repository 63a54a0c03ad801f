"""Image files of any number, a batch at a time."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowgen.data.base import binarised
from flowgen.data.prepare import prepare, read_levels
from flowgen.data.source import SUFFIXES, Source, open_source
from flowgen.errors import FlowgenError

Batch = tuple[list[str], Tensor]
log = logging.getLogger("flowgen")


class Stream:
    """The images of files, folders and zips, prepared like the data of a model: names, levels (batch, channels, size, size).

    Where `binarise` is not threshold, pixels of one bit are drawn, with `seed`, as `Images` draws them. What lies in a folder or a zip
    and cannot be read is left out and counted. Raises FlowgenError for a path that holds no image.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        size: int,
        channels: int,
        crop: int | None,
        bits: int,
        binarise: str | None = "threshold",
        seed: int = 0,
    ):
        self.how = (size, channels, crop)
        self.bits, self.draws = bits, bits == 1 and binarise not in (None, "threshold")
        self.generator = torch.Generator().manual_seed(seed)
        paths = [path.expanduser() for path in paths]
        self.parts = [path if path.suffix.lower() in SUFFIXES and not path.is_dir() else _open(path) for path in paths]
        self.left_out: list[str] = []

    def __len__(self) -> int:
        return sum(len(part.names) if isinstance(part, Source) else 1 for part in self.parts)

    def batches(self, count: int) -> Iterator[Batch]:
        names: list[str] = []
        images: list[Tensor] = []
        for name, image in self._images():
            names, images = [*names, name], [*images, image]
            if len(names) == count:
                yield names, self._levels(images)
                names, images = [], []
        if names:
            yield names, self._levels(images)
        if self.left_out:
            more = "; ..." * (len(self.left_out) > 3)
            log.warning("%d of %d images left out: %s", len(self.left_out), len(self), "; ".join(self.left_out[:3]) + more)

    def _levels(self, images: list[Tensor]) -> Tensor:
        stacked = torch.stack(images)
        return (binarised(stacked, self.generator) if self.draws else stacked) >> (8 - self.bits)

    def _images(self) -> Iterator[tuple[str, Tensor]]:
        for part in self.parts:
            if isinstance(part, Path):
                yield str(part), read_levels(part, *self.how, 8)[0]
                continue
            for name in part.names:
                try:
                    yield f"{part.path}/{name}", prepare(part.read(name), *self.how)
                except FlowgenError as error:
                    self.left_out.append(f"{name} {error}")
                except Exception as error:  # a damaged archive raises whatever its decompressor does
                    self.left_out.append(f"{name} cannot be read ({error})")


def _open(path: Path) -> Source:
    if not path.exists():
        raise FlowgenError(f"{path} does not exist: name images, or a folder or a zip of them")
    try:
        return open_source(path)
    except FlowgenError as error:
        raise FlowgenError(f"{path} holds no image: name images, or a folder or a zip of them") from error
