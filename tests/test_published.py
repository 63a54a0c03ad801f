"""Tests of data sets in their published formats, with small intact and damaged files."""

import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from flowgen.config.compose import compose_config
from flowgen.config.instantiate import build_data
from flowgen.data.cifar10 import CIFAR10
from flowgen.data.dataset import ImageDataset
from flowgen.data.imagenet import DownsampledImageNet
from flowgen.data.svhn import SVHN
from flowgen.utils.errors import UserError

OPTIONS = {"search_dirs": [], "bits": 8, "random_flip": False}


def random_images(count: int, size: int = 32) -> Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8)


def write_cifar(
    folder: Path, compression: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write five training batches and a test batch, as files or as an archive ("gz" or "xz").

    A record has one byte for the class and 3072 bytes for the image.
    """
    images, labels = random_images(60), torch.arange(60) % 10
    parts = {
        f"data_batch_{number + 1}.bin": slice(10 * number, 10 * number + 10) for number in range(5)
    } | {"test_batch.bin": slice(50, 60)}
    folder.mkdir(parents=True)
    files = {
        name: torch.cat((labels[part, None].to(torch.uint8), images[part].flatten(1)), 1)
        for name, part in parts.items()
    }
    if compression is None:
        for name, table in files.items():
            (folder / name).write_bytes(table.numpy().tobytes())
        return images[:50], labels[:50], images[50:], labels[50:]
    path = folder / f"cifar-10-binary.tar.{compression}"
    with tarfile.open(path, f"w:{compression}") as archive:
        for name, table in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = table.numel()
            archive.addfile(info, io.BytesIO(table.numpy().tobytes()))
    return images[:50], labels[:50], images[50:], labels[50:]


def element(kind: int, data: bytes) -> bytes:
    """Return a data element of a MAT file.

    Up to four bytes of data are part of the tag; longer data is padded to multiples of eight.
    """
    if len(data) <= 4:
        return struct.pack("<HH", kind, len(data)) + data.ljust(4, b"\0")
    return struct.pack("<II", kind, len(data)) + data + b"\0" * (-len(data) % 8)


def matrix(name: str, values: Tensor, number: int, array: int) -> bytes:
    shape = struct.pack(f"<{values.dim()}i", *values.shape)
    columns_first = values.permute(*reversed(range(values.dim()))).contiguous().numpy().tobytes()
    parts = [
        (6, struct.pack("<II", array, 0)),
        (5, shape),
        (1, name.encode()),
        (number, columns_first),
    ]
    packed = zlib.compress(element(14, b"".join(element(*part) for part in parts)))
    return struct.pack("<II", 15, len(packed)) + packed


def write_svhn(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write X (32, 32, 3, N) as uint8 and y (N, 1) as uint8 or double, compressed.

    Label 10 is the digit 0.
    """
    images, labels = random_images(40), torch.arange(40) % 10
    folder.mkdir(parents=True)
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    for name, part, (number, array) in (
        ("train", slice(30), (2, 9)),
        ("test", slice(30, 40), (9, 6)),
    ):
        y = torch.where(labels[part] == 0, 10, labels[part])[:, None].to(
            torch.uint8 if number == 2 else torch.float64
        )
        data = (
            header
            + matrix("X", images[part].permute(2, 3, 1, 0), 2, 9)
            + matrix("y", y, number, array)
        )
        (folder / f"{name}_32x32.mat").write_bytes(data)
    return images[:30], labels[:30], images[30:], labels[30:]


def npy(values: Tensor, descr: str) -> bytes:
    header = (
        f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {tuple(values.shape)}, }}".encode()
    )
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return (
        b"\x93NUMPY\x01\x00"
        + struct.pack("<H", len(header))
        + header
        + values.contiguous().numpy().tobytes()
    )


