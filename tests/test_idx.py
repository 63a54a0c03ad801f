"""idx files, whole and broken."""

import gzip
import os
import struct
from pathlib import Path

import pytest
import torch

from flowgen.data.mnist import MNIST
from flowgen.utils.errors import UserError

ZERO = torch.zeros(7, 28, 28, dtype=torch.uint8)


def write_idx(path: Path, images: torch.Tensor) -> None:
    header = struct.pack(">4i", 0x803, len(images), *images.shape[-2:])
    path.write_bytes(gzip.compress(header + images.numpy().tobytes()))


def write_labels(path: Path, labels: torch.Tensor) -> None:
    path.write_bytes(
        struct.pack(">2i", 0x801, len(labels)) + labels.to(torch.uint8).numpy().tobytes()
    )


def write_mnist(root: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    for split in ("train", "t10k"):
        write_idx(root / f"{split}-images-idx3-ubyte.gz", images)
        write_labels(root / f"{split}-labels-idx1-ubyte", labels)


def mnist(root: Path) -> MNIST:
    return MNIST(
        name="MNIST", root=str(root), search_dirs=["mnist"], size=28, bits=8, random_flip=False
    )


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path, suffix):
    images = torch.randint(0, 256, (7, 28, 28), dtype=torch.uint8)
    for split in ("train", "t10k"):
        path = tmp_path / f"{split}-images-idx3-ubyte.gz"
        write_idx(path, images)
        if not suffix:
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    arguments = {
        "name": "MNIST",
        "root": str(tmp_path),
        "search_dirs": ["mnist"],
        "bits": 8,
        "random_flip": False,
    }
    data = MNIST(**arguments, size=28)
    assert (
        torch.equal(data.test.images[:, 0], images)
        and len(data.train) == 6
        and len(data.validation) == 1
    )
    assert MNIST(**arguments, size=32).shape == (1, 32, 32)


def test_an_idx_file_cut_short_is_named(tmp_path):
    for split in ("train", "t10k"):
        path = tmp_path / f"{split}-images-idx3-ubyte.gz"
        write_idx(path, torch.zeros(7, 28, 28, dtype=torch.uint8))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        UserError, match=r"t10k-images-idx3-ubyte.gz is empty, cut short or no idx file"
    ):
        MNIST(
            name="MNIST",
            root=str(tmp_path),
            search_dirs=["mnist"],
            size=28,
            bits=8,
            random_flip=False,
        )


def test_mnist_beside_another_set_is_told_from_it(tmp_path):
    for shade, name in enumerate(("FashionMNIST", "MNIST")):
        (tmp_path / name / "raw").mkdir(parents=True)
        for split in ("train", "t10k"):
            write_idx(
                tmp_path / name / "raw" / f"{split}-images-idx3-ubyte.gz",
                torch.full((2, 28, 28), shade, dtype=torch.uint8),
            )
    arguments = {"root": str(tmp_path), "size": 28, "bits": 8, "random_flip": False}
    assert (
        MNIST(name="MNIST", search_dirs=["mnist", "MNIST"], **arguments).train.images == 1
    ).all()
    with pytest.raises(UserError, match="several sets"):
        MNIST(name="KMNIST", search_dirs=["kmnist"], **arguments)


@pytest.mark.parametrize("shape", [(0, 28, 28), (7, 0, 28), (7, 28, 0)])
def test_an_idx_file_without_a_pixel_is_named(tmp_path, shape):
    write_mnist(tmp_path, ZERO, torch.arange(7))
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz is empty"):
        mnist(tmp_path)


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "t10k-labels-idx1-ubyte is empty"),
        (6, "6 labels for 7 images"),
        (8, "8 labels for 7 images"),
    ],
)
def test_labels_must_be_as_many_as_images(tmp_path, count, said):
    write_mnist(tmp_path, ZERO, torch.arange(7))
    write_labels(tmp_path / "t10k-labels-idx1-ubyte", torch.arange(count))
    with pytest.raises(UserError, match=said):
        mnist(tmp_path)


def test_a_named_pipe_is_no_idx_file(tmp_path):
    write_mnist(tmp_path, ZERO, torch.arange(7))
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    os.mkfifo(tmp_path / "t10k-images-idx3-ubyte.gz")
    with pytest.raises(UserError, match=r"holds no t10k-images-idx3-ubyte.gz"):
        mnist(tmp_path)
