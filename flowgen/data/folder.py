"""Any folder or zip of images, the layout of CelebA among them."""

import logging
from itertools import accumulate, pairwise

import torch

from flowgen.data.base import Images
from flowgen.data.cache import prepared
from flowgen.data.lists import Attributes, folder_labels, read_attributes, split_names
from flowgen.data.locate import locate
from flowgen.data.source import Source, open_source
from flowgen.data.splits import Split
from flowgen.errors import FlowgenError, check_choice, check_whole

log = logging.getLogger("flowgen")


class ImageFolder(Images):
    """The images of a folder, of a zip, or of a folder that holds one zip, prepared once and kept in a cache.

    The splits are CelebA's official ones where their list lies with the images, else a tenth of the names each, chosen by their
    hash, is for validation and for the test. Classes are the two of `attribute` in CelebA's list, else the subfolders, where there
    are at least two and every image lies in one. `cure` says where the data is to be had. Raises FlowgenError where `root` is missing
    or holds no image, and where `attribute` is not to be found.
    """

    def __init__(
        self,
        *,
        root: str | None,
        names: list[str],
        cure: str,
        channels: int,
        size: int,
        bits: int,
        flip: bool,
        crop: int | None,
        binarise: str = "threshold",
        attribute: str | None = None,
        shift: int = 0,
    ):
        check_choice((1, 3), channels=channels)
        check_whole(size=size, **({} if crop is None else {"crop": crop}))
        source = open_source(locate(root, names, cure))
        splits = split_names(source)
        names = [name for split in splits for name in split]
        known = attributes_of(source, names, attribute)
        labels = known.labels(attribute) if known and attribute else folder_labels(names)
        images, kept = prepared(source, names, size, channels, crop)
        usable = torch.tensor([name in kept for name in names])
        whole = Split(images, *(None if values is None else values[usable] for values in (labels, known and known.values)))
        ends = [0, *accumulate(int(part.sum()) for part in usable.split([len(split) for split in splits]))]
        train, validation, test = (whole[slice(*ends_of)] for ends_of in pairwise(ends))
        names_known = known.names if known else ()
        super().__init__(train, validation, test, bits=bits, flip=flip, binarise=binarise, attributes=names_known, shift=shift)


def attributes_of(source: Source, names: list[str], wanted: str | None) -> Attributes | None:
    """CelebA's attributes; a list that cannot be used is no more than a warning where none of them is `wanted`."""
    try:
        known = read_attributes(source, names)
    except FlowgenError as error:
        if wanted:
            raise
        log.warning("the images' attributes are left out: %s", error)
        return None
    if wanted and known is None:
        raise FlowgenError(f"data.attribute={wanted} needs CelebA's list_attr_celeba.txt with the images: put it there, or leave it out")
    return known
