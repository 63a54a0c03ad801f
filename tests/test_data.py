"""Data sets: image files of every format, batches, and defaults."""

import hashlib
import inspect
import io
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import save_image
from PIL import Image

import flowgen
import flowgen.config
import flowgen.data
from flowgen.config.compose import conf_folder, group_options, read_config
from flowgen.config.instantiate import instantiate, resolve_target
from flowgen.data import download
from flowgen.data.dataset import ImageDataset
from flowgen.data.download import find_dataset
from flowgen.data.energy2d import Energy2D
from flowgen.data.hub import HubDataset
from flowgen.data.image_folder import ImageFolder
from flowgen.data.imagenet import DownsampledImageNet
from flowgen.data.mnist import MNIST, SEARCH_DIRS, MNISTSample
from flowgen.data.preprocess import open_source, preprocess, read_image
from flowgen.data.splits import Split
from flowgen.data.toy2d import Toy2D
from flowgen.utils.errors import UserError
from flowgen.utils.files import atomic_write, data_folder

SHARED = Path(os.environ.get("FLOWGEN_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_shared = pytest.mark.skipif(
    not (SHARED / "celebahq64").is_dir(),
    reason="needs FLOWGEN_TEST_DATA, a folder with mnist/, celeba64/ and celebahq64/",
)


def folder(root: Path, **changes: object) -> ImageFolder:
    return ImageFolder(root=str(root), **{"size": 8, "bits": 5, "random_flip": False} | changes)


def split_images(data: ImageDataset) -> list[torch.Tensor]:
    """The images of every split, at 8 bits."""
    return [split.images for split in (data.train, data.validation, data.test)]


def random_png(shape: tuple[int, ...] = (8, 8, 3)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(torch.randint(0, 256, shape, dtype=torch.uint8).numpy()).save(file, "png")
    return file.getvalue()


def test_folders_that_links_lead_to_are_read_once(images, tmp_path):
    root = tmp_path / "pictures"
    (root / "own").mkdir(parents=True)
    shutil.copy(images / "000.png", root / "own" / "mine.png")
    (root / "linked").symlink_to(images)
    (root / "again").symlink_to(images)
    (root / "own" / "up").symlink_to(root)
    assert len(open_source(root).names) == 1 + len(list(images.glob("*.png")))


def test_a_folder_and_a_zip_contain_the_same_images(images, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in images.iterdir():
            archive.write(path, f"deep/{path.name}")
        archive.writestr("__MACOSX/deep/._000.png", b"shadow")
    (tmp_path / "outer").mkdir()
    (tmp_path / "images.zip").rename(tmp_path / "outer" / "images.zip")
    expected = split_images(folder(images))
    for root in (tmp_path / "outer" / "images.zip", tmp_path / "outer"):
        loaded = split_images(folder(root))
        assert all(torch.equal(x, y) for x, y in zip(expected, loaded, strict=True))


def test_bad_images_are_skipped_named_and_counted(images, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flowgen"), "propagate", True)
    (images / "text.png").write_text("no picture")
    (images / "short.png").write_bytes(random_png()[:60])
    save_image(images / "dot.png", (1, 1, 3))
    data = folder(images)
    assert len(torch.cat(split_images(data))) == 40
    assert "3 of 43 images skipped" in caplog.text
    assert "dot.png is 1x1 pixels" in caplog.text


def test_images_of_every_kind_become_the_same_square(tmp_path):
    gray16 = Image.fromarray((torch.arange(64).view(8, 8) * 1000).to(torch.uint16).numpy())
    kinds = {
        "gray.png": Image.new("L", (12, 9), 100),
        "color.png": Image.new("RGB", (9, 12), (100, 100, 100)),
        "alpha.png": Image.new("RGBA", (9, 9), (100, 100, 100, 255)),
        "palette.gif": Image.new("RGB", (9, 9), (100, 100, 100)).convert("P"),
        "cmyk.jpg": Image.new("CMYK", (9, 9)),
        "sixteen.png": gray16,
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
        for channels in (1, 3):
            pixels = preprocess((tmp_path / name).read_bytes(), 8, channels, None)
            assert pixels.shape == (channels, 8, 8)
            assert pixels.dtype == torch.uint8
            if name in ("gray.png", "color.png", "alpha.png"):
                assert (pixels == 100).all()
    assert preprocess((tmp_path / "sixteen.png").read_bytes(), 8, 1, None).max() > 200


def test_a_named_pipe_is_not_a_zip(tmp_path):
    os.mkfifo(tmp_path / "images.zip")
    with pytest.raises(UserError, match="contains no images and 0 zips"):
        folder(tmp_path)


def test_crop_cuts_out_the_center(tmp_path):
    image = Image.new("RGB", (178, 218), "black")
    image.paste("white", (15, 35, 163, 183))
    image.save(tmp_path / "face.png")
    assert (preprocess((tmp_path / "face.png").read_bytes(), 64, 3, 148) == 255).all()
    assert (preprocess((tmp_path / "face.png").read_bytes(), 64, 3, None) == 0).any()


def plain_images(count: int = 10, *, random_flip: bool = False, bits: int = 8) -> ImageDataset:
    """Images of 2x2 pixels; the left column has the image's index, the right one 100 more."""
    train = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    train = train.expand(count, 1, 2, 2).contiguous()
    train[:, :, :, 1] += 100
    return ImageDataset(
        Split(train), Split(train[:2]), Split(train[:3]), bits=bits, random_flip=random_flip
    )


def test_every_epoch_visits_every_image_once_across_ragged_batches():
    data = plain_images(10)
    values = [data.train_batch(seen, 4, seed=1)[0][:, 0, 0, 0] for seen in range(0, 20, 4)]
    epochs = torch.cat(values).view(2, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_a_batch_does_not_depend_on_earlier_batches():
    first = plain_images()
    second = plain_images()
    first.train_batch(0, 4, seed=1)
    assert torch.equal(first.train_batch(14, 9, seed=1)[0], second.train_batch(14, 9, seed=1)[0])
    epochs = [first.train_batch(0, 10, seed=seed)[0] for seed in (1, 2)]
    assert not torch.equal(*epochs)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8, "random_flip": True, "random_shift": 1},
        {"bits": 1, "random_flip": False, "binarization": "dynamic"},
    ],
    ids=str,
)
def test_random_changes_depend_only_on_the_seed_and_the_images_seen(options):
    """The global random state is neither used nor changed."""
    image = torch.arange(0, 256, 16, dtype=torch.uint8).view(1, 4, 4)
    split = Split(image.repeat(100, 1, 1, 1))  # images are equal before the random changes
    data = ImageDataset(split, split, split, **options)
    state = torch.get_rng_state()
    batch = data.train_batch(10, 50, seed=1)[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(batch, data.train_batch(10, 50, seed=1)[0])
    assert not torch.equal(batch, data.train_batch(110, 50, seed=1)[0])
    assert not torch.equal(batch, data.train_batch(10, 50, seed=2)[0])
    rows = torch.tensor([3, 40])
    assert torch.equal(batch[rows], data.train_batch(10, 50, seed=1, rows=rows)[0])


def test_about_half_of_the_training_images_are_flipped_and_no_test_image():
    data = plain_images(100, random_flip=True)
    flipped = data.train_batch(0, 100, seed=0)[0][:, 0, 0, 0] >= 100
    assert 25 < flipped.sum() < 75
    assert all((batch[:, 0, 0, 0] < 100).all() for batch in data.batches("test", 2))


def test_training_images_are_shifted_by_every_distance_and_repeat_their_border():
    image = torch.arange(20, dtype=torch.uint8).view(1, 1, 4, 5)
    split = Split(image.repeat(300, 1, 1, 1))
    data = ImageDataset(split, split, split, bits=8, random_flip=False, random_shift=1)
    padded = torch.nn.functional.pad(image.double(), (1, 1, 1, 1), mode="replicate").to(torch.uint8)
    expected = {
        (row, column): padded[0, :, 1 - row : 5 - row, 1 - column : 6 - column]
        for row in (-1, 0, 1)
        for column in (-1, 0, 1)
    }
    offsets = [
        [offset for offset, shifted in expected.items() if torch.equal(shifted, row)]
        for row in data.train_batch(0, 300, seed=0)[0]
    ]
    assert all(len(matches) == 1 for matches in offsets)
    assert {matches[0] for matches in offsets} == set(expected)
    for name in ("train", "test"):
        for batch in data.batches(name, 100):
            assert torch.equal(batch, image.expand(batch.shape))


def test_bits_shift_pixel_values_and_the_last_batch_is_smaller():
    data = plain_images(bits=5)
    assert data.train_batch(0, 10, seed=0)[0].max() == 109 >> 3
    assert [len(batch) for batch in data.batches("test", 2)] == [2, 1]
    assert [len(batch) for batch in data.batches("train", 4, limit=5)] == [4, 1]


def test_the_included_digits():
    data = MNISTSample()
    assert data.train.images.shape == (4000, 1, 28, 28)
    assert data.train.images.max() == 255
    assert data.image_shape == (1, 28, 28)
    assert data.bits == 8
    assert data.num_classes == 10


@needs_shared
def test_real_mnist_and_faces():
    mnist = MNIST(root=str(SHARED / "mnist"))
    sizes = [len(split) for split in (mnist.train, mnist.validation, mnist.test)]
    assert sizes == [55_000, 5_000, 10_000]
    faces = folder(SHARED / "celebahq64", size=64)
    assert len(torch.cat(split_images(faces))) == 1002
    assert all(60 < len(split) < 140 for split in (faces.validation, faces.test))


def test_a_run_remembers_the_shape_and_bits_of_its_images(tiny_run, images, command):
    model = read_config(tiny_run / "config.yaml")["model"]
    assert model["image_shape"] == [3, 8, 8]
    assert model["bits"] == 5
    status, _, error = command("resume", tiny_run, "data.bits=8", "trainer.steps=9")
    assert status == 1
    assert "bits=5 does not fit data with bits=8" in error
    shutil.rmtree(images)
    assert flowgen.load(tiny_run).image_shape == (3, 8, 8)


def test_an_image_file_cannot_be_a_point_of_the_plane(tmp_path):
    path = save_image(tmp_path / "image.png", (8, 8, 3))
    channels, size, _ = Toy2D(num_points=5).image_shape
    with pytest.raises(UserError, match="2 channels, and an image file has 1 or 3"):
        read_image(path, size, channels, None, 8)


def test_a_file_in_a_zip_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("flowgen.data.preprocess.MAX_UNPACKED_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(10**6))
    with pytest.raises(UserError, match="it unpacks to more than"):
        folder(tmp_path / "bomb.zip")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("list_eval_partition.txt", bytes(10**6))
    with pytest.raises(UserError, match=r"list_eval_partition.txt cannot be read"):
        folder(tmp_path / "bomb.zip")


def test_prefetched_batches_are_the_same(monkeypatch):
    """In order and out of order, for a data set larger than half of the free memory."""
    images = torch.randint(256, (40, 3, 4, 4), dtype=torch.uint8)
    splits = [Split(images, torch.arange(40)), Split(images[:2]), Split(images[:2])]
    data = ImageDataset(*splits, bits=5, random_flip=True, random_shift=1)
    prefetched = ImageDataset(*splits, bits=5, random_flip=True, random_shift=1)
    monkeypatch.setattr("flowgen.data.dataset.free_memory", lambda: images.nbytes)
    prefetched.to(torch.device("cpu"))
    calls = []

    def train_batch(images_seen, *arguments):
        calls.append(images_seen)
        return data.train_batch(images_seen, *arguments)

    monkeypatch.setattr(prefetched.next_batch, "train_batch", train_batch)
    rows = torch.tensor([0, 3])
    for seen in (0, 8, 16, 0, 8, 36):
        batch = prefetched.next_batch(seen, 8, 3, rows)
        expected = data.train_batch(seen, 8, 3, rows)
        assert all(torch.equal(x, y) for x, y in zip(batch, expected, strict=True))
    prefetched.next_batch.pool.shutdown()
    # Each batch once, the one after it, and those that were not the next one
    assert sorted(calls) == [0, 0, 8, 8, 16, 16, 24, 36, 44]


IDENTITY = {  # arguments that distinguish the data sets of a class
    MNIST: ("name", "search_dirs"),
    DownsampledImageNet: ("size", "search_dirs"),
    HubDataset: ("name",),
    ImageFolder: ("root", "search_dirs", "download_hint", "crop"),
}
# Options that a configuration leaves out
WITHOUT_EFFECT = {Energy2D: {"random_shift"}, Toy2D: {"random_shift"}}


def defaults_of(target: type) -> dict[str, object]:
    """Defaults of the constructor, and of the options that it passes on to `ImageDataset`."""
    parameters = {
        **inspect.signature(ImageDataset).parameters,
        **inspect.signature(target).parameters,
    }
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in defaults.items()
        if name not in ("train", "validation", "test", "attributes", "options")
    }


@pytest.mark.parametrize("name", group_options("data"))
def test_a_configuration_has_every_option_of_its_data_set(name):
    section = yaml.safe_load((conf_folder() / "data" / f"{name}.yaml").read_text())
    target = resolve_target("data", section)
    expected = defaults_of(target).keys() - WITHOUT_EFFECT.get(target, set())
    assert section.keys() - {"_target_"} == expected


@pytest.mark.parametrize("name", group_options("data"))
def test_constructors_have_the_defaults_of_the_configuration(name):
    """The configurations of one class differ in the arguments that make up a data set only."""
    section = yaml.safe_load((conf_folder() / "data" / f"{name}.yaml").read_text())
    target = resolve_target("data", section)
    defaults = defaults_of(target)
    for key in IDENTITY.get(target, ()):
        defaults[key] = section[key]
    del section["_target_"]
    assert {key: defaults[key] for key in section} == section


@pytest.mark.parametrize("name", group_options("data"))
def test_every_data_set_is_exported_documented_and_knows_its_downloads(name, monkeypatch):
    section = yaml.safe_load((conf_folder() / "data" / f"{name}.yaml").read_text())
    exported = resolve_target("data", section).__name__
    assert exported in flowgen.data.__all__, f"export {exported} in flowgen/data/__init__.py"
    page = Path(__file__).parents[1] / "docs/data.md"
    assert f"`{name}`" in page.read_text(), f"add the splits of {name} to docs/data.md"
    downloads = []
    monkeypatch.setattr(download, "download", lambda *arguments: downloads.append(arguments))
    if name == "hub":  # downloads through huggingface_hub, see test_hub_data.py
        assert exported in flowgen.data.DOWNLOADABLE
        return
    if section.get("root", "") is None:  # it is searched for in an empty folder
        with pytest.raises((UserError, OSError)):
            instantiate("data", section)
    assert bool(downloads) == (exported in flowgen.data.DOWNLOADABLE), (
        f"{exported} must be in DOWNLOADABLE in flowgen/data/__init__.py if it downloads its files"
    )


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 2**16), ("I", -1)])
def test_images_of_32_bits_are_refused(tmp_path, mode, value):
    path = tmp_path / "image.tif"
    Image.new(mode, (8, 8), value).save(path)
    with pytest.raises(UserError, match="convert it to 8 or 16 bits"):
        preprocess(path.read_bytes(), 8, 1, None)


@pytest.mark.parametrize("name", ["imagenet32", "imagenet64"])
def test_imagenet_is_searched_under_its_own_size(name):
    section = yaml.safe_load((conf_folder() / "data" / f"{name}.yaml").read_text())
    with pytest.raises(UserError, match=f"{section['search_dirs'][0]} does not exist"):
        DownsampledImageNet(size=section["size"])


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_sets_in_mnist_format_have_their_own_search_dirs(name):
    section = yaml.safe_load((conf_folder() / "data" / f"{name}.yaml").read_text())
    assert section["search_dirs"] == list(SEARCH_DIRS[section["name"]])


def served(folder: Path, **files: bytes) -> dict[str, str]:
    """Write files and return their MD5 checksums by URL."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {
        (folder / name).as_uri(): hashlib.md5(content).hexdigest()
        for name, content in files.items()
    }


def test_missing_data_is_downloaded_once(tmp_path, elsewhere):
    files = served(tmp_path / "server", a=b"first", b=b"second")
    path = find_dataset(None, ["new", "old"], "Get it.", files)
    assert path == elsewhere / "data" / "new"
    assert sorted(file.name for file in path.iterdir()) == ["a", "b"]
    shutil.rmtree(tmp_path / "server")
    assert find_dataset(None, ["new", "old"], "Get it.", files) == path
    (elsewhere / "data" / "new").rename(elsewhere / "data" / "old")
    assert find_dataset(None, ["new", "old"], "Get it.", files) == elsewhere / "data" / "old"


def test_a_download_with_a_wrong_checksum_is_refused_and_continued(tmp_path, elsewhere):
    files = served(tmp_path / "server", a=b"first", b=b"second")
    (tmp_path / "server" / "b").write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=r"server/b could not be downloaded \(its checksum is wrong"
    ):
        find_dataset(None, ["new"], "Get it.", files)
    assert not (elsewhere / "data" / "new").exists()
    (tmp_path / "server" / "b").write_bytes(b"second")
    (tmp_path / "server" / "a").unlink()  # it is complete and not downloaded again
    path = find_dataset(None, ["new"], "Get it.", files)
    assert (path / "a").read_bytes() == b"first"


def test_a_download_that_fails_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"could not be downloaded .*or set data\.root"):
        find_dataset(None, ["new"], "Get it.", {(tmp_path / "nowhere").as_uri(): ""})


def test_nothing_is_downloaded_outside_the_data_folder(tmp_path):
    files = served(tmp_path / "server", a=b"first")
    for name in ("../new", "/new", ""):
        with pytest.raises(UserError, match="inside the data folder"):
            find_dataset(None, [name], "Get it.", files)


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("crash")
    assert path.read_text() == "old"
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (tmp_path / "file.txt.part").symlink_to(secret)
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert (path.read_text(), secret.read_text()) == ("new", "secret")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file.txt", "secret"]


def test_the_package_imports_a_data_set_when_it_is_used():
    assert all(isinstance(getattr(flowgen.data, name), type) for name in flowgen.data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        flowgen.data.Nothing  # noqa: B018
    program = (
        "import sys, flowgen.data as data; data.Toy2D; "
        "sys.exit('flowgen.data.mnist' in sys.modules or 'matplotlib' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_data_folder_may_be_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("FLOWGEN_DATA", "~/sets")
    assert data_folder() == Path.home() / "sets"