def write_imagenet(folder: Path, size: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write two training batches and the validation file.

    They contain data (N, 3 size^2) as uint8, labels from 1 to 1000, and the mean image.
    """
    images, labels = random_images(50, size), torch.arange(50) * 20
    folder.mkdir(parents=True)
    for name, part in (
        ("train_data_batch_1", slice(20)),
        ("train_data_batch_2", slice(20, 40)),
        ("val_data", slice(40, 50)),
    ):
        with zipfile.ZipFile(folder / f"{name}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("data.npy", npy(images[part].flatten(1), "|u1"))
            archive.writestr("labels.npy", npy(labels[part] + 1, "<i8"))
            archive.writestr("mean.npy", npy(torch.zeros(3 * size**2, dtype=torch.float64), "<f8"))
    return images[:40], labels[:40], images[40:], labels[40:]


SETS: dict[str, tuple[Callable, Callable[[Path], ImageDataset]]] = {
    "cifar10": (write_cifar, lambda root: CIFAR10(root=str(root), **OPTIONS)),
    "svhn": (write_svhn, lambda root: SVHN(root=str(root), **OPTIONS)),
    "imagenet32": (
        write_imagenet,
        lambda root: DownsampledImageNet(root=str(root), size=32, **OPTIONS),
    ),
}


def assert_contains(
    data: ImageDataset, train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor
) -> None:
    """Check the test split, and that training and validation images divide the training files."""
    assert torch.equal(data.test.images, test)
    assert torch.equal(data.test.labels, test_labels)
    read_images = torch.cat((data.train.images, data.validation.images)).flatten(1)
    read_labels = torch.cat((data.train.labels, data.validation.labels))
    index = [int((train.flatten(1) == image).all(1).nonzero()[0, 0]) for image in read_images]
    assert sorted(index) == list(range(len(train)))
    assert torch.equal(read_labels, labels[index])
    assert 0 < len(data.validation) < len(data.train)


@pytest.mark.parametrize("name", SETS)
def test_published_files_are_read(name, tmp_path):
    write, read = SETS[name]
    written = write(tmp_path / "set")
    assert_contains(read(tmp_path / "set"), *written)
    assert_contains(read(tmp_path / "set"), *written)  # from the cache, if the data set has one
    config = compose_config([f"data={name}", f"data.root={tmp_path / 'set'}"]).config
    data = build_data(config)
    assert data.image_shape == (3, 32, 32) and data.bits == 8


@pytest.mark.parametrize("compression", ["gz", "xz"])
def test_cifar_is_read_from_its_archive(compression, tmp_path):
    written = write_cifar(tmp_path / "set", compression)
    path = tmp_path / "set" / f"cifar-10-binary.tar.{compression}"
    for root in (tmp_path / "set", path):
        assert_contains(CIFAR10(root=str(root), **OPTIONS), *written)
    damaged = bytearray(path.read_bytes())
    damaged[-6] ^= 1  # inside the checksum (gz) or the footer (xz)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="not CIFAR-10's archive, or is cut short: delete it"):
        CIFAR10(root=str(path), **OPTIONS)


@pytest.mark.skipif(not hasattr(psutil.Process, "io_counters"), reason="not counted by the system")
@pytest.mark.parametrize("compression", ["gz", "xz"])
def test_an_archive_of_cifar_is_decompressed_once(compression, tmp_path):
    write_cifar(tmp_path / "set", compression)
    path = tmp_path / "set" / f"cifar-10-binary.tar.{compression}"
    before = psutil.Process().io_counters()
    CIFAR10(root=str(path), **OPTIONS)
    after = psutil.Process().io_counters()
    assert after.read_chars - before.read_chars < 1.5 * path.stat().st_size


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "missing"])
def test_error_for_a_damaged_file_names_it(name, damage, tmp_path):
    write, read = SETS[name]
    write(tmp_path / "set")
    file_name = {
        "cifar10": "data_batch_3.bin",
        "svhn": "test_32x32.mat",
        "imagenet32": "val_data.npz",
    }[name]
    path = tmp_path / "set" / file_name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "cut": content[: len(content) * 2 // 3],
                "empty": b"",
                "foreign": b"PK\x03\x04 not a zip file" * 9,
            }[damage]
        )
    with pytest.raises(UserError, match=file_name):
        read(tmp_path / "set")


def test_pickled_objects_in_an_npz_are_not_loaded(tmp_path):
    write_imagenet(tmp_path / "set")
    with zipfile.ZipFile(tmp_path / "set" / "train_data_batch_1.npz", "w") as archive:
        archive.writestr(
            "data.npy",
            npy(torch.zeros(3, dtype=torch.uint8), "|O") + b"cos\nsystem\n(S'false'\ntR.",
        )
    with pytest.raises(UserError, match="is cut short or no"):
        DownsampledImageNet(root=str(tmp_path / "set"), size=32, **OPTIONS)


def test_invalid_classes_and_sizes_are_rejected(tmp_path):
    write_cifar(tmp_path / "cifar")
    path = tmp_path / "cifar" / "test_batch.bin"
    path.write_bytes(b"\x0b" + path.read_bytes()[1:])
    with pytest.raises(UserError, match=r"(beyond|than) the ten"):
        CIFAR10(root=str(tmp_path / "cifar"), **OPTIONS)
    write_imagenet(tmp_path / "imagenet")
    with pytest.raises(UserError, match="another size than 64x64"):
        DownsampledImageNet(root=str(tmp_path / "imagenet"), size=64, **OPTIONS)
