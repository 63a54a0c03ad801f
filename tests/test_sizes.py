"""Images that are not square: `data.size=[height,width]` in data sets, commands and files."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import RBM, SMALL, save_image, trained
from PIL import Image
from test_cli import assert_error
from test_data import folder
from test_idx import mnist, write_idx
from training_runs import same

import flowgen
from flowgen.commands.export import export
from flowgen.data.dataset import height_and_width
from flowgen.data.preprocess import preprocess
from flowgen.serving.session import ModelSession
from flowgen.training.checkpoint import read_safetensors
from flowgen.utils import rendering
from flowgen.utils.errors import UserError

HEIGHT = 4
WIDTH = 8
SIZE = f"data.size=[{HEIGHT},{WIDTH}]"
OPTIONS = ["model.levels=1", "model.num_classes=2", "trainer.steps=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images of two classes, the runs `glow` and `rbm` and `small.png`."""
    root = tmp_path_factory.mktemp("runs")
    for index in range(40):
        save_image(root / "images" / "ab"[index % 2] / f"{index:03d}.png", (10, 24, 3))
    save_image(root / "exact.png", (HEIGHT, WIDTH, 3))
    data = [f"data.root={root / 'images'}", SIZE]
    return trained(root, glow=[*SMALL, *data, *OPTIONS], rbm=[*RBM, *data])


def test_one_number_stands_for_a_square():
    assert height_and_width(64) == (64, 64)
    assert height_and_width([48, 64]) == (48, 64)


@pytest.mark.parametrize("size", [0, True, "64", 8.0, [8], [8, 8, 8], [8, 0], None, {}])
def test_other_sizes_are_refused(size, images):
    with pytest.raises(UserError, match="size must be a whole number"):
        folder(images, size=size)


def test_images_are_cropped_to_the_proportions_of_the_size(tmp_path):
    pixels = torch.zeros(20, 60, 3, dtype=torch.uint8)
    pixels[:, 10:50] = 255  # the largest central part of proportions 1:2
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    file = (tmp_path / "a.png").read_bytes()
    assert preprocess(file, (10, 20), 1, None).min() > 200  # black enters at the edge alone
    assert preprocess(file, (10, 30), 1, None).shape == (1, 10, 30)
    assert not preprocess(file, (10, 30), 1, None)[:, :, 0].any()
    with pytest.raises(UserError, match="is 60x20 pixels, too small for 241x10"):
        preprocess(file, (10, 241), 1, None)


def test_data_sets_have_images_of_both_sizes(images, tmp_path):
    assert folder(images, size=[4, 6]).image_shape == (3, 4, 6)
    assert folder(images, size=[4, 6]).test.images.shape[2:] == (4, 6)  # from the cache
    assert folder(images, size=[6, 4]).image_shape == (3, 6, 4)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", torch.zeros(9, 28, 28, dtype=torch.uint8))
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", torch.zeros(9, 28, 28, dtype=torch.uint8))
    assert mnist(tmp_path, size=[28, 32]).image_shape == (1, 28, 32)


def test_the_cache_of_squares_keeps_its_name(images):
    folder(images, size=8)
    folder(images, size=[8, 8])
    digest = hashlib.sha256(json.dumps([1, str(images.resolve()), 8, 3, None]).encode())
    (cached,) = Path(os.environ["FLOWGEN_CACHE"]).glob("*.bin")
    assert f"-{digest.hexdigest()[:12]}-" in cached.name


@pytest.mark.parametrize("name", ["glow", "rbm"])
def test_commands_draw_images_that_are_not_square(name, runs, command):
    run = ["--run", runs / name]
    image = next((runs / "images" / "a").glob("*.png"))
    exact = runs / "exact.png"
    lines = [
        ["sample", *run, "--count", 3, "--out", "samples.zip"],
        ["sample", *run, "--count", 3],
        ["interpolate", image, exact, *run, "--steps", 3],
        ["complete", exact, *run, "--known", "left", "--steps", 2],
        ["complete", exact, *run, "--known", "border", "--steps", 2],
        ["complete", image, *run, "--known", "left", "--steps", 2],
        ["edit", image, *run, "--attribute", "1"],
        ["score", image, exact, *run],
        ["evaluate", *run],
        ["report", runs / name],
    ]
    if name == "rbm":
        lines.append(["chain", *run, "--frames", 2, "--steps", 2, "--count", 2])
    else:
        lines.append(["complete", exact, *run, "--known", "downsample:2", "--steps", 2])
    for line in lines:
        status, _, error = command(*line)
        assert status == 0, (line, error)
    rows = rendering.Image.open(runs / name / "interpolation.png")
    assert rows.width > 2 * rows.height / 2


def test_checkpoints_and_exported_files_have_both_numbers(runs, command, tmp_path):
    path = tmp_path / "model.safetensors"
    export(run=str(runs / "glow"), path=path)
    config = read_safetensors(path, with_weights=False)["config"]
    assert config["data"]["size"] == [HEIGHT, WIDTH]
    assert config["model"]["image_shape"] == [3, HEIGHT, WIDTH]
    assert command("sample", "--run", path, "--out", tmp_path / "a.png", "--count", 2)[0] == 0
    assert command("sample", "--run", runs / "glow", "--out", "b.png", "--count", 2)[0] == 0
    assert (tmp_path / "a.png").read_bytes() == Path("b.png").read_bytes()


def test_a_resumed_run_equals_an_uninterrupted_one(runs, command, tmp_path):
    train = ["train", *SMALL, f"data.root={runs / 'images'}", SIZE, "model.levels=1"]
    assert command(*train, "trainer.steps=4", f"output_dir={tmp_path / 'once'}")[0] == 0
    assert command(*train, "trainer.steps=2", f"output_dir={tmp_path / 'twice'}")[0] == 0
    assert command("resume", tmp_path / "twice", "trainer.steps=4")[0] == 0
    once, twice = (
        torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True)["model"]
        for name in ("once", "twice")
    )
    assert same(once, twice)


def test_the_page_and_the_bot_accept_images_that_are_not_square(runs):
    session = ModelSession(str(runs / "glow"), "cpu")
    upload = session.read_upload(next((runs / "images" / "a").glob("*.png")).read_bytes())
    assert upload.shape == (1, 3, HEIGHT, WIDTH)
    file = rendering.encode_png(upload[0], session.model.bits)
    assert torch.equal(session.read_image(file), upload)
    assert session.read_mask(file).shape == (3, HEIGHT, WIDTH)
    turned = rendering.encode_png(upload[0].transpose(1, 2), session.model.bits)
    with pytest.raises(UserError, match="does not have the size of the model's images"):
        session.read_image(turned)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.size=[4,7]", "model.levels=1"], "multiple of 2, not [4,7]: choose fewer levels"),
        (["data.size=[7,8]", "data.channels=1"], "an even data.size for gray images, not [7,8]"),
        (["data.size=[4,6]", "model=tarflow", "model.patch=4"], "size=[4,6]: choose a divisor"),
        (["data.size=[4,6,3]"], "size must be a whole number or [height,width]"),
    ],
)
def test_one_sentence_says_that_a_size_does_not_fit(overrides, message, runs, command):
    data = ["data=folder", f"data.root={runs / 'images'}"]
    assert_error(command("train", *data, *overrides, "trainer.steps=1"), message)


def test_couplings_need_two_values():
    with pytest.raises(UserError, match="at least two values"):
        flowgen.create_model("nice", image_shape=(1, 1, 1))
