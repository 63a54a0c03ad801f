"""Street View House Numbers: 99,289 colour images of 32x32 from photographs, with their own test split. Netzer et al. (2011)."""

import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from flowgen.data.dataset import (
    ImageDataset,
    Split,
    check_names,
    data_folder,
    download,
    find_dataset,
    validation_mask,
)
from flowgen.utils.errors import UserError

URL = "http://ufldl.stanford.edu/housenumbers/"
MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}
MATRIX, COMPRESSED = 14, 15  # types of data elements, by the format's table 1-1
NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d"}
HEADER = 128


class SVHN(ImageDataset):
    """The cropped digits, of classes 0 to 9; downloaded where they are missing and `root` is not given."""

    def __init__(
        self,
        *,
        root: str | None,
        search_dirs: list[str],
        bits: int,
        random_flip: bool,
        binarization: str = "threshold",
        random_shift: int = 0,
    ):
        check_names(search_dirs)
        if (
            root is None
            and search_dirs
            and not any((data_folder() / name).exists() for name in search_dirs)
        ):
            for file, md5 in MD5.items():
                download(URL + file, md5, data_folder() / search_dirs[0])
        folder = find_dataset(
            root,
            search_dirs,
            f"point data.root at the folder with train_32x32.mat and test_32x32.mat, from {URL}",
        )
        train, test = (_read(folder / file) for file in MD5)
        apart = validation_mask(len(train))
        super().__init__(
            train[~apart],
            train[apart],
            test,
            bits=bits,
            random_flip=random_flip,
            binarization=binarization,
            random_shift=random_shift,
        )


def _read(path: Path) -> Split:
    """X (32, 32, 3, N) and y (N, 1), of which 10 is the digit 0."""
    try:
        arrays = read_mat(path.read_bytes())
        images, labels = arrays["X"], arrays["y"].flatten().long()
        if (
            images.dtype != torch.uint8
            or images.shape != (32, 32, 3, len(labels))
            or not len(labels)
        ):
            raise ValueError
        if labels.min() < 1 or labels.max() > 10:
            raise ValueError
    except (OSError, ValueError, KeyError, struct.error, zlib.error) as error:
        raise UserError(
            f"{path} is missing, cut short or no file of SVHN: get it again from {URL}"
        ) from error
    return Split(images.permute(3, 2, 0, 1).contiguous(), labels % 10)


def read_mat(data: bytes) -> dict[str, Tensor]:
    """The numeric arrays of a MAT file of level 5, by name. Format: MathWorks, MAT-File Format, chapter 1.

    Raises ValueError, KeyError, struct.error or zlib.error for what is none.
    """
    if (
        len(data) < HEADER or data[126:128] != b"IM"
    ):  # the order of these two is that of all bytes: the little end first
        raise ValueError("no MAT file of level 5")
    found = {}
    for kind, content in _elements(data[HEADER:]):
        if kind == COMPRESSED:
            (kind, content), *_ = _elements(zlib.decompress(content))
        if kind == MATRIX:
            _, (_, shape), (_, name), (number, values), *_ = _elements(content)
            found[name.decode("ascii")] = _array(
                values, NUMBERS[number], struct.unpack(f"<{len(shape) // 4}i", shape)
            )
    return found


def _elements(data: bytes) -> list[tuple[int, bytes]]:
    """The type and the content of one data element after the other; what is small stands within its tag."""
    found, place = [], 0
    while place < len(data):
        kind, size = struct.unpack_from("<II", data, place)
        small = kind >> 16
        start, size = (place + 4, small) if small else (place + 8, size)
        content = data[start : start + size]
        if len(content) < size:
            raise ValueError("cut short")
        found.append((kind & 0xFFFF, content))
        end = start + max(size, 4 if small else 0)
        place = end if kind == COMPRESSED else place + 8 if small else end + -end % 8
    return found


def _array(values: bytes, kind: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers whose first dimension runs fastest."""
    if len(values) != math.prod(shape) * struct.calcsize(kind):
        raise ValueError("of another size than it says")
    names = {
        "b": torch.int8,
        "B": torch.uint8,
        "h": torch.int16,
        "H": torch.uint16,
        "i": torch.int32,
        "I": torch.uint32,
    }
    dtype = names.get(kind, torch.float32 if kind == "f" else torch.float64)
    return (
        torch.frombuffer(bytearray(values), dtype=dtype)
        .view(*reversed(shape))
        .permute(*reversed(range(len(shape))))
    )
