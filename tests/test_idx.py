"""Data sets in idx files, complete and damaged."""

import gzip
import os
import struct
from pathlib import Path

import pytest
import torch

from flowgen.data.mnist import MNIST
from flowgen.utils.errors import UserError

BLACK = torch.zeros(7, 28, 28, dtype=torch.uint8)


def write_idx(path: Path, images: torch.Tensor) -> None:
    header = struct.pack(">4i", 0x803, len(images), *images.shape[-2:])
    path.write_bytes(gzip.compress(header + images.numpy().tobytes()))


def write_labels(path: Path, labels: torch.Tensor) -> None:
    values = labels.to(torch.uint8).numpy().tobytes()
    path.write_bytes(struct.pack(">2i", 0x801, len(labels)) + values)


def write_mnist(root: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    for split in ("train", "t10k"):
        write_idx(root / f"{split}-images-idx3-ubyte.gz", images)
        write_labels(root / f"{split}-labels-idx1-ubyte", labels)


def mnist(root: Path, **changes: object) -> MNIST:
    return MNIST(root=str(root), **{"search_dirs": ["mnist"]} | changes)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_gzipped_or_not(tmp_path, suffix):
    images = torch.randint(0, 256, (7, 28, 28), dtype=torch.uint8)
    for split in ("train", "t10k"):
        path = tmp_path / f"{split}-images-idx3-ubyte.gz"
        write_idx(path, images)
        if not suffix:
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    data = mnist(tmp_path)
    assert torch.equal(data.test.images[:, 0], images)
    assert len(data.train) == 6
    assert len(data.validation) == 1
    assert mnist(tmp_path, size=32).image_shape == (1, 32, 32)


def test_an_idx_file_that_is_cut_short_is_named(tmp_path):
    for split in ("train", "t10k"):
        path = tmp_path / f"{split}-images-idx3-ubyte.gz"
        write_idx(path, BLACK)
    path.write_bytes(path.read_bytes()[:-9])
    message = r"t10k-images-idx3-ubyte.gz is empty, cut short or not an idx file"
    with pytest.raises(UserError, match=message):
        mnist(tmp_path)


def test_mnist_is_found_next_to_another_data_set(tmp_path):
    for value, name in enumerate(("FashionMNIST", "MNIST")):
        (tmp_path / name / "raw").mkdir(parents=True)
        images = torch.full((2, 28, 28), value, dtype=torch.uint8)
        for split in ("train", "t10k"):
            write_idx(tmp_path / name / "raw" / f"{split}-images-idx3-ubyte.gz", images)
    data = mnist(tmp_path, search_dirs=["mnist", "MNIST"])
    assert (data.train.images == 1).all()
    with pytest.raises(UserError, match="several data sets"):
        mnist(tmp_path, name="KMNIST", search_dirs=["kmnist"])


@pytest.mark.parametrize("shape", [(0, 28, 28), (7, 0, 28), (7, 28, 0)])
def test_an_idx_file_without_pixels_is_named(tmp_path, shape):
    write_mnist(tmp_path, BLACK, torch.arange(7))
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz is empty"):
        mnist(tmp_path)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "t10k-labels-idx1-ubyte is empty"),
        (6, "6 labels for 7 images"),
        (8, "8 labels for 7 images"),
    ],
)
def test_every_image_needs_one_label(tmp_path, count, message):
    write_mnist(tmp_path, BLACK, torch.arange(7))
    write_labels(tmp_path / "t10k-labels-idx1-ubyte", torch.arange(count))
    with pytest.raises(UserError, match=message):
        mnist(tmp_path)


def test_a_named_pipe_is_not_an_idx_file(tmp_path):
    write_mnist(tmp_path, BLACK, torch.arange(7))
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    os.mkfifo(tmp_path / "t10k-images-idx3-ubyte.gz")
    with pytest.raises(UserError, match=r"does not contain t10k-images-idx3-ubyte.gz"):
        mnist(tmp_path)
