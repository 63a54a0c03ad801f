"""Street View House Numbers: 99,289 color images of 32x32 pixels. Netzer et al. (2011)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowgen.data.dataset import ImageDataset
from flowgen.data.download import find_dataset
from flowgen.data.splits import Split, hashed_validation_split
from flowgen.utils.errors import user_error

URL = "http://ufldl.stanford.edu/housenumbers/"
MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}


class SVHN(ImageDataset):
    """The cropped digits of SVHN. Downloaded if missing and without `root`.

    One in twelve training images is for validation. Reading the files needs the package scipy.

    Args:
        root: A folder with `train_32x32.mat` and `test_32x32.mat`, or None to look for them in
            the data folder.
        search_dirs: Names of the folder in the data folder.
        options: `bits`, `random_flip`, `random_shift` and `binarization` of `ImageDataset`.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        search_dirs: Sequence[str] = ("svhn", "SVHN"),
        **options: Any,
    ):
        folder = find_dataset(
            root,
            search_dirs,
            f"Download {' and '.join(MD5)} from {URL} and set data.root to their folder.",
            {URL + name: md5 for name, md5 in MD5.items()},
        )
        train, validation = hashed_validation_split(_read(folder / "train_32x32.mat"))
        super().__init__(train, validation, _read(folder / "test_32x32.mat"), **options)


def _read(path: Path) -> Split:
    """Read the arrays X, uint8 (32, 32, 3, N), and y, (N, 1), where class 10 is the digit 0."""
    with user_error("data=svhn needs the package scipy: pip install scipy"):
        from scipy.io import loadmat
    with user_error(
        f"{path} is missing, cut short or not a file of SVHN: download it again from {URL}"
    ):
        arrays = loadmat(path, variable_names=["X", "y"])
        images = arrays["X"]
        labels = arrays["y"].flatten()
        if (
            images.dtype != np.uint8
            or images.shape != (32, 32, 3, len(labels))
            or not 1 <= labels.min() <= labels.max() <= 10  # an error for an empty array
        ):
            raise ValueError("other images than those of SVHN")
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1)))
    return Split(pixels, torch.from_numpy(labels.astype(np.int64) % 10))
