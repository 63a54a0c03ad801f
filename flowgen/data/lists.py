"""What lists and folders say of images: CelebA's official splits and attributes, and a class for each subfolder."""

import logging
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from flowgen.data.source import Source
from flowgen.data.splits import split_by_hash
from flowgen.errors import FlowgenError

PARTITION = "list_eval_partition"  # lines of a file's name and 0 (train), 1 (validation) or 2 (test)
ATTRIBUTES = "list_attr_celeba"  # how many images there are, the attributes' names, then lines of a file's name and as many -1 or 1
log = logging.getLogger("flowgen")


class Attributes(NamedTuple):
    """The attributes' names and, for each image, which of them it has: bool (N, names)."""

    names: tuple[str, ...]
    values: Tensor

    def labels(self, name: str) -> Tensor:
        """1 where an image has the attribute, else 0: (N,). Raises FlowgenError for one that is not there, or tells no images apart."""
        if name not in self.names:
            raise FlowgenError(f"data.attribute={name} is not there: choose one of {', '.join(self.names)}")
        labels = self.values[:, self.names.index(name)].to(torch.uint8)
        if labels.min() == labels.max():
            raise FlowgenError(f"{'every' if labels.max() else 'no'} image has data.attribute={name}: choose another")
        return labels


def split_names(source: Source) -> tuple[list[str], list[str], list[str]]:
    """Names of training, validation and test images: CelebA's official splits where their list lies with the images, else by hash."""
    return official_split(source) or split_by_hash(source.names)


def official_split(source: Source) -> tuple[list[str], list[str], list[str]] | None:
    """What CelebA's list says of the images; None where there is none, or, with a warning, where it does not speak of all of them."""
    found = source.find_list(PARTITION)
    if found is None:
        return None
    place, rows = found
    number = {row[0]: row[1] for row in rows if len(row) == 2}
    missing = [name for name in source.names if _file(name) not in number]
    if missing:
        log.warning("%s does not name %s and %d others: the split goes by hash", place, missing[0], len(missing) - 1)
        return None
    train, validation, test = ([name for name in source.names if number[_file(name)] == each] for each in ("0", "1", "2"))
    if not (train and validation and test):
        counts = f"{len(train)}, {len(validation)} and {len(test)}"
        log.warning("%s leaves %s images for training, validation and the test: the split goes by hash", place, counts)
        return None
    return train, validation, test


def read_attributes(source: Source, names: Sequence[str]) -> Attributes | None:
    """What CelebA's list says of the images `names`, where it lies with them.

    Raises FlowgenError where it is cut short, is no list of attributes, or does not name every image.
    """
    found = source.find_list(ATTRIBUTES)
    if found is None:
        return None
    place, rows = found
    count = rows.pop(0)[0] if rows and len(rows[0]) == 1 else None
    header = [word for word in rows.pop(0) if word != "image_id"] if rows else []
    has = {name: values for name, *values in rows}
    if not header or count not in (None, str(len(rows))) or any(len(values) != len(header) for values in has.values()):
        raise FlowgenError(f"{place} is cut short, or no list of CelebA's attributes: get it again, or move it away")
    missing = [name for name in names if _file(name) not in has]
    if missing:
        raise FlowgenError(f"{place} does not name {missing[0]} and {len(missing) - 1} others: get the list of these images")
    table = [has[_file(name)] for name in names]
    if not {value for values in table for value in values} <= {"1", "-1"}:
        raise FlowgenError(f"{place} holds other values than -1 and 1: get it again, or move it away")
    return Attributes(tuple(header), torch.tensor([[value == "1" for value in values] for values in table]))


def folder_labels(names: Sequence[str]) -> Tensor | None:
    """The class of every image, (N,): the places of their subfolders in sorted order; None where some lie in none, or all in one."""
    parents = [PurePosixPath(name).parent.parts for name in names]
    shared = 0
    while len({parts[: shared + 1] for parts in parents}) == 1 and len(parents[0]) > shared:
        shared += 1
    folders = [parts[shared : shared + 1] for parts in parents]
    if () in folders:
        return None
    place = {folder: number for number, folder in enumerate(sorted(set(folders)))}
    return torch.tensor([place[folder] for folder in folders])


def _file(name: str) -> str:
    return PurePosixPath(name).name
