"""What lists and folders say of images: CelebA's official splits and attributes, and a class for each subfolder."""

import logging
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from flowgen.data.cache import cached_images
from flowgen.data.dataset import ImageDataset, Split, find_dataset, hash_split
from flowgen.data.preprocess import ImageSource, open_source
from flowgen.utils.errors import UserError, check_choice, check_whole

PARTITION = (
    "list_eval_partition"  # lines of a file's name and 0 (train), 1 (validation) or 2 (test)
)
ATTRIBUTES = "list_attr_celeba"  # how many images there are, the attributes' names, then lines of a file's name and as many -1 or 1
log = logging.getLogger("flowgen")


class Attributes(NamedTuple):
    """The attributes' names and, for each image, which of them it has: bool (N, names)."""

    names: tuple[str, ...]
    values: Tensor

    def labels(self, name: str) -> Tensor:
        """1 where an image has the attribute, else 0: (N,). Raises FlowgenError for one that is not there, or tells no images apart."""
        if name not in self.names:
            raise UserError(
                f"data.attribute={name} is not there: choose one of {', '.join(self.names)}"
            )
        labels = self.values[:, self.names.index(name)].to(torch.uint8)
        if labels.min() == labels.max():
            raise UserError(
                f"{'every' if labels.max() else 'no'} image has data.attribute={name}: choose another"
            )
        return labels


def split_names(source: ImageSource) -> tuple[list[str], list[str], list[str]]:
    """Names of training, validation and test images: CelebA's official splits where their list lies with the images, else by hash."""
    return official_split(source) or hash_split(source.names)


def official_split(source: ImageSource) -> tuple[list[str], list[str], list[str]] | None:
    """What CelebA's list says of the images; None where there is none, or, with a warning, where it does not speak of all of them."""
    found = source.find_list(PARTITION)
    if found is None:
        return None
    place, rows = found
    number = {row[0]: row[1] for row in rows if len(row) == 2}
    missing = [name for name in source.names if _file(name) not in number]
    if missing:
        log.warning(
            "%s does not name %s and %d others: the split goes by hash",
            place,
            missing[0],
            len(missing) - 1,
        )
        return None
    train, validation, test = (
        [name for name in source.names if number[_file(name)] == each] for each in ("0", "1", "2")
    )
    if not (train and validation and test):
        counts = f"{len(train)}, {len(validation)} and {len(test)}"
        log.warning(
            "%s leaves %s images for training, validation and the test: the split goes by hash",
            place,
            counts,
        )
        return None
    return train, validation, test


def read_attributes(source: ImageSource, names: Sequence[str]) -> Attributes | None:
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
    if (
        not header
        or count not in (None, str(len(rows)))
        or any(len(values) != len(header) for values in has.values())
    ):
        raise UserError(
            f"{place} is cut short, or no list of CelebA's attributes: get it again, or move it away"
        )
    missing = [name for name in names if _file(name) not in has]
    if missing:
        raise UserError(
            f"{place} does not name {missing[0]} and {len(missing) - 1} others: get the list of these images"
        )
    table = [has[_file(name)] for name in names]
    if not {value for values in table for value in values} <= {"1", "-1"}:
        raise UserError(f"{place} holds other values than -1 and 1: get it again, or move it away")
    return Attributes(
        tuple(header), torch.tensor([[value == "1" for value in values] for values in table])
    )


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


class ImageFolder(ImageDataset):
    """The images of a folder, of a zip, or of a folder that holds one zip, prepared once and kept in a cache.

    The splits are CelebA's official ones where their list lies with the images, else a tenth of the names each, chosen by their
    hash, is for validation and for the test. Classes are the two of `attribute` in CelebA's list, else the subfolders, where there
    are at least two and every image lies in one. `download_hint` says where the data is to be had. Raises FlowgenError where `root` is missing
    or holds no image, and where `attribute` is not to be found.
    """

    def __init__(
        self,
        *,
        root: str | None,
        search_dirs: list[str],
        download_hint: str,
        channels: int,
        size: int,
        bits: int,
        random_flip: bool,
        crop: int | None,
        binarization: str = "threshold",
        attribute: str | None = None,
        random_shift: int = 0,
    ):
        check_choice((1, 3), channels=channels)
        check_whole(size=size, **({} if crop is None else {"crop": crop}))
        source = open_source(find_dataset(root, search_dirs, download_hint))
        splits = split_names(source)
        names = [name for split in splits for name in split]
        known = attributes_of(source, names, attribute)
        labels = known.labels(attribute) if known and attribute else folder_labels(names)
        images, kept = cached_images(source, names, size, channels, crop)
        usable = torch.tensor([name in kept for name in names])
        whole = Split(
            images,
            *(
                None if values is None else values[usable]
                for values in (labels, known and known.values)
            ),
        )
        ends = [
            0,
            *accumulate(int(part.sum()) for part in usable.split([len(split) for split in splits])),
        ]
        train, validation, test = (whole[slice(*ends_of)] for ends_of in pairwise(ends))
        names_known = known.names if known else ()
        super().__init__(
            train,
            validation,
            test,
            bits=bits,
            random_flip=random_flip,
            binarization=binarization,
            attributes=names_known,
            random_shift=random_shift,
        )


def attributes_of(source: ImageSource, names: list[str], wanted: str | None) -> Attributes | None:
    """CelebA's attributes; a list that cannot be used is no more than a warning where none of them is `wanted`."""
    try:
        known = read_attributes(source, names)
    except UserError as error:
        if wanted:
            raise
        log.warning("the images' attributes are left out: %s", error)
        return None
    if wanted and known is None:
        raise UserError(
            f"data.attribute={wanted} needs CelebA's list_attr_celeba.txt with the images: put it there, or leave it out"
        )
    return known
