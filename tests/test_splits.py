"""Splits never change, and subsets of a split are not easier than the whole."""

import hashlib

import pytest
import torch
from conftest import save_image
from test_data import folder, plain_images, split_images
from test_idx import write_mnist

from flowgen.data.dataset import ImageDataset
from flowgen.data.mnist import MNIST, MNISTSample
from flowgen.data.preprocess import preprocess
from flowgen.data.splits import Split, hashed_order, hashed_split, hashed_subset
from flowgen.data.toy2d import Toy2D
from flowgen.utils.errors import UserError


def checksums(data: ImageDataset) -> list[str]:
    return [
        hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()[:12]
        for images in split_images(data)
    ]


def sizes(data: ImageDataset) -> list[int]:
    return [len(split) for split in (data.train, data.validation, data.test)]


def test_names_are_split_8_to_1_to_1_by_their_hash():
    names = [f"{number:06d}.jpg" for number in range(1, 10_001)]
    train, validation, test = hashed_split(names)
    assert sorted(train + validation + test) == names
    assert [len(train), len(validation), len(test)] == [8012, 1025, 963]
    assert validation[:3] == ["000002.jpg", "000028.jpg", "000032.jpg"]
    assert test[:3] == ["000008.jpg", "000011.jpg", "000012.jpg"]
    assert hashed_split([f"deep/{name}" for name in names])[2] == [f"deep/{name}" for name in test]
    # The hashes of these names choose a single split.
    for numbers in ([1, 20, 21], [1, 4, 11, 19]):
        splits = hashed_split([f"{number}.png" for number in numbers])
        assert all(splits) and sum(map(len, splits)) == len(numbers)


def test_an_image_stays_in_its_split_when_others_are_added(images):
    before = [split.clone() for split in split_images(folder(images))]
    assert sum(map(len, before)) == 40
    assert all(map(len, before))
    for number in range(40, 60):
        save_image(images / f"{number:03d}.png")
    after = split_images(folder(images))
    assert sum(map(len, after)) == 60
    for old_images, new_images in zip(before, after, strict=True):
        for image in old_images:
            assert any(torch.equal(image, other) for other in new_images)


def test_three_images_are_enough_and_two_are_not(tmp_path):
    save_image(tmp_path / "few" / "a.png")
    save_image(tmp_path / "few" / "b.png")
    with pytest.raises(UserError, match="too few"):
        folder(tmp_path / "few")
    save_image(tmp_path / "few" / "c.png")
    assert sizes(folder(tmp_path / "few")) == [1, 1, 1]


def test_the_official_partition_is_used_if_its_list_exists(images):
    lines = [f"{path.name} {index % 3}" for index, path in enumerate(sorted(images.iterdir()))]
    (images / "list_eval_partition.txt").write_text("\n".join(lines))
    data = folder(images)
    assert sizes(data) == [14, 13, 13]
    for index, split in enumerate(split_images(data)):
        expected = preprocess((images / f"{index:03d}.png").read_bytes(), 8, 3, None)
        assert torch.equal(split[0], expected)


def test_the_validation_images_of_mnist_depend_on_their_index(tmp_path):
    count = 60_000
    weights = torch.tensor([1, 256, 65536, 0])
    divisors = torch.tensor([[1, 256], [65536, 1 << 40]])
    images = torch.arange(count).view(-1, 1, 1) // divisors % 256  # the index in base 256
    write_mnist(tmp_path, images.to(torch.uint8), (torch.arange(count) % 10).to(torch.uint8))
    data = MNIST(root=str(tmp_path), search_dirs=[], size=2)
    assert sizes(data) == [55_000, 5_000, 60_000]
    indices = [(images.flatten(1).long() * weights).sum(1) for images in split_images(data)]
    assert torch.equal(torch.cat(indices[:2]).sort().values, torch.arange(count))
    assert indices[1][:4].tolist() == [39, 49, 51, 55]
    for split, index in zip((data.train, data.validation, data.test), indices, strict=True):
        assert torch.equal(split.labels.long(), index % 10)


def test_the_included_digits_have_balanced_splits():
    data = MNISTSample()
    assert sizes(data) == [4000, 500, 500]
    assert data.validation.labels.bincount().tolist() == [50] * 10
    assert data.test.labels.bincount().tolist() == [50] * 10
    assert checksums(data) == ["5431e84e772f", "4662a4ead1ca", "deb298020c92"]


def test_points_of_the_plane_never_change():
    expected = ["3c1643143079", "ddfbed4a11ed", "7712e56d6e4d"]
    assert checksums(Toy2D(name="moons", num_points=100)) == expected


def test_a_subset_is_chosen_by_hash_and_a_larger_one_contains_it():
    assert hashed_order(10).tolist() == [9, 8, 4, 3, 0, 1, 7, 2, 6, 5]
    for limit in (None, 7, 9):
        assert torch.equal(hashed_subset(7, limit), torch.arange(7))
    small = hashed_subset(1000, 100)
    large = hashed_subset(1000, 300)
    assert small.tolist() == sorted(set(small.tolist()))
    assert set(small.tolist()) < set(large.tolist())
    assert 30 < (small < 500).sum() < 70
    split = Split(torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1))
    data = ImageDataset(split, split, split)
    values = torch.cat(list(data.batches("validation", 7, limit=50))).flatten()
    assert torch.equal(values.long(), hashed_subset(200, 50))
    assert (values >= 100).sum() > 10


def test_a_limit_above_the_size_of_the_split_gives_all_of_it():
    assert [len(batch) for batch in plain_images().batches("test", 2, limit=100)] == [2, 1]
