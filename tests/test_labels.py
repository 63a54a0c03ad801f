"""Classes of folders and CelebA's attributes: each goes with its image into any split."""

import logging
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from PIL import Image
from test_data import SHARED, folder, needs_shared
from torch import Tensor

from flowgen.data.image_folder import ImageFolder, folder_labels
from flowgen.utils.errors import UserError

NAMES = ("Bald", "Smiling", "Young", "Human")


def attributes_of(number: int) -> list[bool]:
    return [number % 4 == 0, number % 2 == 1, number < 20, True]


def attribute_list(numbers: list[int], count: int | None = None) -> str:
    """A list in CelebA's format, with two names of images that do not exist."""
    lines = []
    for number in [*numbers, 998, 999]:
        values = " ".join(" 1" if value else "-1" for value in attributes_of(number))
        lines.append(f"{number:03d}.png  {values}")
    return "\n".join([str(count or len(lines)), " ".join(NAMES) + " ", *lines, ""])


def save_gray(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (6 * number,) * 3).save(path)


@pytest.fixture
def grays(tmp_path: Path) -> Path:
    """Forty images, each as bright as its number, and a file that is not an image."""
    for number in range(40):
        save_gray(tmp_path / "grays" / f"{number:03d}.png", number)
    (tmp_path / "grays" / "040.png").write_text("no image")
    return tmp_path / "grays"


def zipped(folder: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, f"{prefix}{path.relative_to(folder)}")
    return folder.with_suffix(".zip")


def labeled_images(data: ImageFolder) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number, label and attributes of every image."""
    for split in (data.train, data.validation, data.test):
        for index, image in enumerate(split.images):
            yield int(image[0, 0, 0]) // 6, split.labels[index], split.attributes[index]


def test_subfolders_are_classes_in_sorted_order(tmp_path):
    names = ["top/dog/1.png", "top/cat/1.png", "top/dog/2.png", "top/ant/deep/1.png"]
    labels = folder_labels(names)
    assert labels is not None
    assert labels.tolist() == [2, 1, 2, 0]
    for number in range(40):
        animal = ("dog", "cat", "emu/young")[number % 3]
        save_gray(tmp_path / "animals" / animal / f"{number:03d}.png", number)
    expected = torch.tensor([1, 0, 2])  # dog, cat, emu
    for root in (tmp_path / "animals", zipped(tmp_path / "animals", "deep/down/")):
        data = folder(root, bits=8)
        assert data.num_classes == 3
        for split in (data.train, data.validation, data.test):
            numbers = split.images[:, 0, 0, 0].long() // 6
            assert torch.equal(split.labels, expected[numbers % 3])
        images, labels = data.train_batch(0, 20, seed=0)
        assert torch.equal(labels, expected[images[:, 0, 0, 0].long() // 6 % 3])


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "b.png"],
        ["a/1.png", "a/2.png"],
        ["top/a/1.png", "top/a/2.png"],
        ["a/1.png", "a/b/2.png", "3.png"],
    ],
)
def test_images_without_different_subfolders_have_no_classes(names):
    assert folder_labels(names) is None


@pytest.mark.parametrize(
    "location",
    ["in the folder", "next to the folder", "next to the zip", "in the zip", "as csv"],
)
def test_attributes_go_with_their_images(grays, location):
    text = attribute_list(list(range(41)))
    root = grays
    if location == "in the zip":
        (grays / "list_attr_celeba.txt").write_text(text)
        root = zipped(grays)
        (grays / "list_attr_celeba.txt").unlink()
    elif location == "as csv":
        rows = [",".join(line.split()) for line in text.splitlines()[1:]]
        (grays / "list_attr_celeba.csv").write_text("\n".join(["image_id," + rows[0], *rows[1:]]))
    elif location == "in the folder":
        (grays / "list_attr_celeba.txt").write_text(text)
    else:
        (grays.parent / "list_attr_celeba.txt").write_text(text)
        root = zipped(grays) if location == "next to the zip" else grays
    data = folder(root, attribute="Smiling")
    assert data.attributes == NAMES
    assert data.num_classes == 2
    rows = list(labeled_images(data))
    assert sorted(number for number, _, _ in rows) == list(range(40))
    for number, label, attributes in rows:
        assert attributes.tolist() == attributes_of(number)
        assert label == number % 2
    assert folder(root).num_classes is None
    assert folder(root).attributes == NAMES


BROKEN: dict[str, tuple[bytes, str]] = {
    "not UTF-8": ("\n".join(["1", "Smïling"]).encode("latin-1"), "UTF-8"),
    "cut between lines": (attribute_list(list(range(41)), count=200).encode(), "cut short"),
    "cut within a line": (attribute_list(list(range(41))).encode()[:-5], "cut short"),
    "of other images": (attribute_list(list(range(100, 141))).encode(), "does not name"),
    "of other values": (attribute_list(list(range(41))).replace("-1", "no").encode(), "-1 and 1"),
    "empty": (b"", "cut short"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_list_that_cannot_be_used_is_an_error_or_a_warning(grays, case, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flowgen"), "propagate", True)
    content, message = BROKEN[case]
    (grays / "list_attr_celeba.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        folder(grays, attribute="Smiling")
    assert folder(grays).attributes == ()
    assert message in caplog.text


@pytest.mark.parametrize(
    ("attribute", "message"),
    [("Smilling", "choose one of Bald, Smiling"), ("Human", "every image has")],
)
def test_an_attribute_must_exist_and_differ_between_images(grays, attribute, message):
    (grays / "list_attr_celeba.txt").write_text(attribute_list(list(range(41))))
    with pytest.raises(UserError, match=message):
        folder(grays, attribute=attribute)


def test_a_partition_that_is_not_text_is_an_error(grays):
    (grays / "list_eval_partition.txt").write_bytes(b"\xff\xfe000.png 0")
    with pytest.raises(UserError, match="cannot be read as UTF-8 text"):
        folder(grays)


def test_a_flow_learns_the_two_classes_of_an_attribute(
    grays, command: Callable[..., tuple[int, str, str]], tmp_path
):
    overrides = [
        *SMALL,
        f"data.root={grays}",
        "data.attribute=Smiling",
        "trainer.steps=1",
        f"output_dir={tmp_path / 'run'}",
    ]
    status, _, error = command("train", *overrides, "model.num_classes=2")
    assert status == 1
    assert error.startswith("flowgen: data.attribute=Smiling needs CelebA's list_attr_celeba.txt")
    (grays / "list_attr_celeba.txt").write_text(attribute_list(list(range(41))))
    assert "set it to 2" in command("train", *overrides, "model.num_classes=3")[2]
    assert command("train", *overrides, "model.num_classes=2")[0] == 0
    shutil.rmtree(grays)
    status, _, error = command("sample", "--run", tmp_path / "run", "--label", 1, "--count", 2)
    assert status == 0, error


@needs_shared
def test_the_forty_attributes_of_real_faces():
    faces = folder(SHARED / "celeba64", size=8, attribute="Smiling")
    assert len(faces.attributes) == 40
    assert faces.train.attributes.shape == (len(faces.train), 40)
    assert faces.num_classes == 2
    labels = torch.cat([split.labels for split in (faces.train, faces.validation, faces.test)])
    assert len(labels) == 10_000
    assert labels.sum() == 4822
