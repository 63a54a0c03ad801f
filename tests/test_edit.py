"""Attributes as directions in latent space, and `flowgen edit`."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from PIL import Image
from test_cli import assert_error
from test_completion import make_flow, small_field
from test_labels import attribute_list
from test_models import MODELS, random_images
from torch.nn.functional import one_hot

import flowgen
from flowgen.data.attributes import read_table
from flowgen.evaluation.latent_directions import (
    Directions,
    class_directions,
    class_means,
    compute_moments,
    fit_directions,
    mean_difference,
    move_along,
    ridge,
)
from flowgen.training.run_dir import Run, cached_artifact
from flowgen.utils.errors import UserError

NUM_IMAGES = 4000


def batches(flow, latents, attributes):
    """Return batches of images with these latents (up to quantization), and their attributes."""
    images = flow.decode(latents)
    return zip(images.split(500), attributes.split(500), strict=True)


def test_ridge_separates_correlated_attributes_and_the_mean_difference_does_not():
    """z = a B + N(0, I) where a1 = a2 nine times in ten: the slope of z along a1 is B1 + 0.8 B2."""
    flow, _, _ = small_field()
    changes = torch.randn(2, 16).double()
    first = torch.rand(NUM_IMAGES) < 0.5
    second = first ^ (torch.rand(NUM_IMAGES) < 0.1)
    attributes = torch.stack((first, second), 1).double()
    latents = attributes @ changes + torch.randn(NUM_IMAGES, 16)
    result = compute_moments(flow, batches(flow, latents, attributes))
    variances = torch.linalg.inv(result.attribute_cov).diagonal() / NUM_IMAGES
    error = 5 * variances.sqrt()[:, None]
    assert ((ridge(result) - changes).abs() < error + 0.02).all()
    slope = (result.attribute_cov[0, 1] / result.attribute_cov[0, 0]).item()
    assert slope == pytest.approx(0.8, abs=0.05)
    expected = changes + slope * changes.flip(0)
    error = 5 / math.sqrt(NUM_IMAGES / 4)
    assert ((mean_difference(result) - expected).abs() < error + 0.1).all()
    assert (mean_difference(result) - changes).norm() > 5 * (ridge(result) - changes).norm()


def test_classes_have_their_means_and_an_image_leaves_its_own_class():
    flow, _, _ = small_field()
    means = torch.randn(3, 16).double()
    labels = torch.arange(NUM_IMAGES) % 3
    latents = means[labels] + torch.randn(NUM_IMAGES, 16)
    result = compute_moments(flow, batches(flow, latents, one_hot(labels, 3)))
    error = 5 / math.sqrt(NUM_IMAGES / 3)
    assert (class_means(result) - means).abs().max() < error + 0.05
    directions = fit_directions(result, ("0", "1", "2"), classes=True)
    latent = means[[0, 2]] + 0.1 * torch.randn(2, 16)
    for dtype in (torch.float32, torch.float64):
        assert directions.nearest_class(latent.to(dtype)).tolist() == [0, 2]
    step = directions.shift({"2": 1.0}, torch.tensor([0, 2]))
    assert torch.allclose(step[0], directions.changes[2] - directions.changes[0])
    assert step[1].abs().max() < 1e-6


def test_a_class_conditional_flow_moves_by_the_difference_of_class_means():
    flow, _, _ = small_field()
    conditional = make_flow(flow.bijection, (1, 4, 4), num_classes=2)
    conditional.means.data = torch.stack((torch.zeros(16), 0.5 * torch.ones(16))).double()
    images = flow.sample(20, generator=torch.Generator().manual_seed(1))[0]
    directions = class_directions(conditional)
    shares = torch.tensor([0.0, 1.0])
    unchanged, moved = move_along(conditional, directions, images, {"1": 1.0}, shares)
    assert (unchanged.int() - images.int()).abs().max() <= 1
    mean_image = flow.bijection.inverse(conditional.means[1:])[0]
    shift = 256 * (mean_image - flow.bijection.mean.view(1, 1, 4, 4))
    leaves = (conditional.classify(images).argmax(1) == 0).view(-1, 1, 1, 1)
    assert leaves.any()
    assert not leaves.all()
    assert (moved - (images + shift * leaves)).abs().max() < 1.01


def test_the_condition_of_networks_moves_to_the_other_class_but_not_beyond():
    model = MODELS["glow"](bits=5, num_classes=2)
    model.initialize(random_images(5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.eval()
    images = random_images(5, 3)
    directions = class_directions(model)
    assert directions.changes.shape == (2, 192 + 2)
    labels = torch.zeros(3, dtype=torch.long)
    z = model.encode(images)[:, :192]
    latent = torch.cat((z, one_hot(labels, 2)), 1)
    step = directions.shift({"1": 1.0}, labels)

    def decode(amount: float) -> torch.Tensor:
        return model.decode(torch.cat((z, (latent + amount * step)[:, 192:]), 1))

    assert torch.equal(decode(1), decode(2))
    assert not torch.equal(decode(0), decode(1))
    (unchanged,) = move_along(model, directions, images, {"1": 1.0}, torch.zeros(1))
    assert (unchanged == images).float().mean() > 0.99


def test_images_are_encoded_once_in_batches_with_the_same_result(monkeypatch):
    model = MODELS["glow"](bits=5, num_classes=2, condition_networks=False)
    images = random_images(5, 7)
    model.initialize(random_images(5))
    model.eval()
    directions = class_directions(model)
    shares = torch.tensor([0.0, 1.0])
    whole = move_along(model, directions, images, {"1": 0.5}, shares)
    sizes = []
    encode = model.encode

    def record_size(batch, generator):
        sizes.append(len(batch))
        return encode(batch, generator)

    monkeypatch.setattr(model, "encode", record_size)
    monkeypatch.setattr("flowgen.evaluation.latent_directions.BATCH_SIZE", 3)
    split = move_along(model, directions, images, {"1": 0.5}, shares)
    assert sizes == [3, 3, 1]
    assert (split == whole).float().mean() > 0.99


def test_several_attributes_add_up_and_unknown_ones_are_errors():
    directions = Directions(("Smiling", "Male"), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    assert directions.shift({"Male": -1.0, "Smiling": 0.5}).tolist() == [0.5, -2.0]
    with pytest.raises(UserError, match="unknown attribute Smile: choose one of Smiling, Male"):
        directions.shift({"Smile": 1.0})


@pytest.fixture
def labeled(images):
    (images / "list_attr_celeba.txt").write_text(attribute_list(list(range(40))))
    return images


def test_edit_saves_a_strip_a_pair_and_a_gif_and_caches_directions(
    labeled, tiny_run, command, monkeypatch
):
    edit = ["edit", labeled / "000.png", labeled / "001.png", "--run", tiny_run]
    edit += ["--attribute", "Smiling"]
    status, output, error = command(*edit)
    assert status == 0, error
    assert "directions of 4 attributes" in error
    assert output.strip() == str(tiny_run / "edit.png")
    strip = Image.open(output.strip())
    assert strip.width > 3 * strip.height
    (cache,) = tiny_run.glob("directions_*.pt")
    monkeypatch.setattr(
        "flowgen.commands.edit.compute_moments", lambda *args: pytest.fail("not cached")
    )
    calls: list[tuple] = []

    def record_call(*args):
        calls.append(args)
        return move_along(*args)

    monkeypatch.setattr("flowgen.commands.edit.move_along", record_call)
    amounts = ["--amount", 1, "--attribute", "Bald", "--amount", -0.5]
    assert command(*edit, *amounts)[0] == 0
    assert Image.open(tiny_run / "edit.png").width < strip.width
    gif = tiny_run / "film.gif"
    assert command(*edit, "--direction", "difference", "--out", gif)[0] == 0
    assert Image.open(gif).n_frames == 2 * 25 - 2
    assert len(calls) == 2, "images are encoded once per command"
    cache.write_bytes(cache.read_bytes()[:100])
    with pytest.raises(pytest.fail.Exception, match="not cached"):
        command("--debug", *edit)


def test_directions_are_computed_again_for_other_images_of_a_table(labeled, tiny_run, command):
    table = labeled / "labels.csv"
    names = sorted(path.name for path in labeled.glob("*.png"))
    lines = [f"{name},{index % 2}" for index, name in enumerate(names)]
    table.write_text("\n".join(["image,odd", *lines]))
    edit = ["edit", labeled / "000.png", "--run", tiny_run, "--attribute", "odd"]
    edit += ["--labels", table]
    assert "directions of" in command(*edit)[2]
    assert "directions of" not in command(*edit)[2]
    shutil.copy(labeled / "001.png", labeled / "002.png")
    assert "directions of" in command(*edit)[2]


def test_directions_are_computed_again_for_other_weights(labeled, tiny_run, command):
    edit = ["edit", labeled / "000.png", "--run", tiny_run, "--attribute", "Smiling"]
    assert command(*edit)[0] == 0
    assert command("resume", tiny_run, "trainer.steps=7")[0] == 0
    status, _, error = command(*edit)
    assert status == 0
    assert "directions of" in error
    assert len(list(tiny_run.glob("directions_*.pt"))) == 1


def test_cached_artifacts_of_older_weights_are_deleted_and_others_kept(tmp_path, monkeypatch):
    def cached(weight: float, settings: object, value: dict | None) -> dict:
        checkpoint = {"ema": None, "model": {"weight": torch.tensor([weight])}}
        return cached_artifact(
            Run(tmp_path),
            checkpoint,
            "latents",
            settings,
            lambda: value or pytest.fail("not cached"),
        )

    def fail_halfway(value: object, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise RuntimeError("no space left")

    (tmp_path / "latents_mine.pt").touch()
    assert cached(1.0, "a", {"value": 1}) == {"value": 1}
    assert cached(1.0, "a", None) == {"value": 1}
    assert cached(1.0, "b", {"value": 2}) == {"value": 2}
    assert cached(1.0, "a", None) == {"value": 1}
    assert len(list(tmp_path.iterdir())) == 3
    assert cached(2.0, "a", {"value": 3}) == {"value": 3}
    before = sorted(tmp_path.iterdir())
    assert len(before) == 2
    assert tmp_path / "latents_mine.pt" in before, "files of the user stay"
    monkeypatch.setattr(torch, "save", fail_halfway)
    assert cached(3.0, "a", {"value": 4}) == {"value": 4}
    assert sorted(tmp_path.iterdir()) == before


def test_edit_moves_along_attributes_of_a_table(tiny_run, images, command):
    rows = [f"{number:03d}.png,{1 if number % 3 else -1},{number / 2}" for number in range(40)]
    (images / "mine.csv").write_text("\n".join(["file,Bright,Age", *rows]))
    table = read_table(images / "mine.csv")
    assert table.names == ("Bright", "Age")
    assert table.values[:4].tolist() == [[0, 0], [1, 0.5], [1, 1], [0, 1.5]]
    edit = ["edit", images / "000.png", "--run", tiny_run, "--labels", images / "mine.csv"]
    status, _, error = command(*edit, "--attribute", "Age", "--amount", 3)
    assert status == 0
    assert "2 attributes from 40 images" in error


def test_edit_uses_folders_as_classes(images, command, tmp_path):
    for number in range(40):
        target = tmp_path / "sorted" / "ab"[number % 2] / f"{number:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / f"{number:03d}.png", target)
    run = tmp_path / "unconditional"
    training = [*SMALL, f"data.root={tmp_path / 'sorted'}", "trainer.steps=2"]
    assert command("train", *training, f"output_dir={run}")[0] == 0
    edit = ["edit", images / "000.png", "--run", run, "--attribute"]
    status, _, error = command(*edit, "1")
    assert status == 0
    assert "directions of 2 classes" in error
    assert flowgen.load(run).num_classes is None
    assert_error(command(*edit, "2"), "unknown class 2: choose one of 0, 1")


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["Smile"], "choose one of Bald, Smiling, Young", 1),
        (["Human"], "unknown attribute Human", 1),  # every image has it
        (["Smiling", "--amount", "much"], "give a number, such as 1", 2),
        (["Smiling", "--amount", "inf"], "give a number, such as 1", 2),
        (
            ["Smiling", "--amount", "1", "--amount", "2"],
            "2 values of --amount do not match 1 of --attribute",
            1,
        ),
        (["Smiling", "--attribute", "Smiling"], "given twice", 1),
        (["Smiling", "--labels", "nowhere.csv"], "cannot be read as a table", 1),
        (["Smiling", "--labels", "/dev/null"], "cannot be read as a table", 1),
        (["Smiling", "--count", "1"], "--count", 2),
        (["Smiling", "--out", "strip"], "is not the path of", 2),
        (["Smiling", "--run", "nowhere"], "flowgen runs", 1),
    ],
)
def test_edit_errors_are_one_line(labeled, tiny_run, command, arguments, message, status):
    edit = ["edit", labeled / "000.png", "--run", tiny_run, "--attribute"]
    assert_error(command(*edit, *arguments), message, status)


def test_edit_without_images_attributes_or_labels_is_an_error(tiny_run, images, command):
    attribute = ["--attribute", "Smiling"]
    assert_error(command("edit", *attribute), "IMG", 2)
    assert_error(command("edit", images / "000.png"), "--attribute", 2)
    assert_error(
        command("edit", images / "000.png", "--run", tiny_run, *attribute),
        "the images of this run have no labels",
    )
    assert_error(
        command("edit", images / "no.png", "--run", tiny_run, *attribute), "does not exist"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "table of attributes"),
        ("file\n000.png\n", "table of attributes"),
        ("file,A,A\n000.png,1,1\n", "table of attributes"),
        ("file,A\n", "table of attributes"),
        ("file,A\n000.png,1,2\n", "line 2 of"),
        ("file,A\n000.png,1\n000.png,yes\n", "line 3 of"),
        ("file,A\n000.png,nan\n", "line 2 of"),
        ("file,A\nnone.png,1\n", "none.png, "),
        ("file,A\n000.png\0,1\n", "mine.csv"),
        ("file,A\n000.png,1\n", "every attribute has the same value"),
    ],
)
def test_errors_of_tables_are_one_line(tiny_run, images, command, text, message):
    table = images / "mine.csv"
    table.write_text(text)
    edit = ["edit", images / "000.png", "--run", tiny_run, "--attribute", "A"]
    assert_error(command(*edit, "--labels", table), message)
