"""Data sets: images of every format, and batches."""

import io
import logging
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import save_image
from PIL import Image

import flowgen
from flowgen.config.compose import read_config
from flowgen.data.dataset import ImageDataset, Split
from flowgen.data.image_folder import ImageFolder
from flowgen.data.mnist import MNIST, MNISTSample
from flowgen.data.preprocess import preprocess, read_images
from flowgen.data.toy2d import Toy2D
from flowgen.utils.errors import UserError

SHARED = Path(os.environ.get("FLOWGEN_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_shared = pytest.mark.skipif(
    not (SHARED / "celebahq64").is_dir(),
    reason="needs FLOWGEN_TEST_DATA, a folder with mnist/, celeba64/ and celebahq64/",
)


def folder(root: Path, **changes: object) -> ImageFolder:
    arguments = {
        "search_dirs": [],
        "download_hint": "get it",
        "channels": 3,
        "size": 8,
        "bits": 5,
        "random_flip": False,
        "crop": None,
    } | changes
    return ImageFolder(root=str(root), **arguments)


def parts(data: ImageDataset) -> list[torch.Tensor]:
    """The images of every split, at 8 bits."""
    return [split.images for split in (data.train, data.validation, data.test)]


def png(shape: tuple[int, ...] = (8, 8, 3)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(torch.randint(0, 256, shape, dtype=torch.uint8).numpy()).save(file, "png")
    return file.getvalue()


def test_folder_and_zip_hold_the_same_images(images, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in images.iterdir():
            archive.write(path, f"deep/{path.name}")
        archive.writestr("__MACOSX/deep/._000.png", b"shadow")
    (tmp_path / "holds").mkdir()
    (tmp_path / "images.zip").rename(tmp_path / "holds" / "images.zip")
    from_folder = folder(images)
    for root in (tmp_path / "holds" / "images.zip", tmp_path / "holds"):
        from_zip = folder(root)
        assert all(
            torch.equal(one, other)
            for one, other in zip(parts(from_folder), parts(from_zip), strict=True)
        )


def test_bad_images_are_named_and_counted_but_not_fatal(images, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flowgen"), "propagate", True)
    (images / "text.png").write_text("no picture")
    (images / "short.png").write_bytes(png()[:60])
    save_image(images / "dot.png", (1, 1, 3))
    data = folder(images)
    assert len(torch.cat(parts(data))) == 40
    assert "3 of 43 images left out" in caplog.text and "dot.png is 1x1 pixels" in caplog.text


def test_images_of_every_kind_become_the_same_square(tmp_path):
    grey16 = Image.fromarray((torch.arange(64).view(8, 8) * 1000).to(torch.uint16).numpy())
    kinds = {
        "grey.png": Image.new("L", (12, 9), 100),
        "colour.png": Image.new("RGB", (9, 12), (100, 100, 100)),
        "alpha.png": Image.new("RGBA", (9, 9), (100, 100, 100, 255)),
        "palette.gif": Image.new("RGB", (9, 9), (100, 100, 100)).convert("P"),
        "cmyk.jpg": Image.new("CMYK", (9, 9)),
        "sixteen.png": grey16,
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
        for channels in (1, 3):
            images = preprocess((tmp_path / name).read_bytes(), 8, channels, None)
            assert images.shape == (channels, 8, 8) and images.dtype == torch.uint8
            if name in ("grey.png", "colour.png", "alpha.png"):
                assert (images == 100).all()
    assert preprocess((tmp_path / "sixteen.png").read_bytes(), 8, 1, None).max() > 200


def test_a_named_pipe_is_no_zip(tmp_path):
    os.mkfifo(tmp_path / "images.zip")
    with pytest.raises(UserError, match="holds no image and 0 zips"):
        folder(tmp_path)


def test_crop_takes_the_centre(tmp_path):
    image = Image.new("RGB", (178, 218), "black")
    image.paste("white", (15, 35, 163, 183))
    image.save(tmp_path / "face.png")
    assert (preprocess((tmp_path / "face.png").read_bytes(), 64, 3, 148) == 255).all()
    assert (preprocess((tmp_path / "face.png").read_bytes(), 64, 3, None) == 0).any()


def plain_images(count: int = 10, *, flip: bool = False, bits: int = 8) -> ImageDataset:
    train = (
        torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 1, 2, 2).contiguous()
    )
    train[:, :, :, 1] += 100
    return ImageDataset(Split(train), Split(train[:2]), Split(train[:3]), bits=bits, flip=flip)


def test_every_epoch_visits_every_image_once_across_ragged_batches():
    data, seen, drawn = plain_images(10), 0, []
    for _ in range(5):
        drawn.append(data.draw(seen, 4, seed=1)[0][:, 0, 0, 0])
        seen += 4
    epochs = torch.cat(drawn).view(2, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs) and not torch.equal(
        epochs[0], epochs[1]
    )


def test_the_place_in_the_data_is_all_that_decides_a_batch():
    one, other = plain_images(), plain_images()
    one.draw(0, 4, seed=1)
    assert torch.equal(one.draw(14, 9, seed=1)[0], other.draw(14, 9, seed=1)[0])
    assert not torch.equal(one.draw(0, 10, seed=1)[0], one.draw(0, 10, seed=2)[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 8, "random_flip": True, "random_shift": 1},
        {"bits": 1, "random_flip": False, "binarization": "dynamic"},
    ],
    ids=str,
)
def test_what_a_batch_draws_is_a_function_of_the_seed_and_the_place_alone(arguments):
    """And leaves the random state of the step that asks for it alone."""
    split = Split(
        torch.arange(0, 256, 16, dtype=torch.uint8).view(1, 4, 4).repeat(100, 1, 1, 1)
    )  # alike, but for what is drawn
    data, before = ImageDataset(split, split, split, **arguments), torch.get_rng_state()
    found = data.draw(10, 50, seed=1)[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(found, data.draw(10, 50, seed=1)[0])
    assert not torch.equal(found, data.draw(110, 50, seed=1)[0]) and not torch.equal(
        found, data.draw(10, 50, seed=2)[0]
    )


def test_flips_mirror_about_half_of_the_training_images_and_no_test_image():
    data = plain_images(100, flip=True)
    mirrored = data.draw(0, 100, seed=0)[0][:, 0, 0, 0] >= 100
    assert 25 < mirrored.sum() < 75
    assert all((batch[:, 0, 0, 0] < 100).all() for batch in data.batches("test", 2))


def test_training_images_are_moved_by_every_distance_up_to_the_shift_and_repeat_their_border():
    image = torch.arange(20, dtype=torch.uint8).view(1, 1, 4, 5)
    split = Split(image.repeat(300, 1, 1, 1))
    data = ImageDataset(split, split, split, bits=8, flip=False, shift=1)
    padded = torch.nn.functional.pad(image.double(), (1, 1, 1, 1), mode="replicate").to(torch.uint8)
    expected = {
        (row, column): padded[0, :, 1 - row : 5 - row, 1 - column : 6 - column]
        for row in (-1, 0, 1)
        for column in (-1, 0, 1)
    }
    seen = {
        place
        for moved in data.draw(0, 300, seed=0)[0]
        for place, one in expected.items()
        if torch.equal(one, moved)
    }
    assert seen == set(expected)
    assert all(
        any(torch.equal(one, moved) for one in expected.values())
        for moved in data.draw(0, 300, seed=0)[0]
    )
    assert all(
        torch.equal(batch, image.expand(batch.shape))
        for name in ("train", "test")
        for batch in data.batches(name, 100)
    )


def test_bits_shift_levels_and_batches_keep_the_ragged_end():
    data = plain_images(bits=5)
    assert data.draw(0, 10, seed=0)[0].max() == 109 >> 3
    assert [len(batch) for batch in data.batches("test", 2)] == [2, 1]
    assert [len(batch) for batch in data.batches("train", 4, limit=5)] == [4, 1]


def test_embedded_digits():
    data = MNISTSample(bits=8, random_flip=False)
    assert data.train.images.shape == (4000, 1, 28, 28) and data.train.images.max() == 255
    assert data.image_shape == (1, 28, 28) and data.bits == 8 and data.num_classes == 10


@needs_shared
def test_real_mnist_and_faces():
    mnist = MNIST(
        name="MNIST", root=str(SHARED / "mnist"), search_dirs=[], size=28, bits=8, random_flip=False
    )
    assert (
        len(mnist.train) == 55_000 and len(mnist.validation) == 5_000 and len(mnist.test) == 10_000
    )
    faces = folder(SHARED / "celebahq64", size=64)
    assert len(torch.cat(parts(faces))) == 1002 and all(
        60 < len(split) < 140 for split in (faces.validation, faces.test)
    )


def test_a_run_keeps_what_images_it_is_of(tiny_run, images, command):
    assert (
        read_config(tiny_run / "config.yaml")["model"].items()
        >= {"image_shape": (3, 8, 8), "bits": 5}.items()
    )
    status, _, error = command("resume", tiny_run, "data.bits=8", "trainer.steps=9")
    assert status == 1 and "bits=5 does not fit data of bits=8" in error
    shutil.rmtree(images)
    assert flowgen.load(tiny_run).image_shape == (3, 8, 8)


def test_a_file_holds_no_point_of_the_plane(tmp_path):
    path = save_image(tmp_path / "image.png", (8, 8, 3))
    channels, size, _ = Toy2D(name="moons", num_points=5, bits=8, random_flip=False).shape
    with pytest.raises(UserError, match="2 channels, and an image file has 1 or 3"):
        read_images(path, size, channels, None, 8)


def test_a_file_in_a_zip_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("flowgen.data.preprocess.MAX_ABS_VALUE", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(10**6))
    with pytest.raises(UserError, match="it unpacks to more than"):
        folder(tmp_path / "bomb.zip")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("list_eval_partition.txt", bytes(10**6))
    with pytest.raises(UserError, match=r"list_eval_partition.txt cannot be read"):
        folder(tmp_path / "bomb.zip")


def test_batches_that_are_read_ahead_are_the_same_ones(monkeypatch):
    """In order, out of order, and where the memory that is free would not hold the set."""
    images = torch.randint(256, (40, 3, 4, 4), dtype=torch.uint8)
    splits = [Split(images, torch.arange(40)), Split(images[:2]), Split(images[:2])]
    whole, ahead = (ImageDataset(*splits, bits=5, flip=True, shift=1) for _ in range(2))
    monkeypatch.setattr("flowgen.data.dataset.free_memory", lambda: images.nbytes)
    ahead.to(torch.device("cpu"))
    calls = []
    monkeypatch.setattr(
        ahead._ahead, "draw", lambda *place: [calls.append(place[0]), whole.draw(*place)][1]
    )
    rows = torch.tensor([0, 3])
    for seen in (0, 8, 16, 0, 8, 36):
        for one, other in zip(
            ahead.next(seen, 8, 3, rows), whole.draw(seen, 8, 3, rows), strict=True
        ):
            assert torch.equal(one, other)
    ahead._ahead.pool.shutdown()
    assert sorted(calls) == [
        0,
        0,
        8,
        8,
        16,
        16,
        24,
        36,
        44,
    ]  # the batch to come, and what was not foreseen
