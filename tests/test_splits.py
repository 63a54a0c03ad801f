"""Training, validation and test images: which are which is fixed for ever, and parts of them are no easier than the whole."""

import hashlib

import pytest
import torch
from conftest import save_image
from test_data import folder, plain_images
from test_idx import write_mnist

from flowgen.data.dataset import ImageDataset, Split, hash_split, hashed_order, hashed_subset
from flowgen.data.mnist import MNIST, MNISTSample
from flowgen.data.preprocess import preprocess
from flowgen.data.toy2d import Toy2D
from flowgen.utils.errors import UserError


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(
        b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
    ).hexdigest()[:12]


def fingerprints(data: ImageDataset) -> list[str]:
    return [digest(split.images) for split in (data.train, data.validation, data.test)]


def test_names_are_split_eight_one_one_by_hash_and_never_otherwise():
    names = [f"{number:06d}.jpg" for number in range(1, 10_001)]
    train, validation, test = hash_split(names)
    assert sorted(train + validation + test) == names
    assert [len(train), len(validation), len(test)] == [8012, 1025, 963]
    assert validation[:3] == ["000002.jpg", "000028.jpg", "000032.jpg"] and test[:3] == [
        "000008.jpg",
        "000011.jpg",
        "000012.jpg",
    ]
    assert hash_split([f"deep/{name}" for name in names])[2] == [f"deep/{name}" for name in test]


def test_an_image_stays_in_its_split_when_others_are_added(images):
    before = [
        split.images.clone()
        for split in (lambda data: (data.train, data.validation, data.test))(folder(images))
    ]
    assert sum(map(len, before)) == 40 and all(map(len, before))
    for number in range(40, 60):
        save_image(images / f"{number:03d}.png")
    after = folder(images)
    assert len(after.train) + len(after.validation) + len(after.test) == 60
    for old, new in zip(before, (after.train, after.validation, after.test), strict=True):
        assert all(any(torch.equal(image, other) for other in new.images) for image in old)


def test_three_images_are_enough_and_two_are_not(tmp_path):
    save_image(tmp_path / "few" / "a.png")
    save_image(tmp_path / "few" / "b.png")
    with pytest.raises(UserError, match="too few"):
        folder(tmp_path / "few")
    save_image(tmp_path / "few" / "c.png")
    data = folder(tmp_path / "few")
    assert len(data.train) == len(data.validation) == len(data.test) == 1


def test_the_official_partition_is_followed_where_it_lies(images):
    lines = [f"{path.name} {index % 3}" for index, path in enumerate(sorted(images.iterdir()))]
    (images / "list_eval_partition.txt").write_text("\n".join(lines))
    data = folder(images)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [14, 13, 13]
    for index, split in enumerate((data.train, data.validation, data.test)):
        assert torch.equal(
            split.images[0], preprocess((images / f"{index:03d}.png").read_bytes(), 8, 3, None)
        )


def test_digits_in_idx_files_are_held_out_by_their_place_with_their_labels(tmp_path):
    count = 60_000
    images = (
        torch.arange(count).view(-1, 1, 1) // torch.tensor([[1, 256], [65536, 1 << 40]]) % 256
    )  # each says its own place
    write_mnist(tmp_path, images.to(torch.uint8), (torch.arange(count) % 10).to(torch.uint8))
    data = MNIST(
        name="MNIST", root=str(tmp_path), search_dirs=[], size=2, bits=8, random_flip=False
    )
    assert [len(split) for split in (data.train, data.validation, data.test)] == [
        55_000,
        5_000,
        60_000,
    ]
    weights = torch.tensor([1, 256, 65536, 0])
    places = [
        (split.images.flatten(1).long() * weights).sum(1)
        for split in (data.train, data.validation, data.test)
    ]
    assert torch.equal(torch.cat(places[:2]).sort().values, torch.arange(count)) and places[1][
        :4
    ].tolist() == [39, 49, 51, 55]
    for split, place in zip((data.train, data.validation, data.test), places, strict=True):
        assert torch.equal(split.labels.long(), place % 10)


def test_the_embedded_digits_are_held_out_with_all_classes_equally():
    data = MNISTSample(bits=8, random_flip=False)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [4000, 500, 500]
    assert (
        data.validation.labels.bincount().tolist()
        == data.test.labels.bincount().tolist()
        == [50] * 10
    )
    assert fingerprints(data) == ["5431e84e772f", "4662a4ead1ca", "deb298020c92"]


def test_points_of_the_plane_are_drawn_once_for_all():
    assert fingerprints(Toy2D(name="moons", count=100, bits=8, random_flip=False)) == [
        "3c1643143079",
        "ddfbed4a11ed",
        "7712e56d6e4d",
    ]


def test_a_part_of_a_split_is_drawn_by_hash_and_a_larger_one_holds_it():
    assert hashed_order(10).tolist() == [9, 8, 4, 3, 0, 1, 7, 2, 6, 5]
    assert (
        torch.equal(hashed_subset(7, None), torch.arange(7))
        and torch.equal(hashed_subset(7, 7), torch.arange(7))
        and torch.equal(hashed_subset(7, 9), torch.arange(7))
    )
    some, more = hashed_subset(1000, 100), hashed_subset(1000, 300)
    assert some.tolist() == sorted(set(some.tolist())) and set(some.tolist()) < set(more.tolist())
    assert 30 < (some < 500).sum() < 70
    images = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1)
    data = ImageDataset(Split(images), Split(images), Split(images), bits=8, flip=False)
    drawn = torch.cat(list(data.batches("validation", 7, limit=50))).flatten()
    assert torch.equal(drawn.long(), hashed_subset(200, 50)) and (drawn >= 100).sum() > 10


def test_a_limit_beyond_the_split_gives_all_of_it():
    assert [len(batch) for batch in plain_images().batches("test", 2, limit=100)] == [2, 1]
