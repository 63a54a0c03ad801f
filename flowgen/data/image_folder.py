"""Data sets of image files, with CelebA's official splits and attributes, or a class per folder."""

import os
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from flowgen.data.cache import cached_images
from flowgen.data.dataset import ImageDataset, Size, height_and_width
from flowgen.data.download import find_dataset
from flowgen.data.preprocess import ImageSource, open_source
from flowgen.data.splits import Split, hashed_split
from flowgen.utils.console import log
from flowgen.utils.errors import UserError, check_choice, check_whole

# Names of CelebA's lists. Each line has the name of a file, then
PARTITION_LIST = "list_eval_partition"  # 0 (training), 1 (validation) or 2 (test)
ATTRIBUTE_LIST = "list_attr_celeba"  # -1 or 1 for each attribute; a count and a header come first


class ImageFolder(ImageDataset):
    """Images of a folder, of a zip, or of a folder that contains one zip.

    They are preprocessed once and cached. The splits are CelebA's official ones if its list is next
    to the images. Otherwise a tenth of the images, chosen by the hash of their names, is for
    validation and a tenth for the test. The labels are the two values of `attribute` in CelebA's
    list. Without `attribute`, each subfolder is a class if every image is in one of several.

    Args:
        root: The folder or zip, or None to look for `search_dirs` in the data folder.
        search_dirs: Names of the folder in the data folder.
        download_hint: A sentence that tells the user how to get the images.
        channels: 1 (grayscale) or 3 (RGB).
        size: Height and width that images are resized to, in pixels, or one number for squares.
        crop: Side of a central square that is cut out first, or None.
        attribute: Name of an attribute in CelebA's list, as "Smiling", or None.
        bits: See `ImageDataset`.
        random_flip: See `ImageDataset`.
        options: `random_shift` and `binarization` of `ImageDataset`.

    Raises:
        UserError: If there are no images, or the attribute does not exist.

    Example:
        >>> from flowgen.data import ImageFolder
        >>> faces = ImageFolder(root="celeba.zip", crop=148, size=64)  # doctest: +SKIP
        >>> faces.image_shape  # doctest: +SKIP
        (3, 64, 64)
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        search_dirs: Sequence[str] = (),
        download_hint: str = (
            "Set data.root to a folder of images, to a zip, or to a folder that contains one zip."
        ),
        channels: int = 3,
        size: Size = 64,
        crop: int | None = None,
        attribute: str | None = None,
        bits: int = 5,
        random_flip: bool = True,
        **options: Any,
    ):
        check_choice((1, 3), channels=channels)
        height_and_width(size)  # raises UserError before the images are searched
        if crop is not None:
            check_whole(crop=crop)
        source = open_source(find_dataset(root, search_dirs, download_hint))
        split_lists = split_names(source)
        names = [name for split in split_lists for name in split]
        attribute_names, attributes = load_attributes(source, names, required=bool(attribute))
        labels = (
            attribute_labels(attribute, attribute_names, attributes)
            if attribute
            else folder_labels(names)
        )
        images, usable_names = cached_images(source, names, size, channels, crop)
        usable = torch.tensor([name in usable_names for name in names])
        everything = Split(
            images,
            None if labels is None else labels[usable],
            attributes[usable] if attribute_names else None,
        )
        counts = [int(part.sum()) for part in usable.split([len(names) for names in split_lists])]
        super().__init__(
            *(everything[start:end] for start, end in pairwise([0, *accumulate(counts)])),
            bits=bits,
            random_flip=random_flip,
            attributes=attribute_names,
            **options,
        )


def split_names(source: ImageSource) -> Sequence[list[str]]:
    """Return the names of training, validation and test images.

    They are CelebA's official splits if its list is next to the images, else `hashed_split`. A list
    that does not name every image or leaves a split empty is ignored with a warning.
    """
    path, rows = source.find_list(PARTITION_LIST)
    number = {row[0]: row[1] for row in rows if len(row) == 2}
    named = [name for name in source.names if PurePosixPath(name).name in number]
    splits = [
        [name for name in named if number[PurePosixPath(name).name] == digit] for digit in "012"
    ]
    if all(splits) and len(named) == len(source.names):
        return splits
    if path:
        log.warning(
            "%s names %d of %d images, %d of them for training, %d for validation and %d for the "
            "test: using a split by hash",
            path,
            len(named),
            len(source.names),
            *map(len, splits),
        )
    return hashed_split(source.names)


def load_attributes(
    source: ImageSource, names: Sequence[str], required: bool
) -> tuple[tuple[str, ...], Tensor]:
    """Return the attributes of images as `read_attributes` does.

    An invalid list is an error if attributes are required, and otherwise ignored with a warning.

    Args:
        source: The images.
        names: Their file names.
        required: Whether the data set needs attributes.
    """
    try:
        return read_attributes(source, names)
    except UserError as error:
        if required:
            raise
        log.warning("attributes skipped: %s", error)
        return (), torch.empty(len(names), 0)


def read_attributes(source: ImageSource, names: Sequence[str]) -> tuple[tuple[str, ...], Tensor]:
    """Return the attributes of images in CelebA's list, or no attributes without a list.

    Returns:
        Names of the attributes, and which of them each image has, bool (N, number of names).

    Raises:
        UserError: If the list is cut short, is another list, or does not name every image.
    """
    path, rows = source.find_list(ATTRIBUTE_LIST)
    if not path:
        return (), torch.empty(len(names), 0)
    count = rows.pop(0)[0] if rows and len(rows[0]) == 1 else None
    header = [word for word in rows.pop(0) if word != "image_id"] if rows else []
    values_of = {name: values for name, *values in rows}
    ragged = any(len(values) != len(header) for values in values_of.values())
    if not header or ragged or count not in (None, str(len(rows))):
        raise UserError(
            f"{path} is cut short, or is not CelebA's list of attributes: "
            "download it again or remove it"
        )
    missing = [name for name in names if PurePosixPath(name).name not in values_of]
    if missing:
        raise UserError(
            f"{path} does not name {missing[0]} and {len(missing) - 1} others: "
            "use the list of these images"
        )
    table = [values_of[PurePosixPath(name).name] for name in names]
    if not {value for values in table for value in values} <= {"1", "-1"}:
        raise UserError(
            f"{path} contains other values than -1 and 1: download it again or remove it"
        )
    return tuple(header), torch.tensor([[value == "1" for value in values] for values in table])


def attribute_labels(name: str, attribute_names: Sequence[str], attributes: Tensor) -> Tensor:
    """Return 1 for images with the attribute `name`, else 0, (N,).

    Args:
        name: The attribute.
        attribute_names: Names of all attributes.
        attributes: Their values (N, attributes).

    Raises:
        UserError: If the attribute does not exist, or all images have the same value.
    """
    if not attribute_names:
        raise UserError(
            f"data.attribute={name} needs CelebA's list_attr_celeba.txt: "
            "put it next to the images, or remove data.attribute"
        )
    if name not in attribute_names:
        raise UserError(
            f"data.attribute={name} does not exist: choose one of {', '.join(attribute_names)}"
        )
    labels = attributes[:, attribute_names.index(name)].to(torch.uint8)
    if labels.min() == labels.max():
        raise UserError(
            f"{'every' if labels.max() else 'no'} image has data.attribute={name}: "
            "choose another attribute"
        )
    return labels


def folder_labels(names: Sequence[str]) -> Tensor | None:
    """Return the class of every image, (N,): the index of its subfolder in sorted order.

    Returns None if an image is in no subfolder, or all are in the same one.
    """
    parents = [PurePosixPath(name).parent.parts for name in names]
    depth = len(os.path.commonprefix(parents))  # noqa: RUF071 - of tuples: the shared folders
    folders = [parts[depth : depth + 1] for parts in parents]
    if () in folders:
        return None
    index = {folder: number for number, folder in enumerate(sorted(set(folders)))}
    return torch.tensor([index[folder] for folder in folders])
