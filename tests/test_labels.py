"""Classes of folders, and the attributes in CelebA's list: each goes with its image into whichever split."""

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


def has(number: int) -> list[bool]:
    return [number % 4 == 0, number % 2 == 1, number < 20, True]


def attribute_list(numbers: list[int], count: int | None = None) -> str:
    """CelebA's format, with two names that no image has."""
    lines = [
        f"{number:03d}.png  {' '.join(' 1' if value else '-1' for value in has(number))}"
        for number in [*numbers, 998, 999]
    ]
    return "\n".join([str(count or len(lines)), " ".join(NAMES) + " ", *lines, ""])


def save_grey(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (6 * number,) * 3).save(path)


@pytest.fixture
def greys(tmp_path: Path) -> Path:
    """Forty images, each as bright as its number says, and one that cannot be read."""
    for number in range(40):
        save_grey(tmp_path / "greys" / f"{number:03d}.png", number)
    (tmp_path / "greys" / "040.png").write_text("no image")
    return tmp_path / "greys"


def zipped(folder: Path, top: str = "") -> Path:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, f"{top}{path.relative_to(folder)}")
    return folder.with_suffix(".zip")


def each(data: ImageFolder) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number, label and attributes of every image."""
    for split in (data.train, data.validation, data.test):
        for place, image in enumerate(split.images):
            yield int(image[0, 0, 0]) // 6, split.labels[place], split.attributes[place]


def test_subfolders_are_classes_in_sorted_order(tmp_path):
    labels = folder_labels(
        ["top/dog/1.png", "top/cat/1.png", "top/dog/2.png", "top/ant/deep/1.png"]
    )
    assert labels is not None and labels.tolist() == [2, 1, 2, 0]
    for number in range(40):
        save_grey(
            tmp_path / "animals" / ("dog", "cat", "emu/young")[number % 3] / f"{number:03d}.png",
            number,
        )
    for root in (tmp_path / "animals", zipped(tmp_path / "animals", "deep/down/")):
        data = folder(root, bits=8)
        assert data.num_classes == 3
        for split in (data.train, data.validation, data.test):
            numbers = split.images[:, 0, 0, 0].long() // 6
            assert torch.equal(split.labels, torch.tensor([1, 0, 2])[numbers % 3])
        images, labels = data.draw(0, 20, seed=0)
        assert torch.equal(labels, torch.tensor([1, 0, 2])[images[:, 0, 0, 0].long() // 6 % 3])


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "b.png"],
        ["a/1.png", "a/2.png"],
        ["top/a/1.png", "top/a/2.png"],
        ["a/1.png", "a/b/2.png", "3.png"],
    ],
)
def test_images_that_no_subfolder_tells_apart_have_no_classes(names):
    assert folder_labels(names) is None


@pytest.mark.parametrize(
    "place", ["in the folder", "beside the folder", "beside the zip", "in the zip", "as csv"]
)
def test_attributes_go_with_their_images(greys, place):
    text, root = attribute_list(list(range(41))), greys
    if place == "in the zip":
        (greys / "list_attr_celeba.txt").write_text(text)
        root = zipped(greys)
        (greys / "list_attr_celeba.txt").unlink()
    elif place == "as csv":
        rows = [",".join(line.split()) for line in text.splitlines()[1:]]
        (greys / "list_attr_celeba.csv").write_text("\n".join(["image_id," + rows[0], *rows[1:]]))
    else:
        (greys if place == "in the folder" else greys.parent).joinpath(
            "list_attr_celeba.txt"
        ).write_text(text)
        root = zipped(greys) if place == "beside the zip" else greys
    data = folder(root, attribute="Smiling")
    assert data.attributes == NAMES and data.num_classes == 2
    found = list(each(data))
    assert sorted(number for number, _, _ in found) == list(range(40))
    assert all(
        values.tolist() == has(number) and label == number % 2 for number, label, values in found
    )
    assert folder(root).classes is None and folder(root).attributes == NAMES


BROKEN: dict[str, tuple[bytes, str]] = {
    "not UTF-8": ("\n".join(["1", "Smïling"]).encode("latin-1"), "UTF-8"),
    "cut between lines": (attribute_list(list(range(41)), count=200).encode(), "cut short"),
    "cut within a line": (attribute_list(list(range(41))).encode()[:-5], "cut short"),
    "of other images": (attribute_list(list(range(100, 141))).encode(), "does not name"),
    "of other values": (attribute_list(list(range(41))).replace("-1", "no").encode(), "-1 and 1"),
    "empty": (b"", "cut short"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_list_that_cannot_be_used_gets_one_sentence(greys, case, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flowgen"), "propagate", True)
    data, said = BROKEN[case]
    (greys / "list_attr_celeba.txt").write_bytes(data)
    with pytest.raises(UserError, match=said):
        folder(greys, attribute="Smiling")
    assert folder(greys).attributes == () and said in caplog.text


@pytest.mark.parametrize(
    ("attribute", "said"),
    [("Smilling", "choose one of Bald, Smiling"), ("Human", "every image has")],
)
def test_an_attribute_must_be_there_and_tell_images_apart(greys, attribute, said):
    (greys / "list_attr_celeba.txt").write_text(attribute_list(list(range(41))))
    with pytest.raises(UserError, match=said):
        folder(greys, attribute=attribute)


def test_a_partition_that_is_no_text_gets_one_sentence(greys):
    (greys / "list_eval_partition.txt").write_bytes(b"\xff\xfe000.png 0")
    with pytest.raises(UserError, match="no text in UTF-8"):
        folder(greys)


def test_a_flow_learns_the_two_classes_of_an_attribute(
    greys, command: Callable[..., tuple[int, str, str]], tmp_path
):
    words = [
        *SMALL,
        f"data.root={greys}",
        "data.attribute=Smiling",
        "trainer.steps=1",
        f"output_dir={tmp_path / 'run'}",
    ]
    status, _, error = command("train", *words, "model.num_classes=2")
    assert status == 1 and error.startswith(
        "flowgen: data.attribute=Smiling needs CelebA's list_attr_celeba.txt"
    )
    (greys / "list_attr_celeba.txt").write_text(attribute_list(list(range(41))))
    assert "set it to 2" in command("train", *words, "model.num_classes=3")[2]
    assert command("train", *words, "model.num_classes=2")[0] == 0
    shutil.rmtree(greys)
    assert command("sample", "--run", tmp_path / "run", "--label", 1, "--count", 2)[0] == 0


@needs_shared
def test_the_forty_attributes_of_real_faces():
    faces = folder(SHARED / "celeba64", size=8, attribute="Smiling")
    assert (
        len(faces.attributes) == 40
        and faces.train.attributes.shape == (len(faces.train), 40)
        and faces.classes == 2
    )
    smiling = torch.cat([split.labels for split in (faces.train, faces.validation, faces.test)])
    assert len(smiling) == 10_000 and smiling.sum() == 4822
