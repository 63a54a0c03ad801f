"""Attributes as directions in the latents, and `flowgen edit`."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from PIL import Image
from test_cli import assert_plain
from test_completion import make_flow, small_field
from test_labels import attribute_list
from test_models import MODELS, random_images

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
    one_hot,
    ridge,
)
from flowgen.training.run_dir import Run, cached_artifact
from flowgen.utils.errors import UserError

IMAGES = 4000


def batches(flow, latents, attributes):
    """Images whose latents these are, but for the width of a level, with their attributes."""
    images = flow.decode(latents)
    return zip(images.split(500), attributes.split(500), strict=True)


def test_ridge_tells_two_attributes_apart_that_go_together_and_the_mean_difference_does_not():
    """z = a B + N(0, I) where a1 = a2 nine times in ten: the slope of z along a1 alone is B1 + 0.8 B2."""
    flow, _, _ = small_field()
    changes = torch.randn(2, 16).double()
    first = torch.rand(IMAGES) < 0.5
    attributes = torch.stack((first, first ^ (torch.rand(IMAGES) < 0.1)), 1).double()
    found = compute_moments(
        flow, batches(flow, attributes @ changes + torch.randn(IMAGES, 16), attributes)
    )
    error = 5 * (torch.linalg.inv(found.attribute_cov).diagonal() / IMAGES).sqrt()[:, None]
    assert ((ridge(found) - changes).abs() < error + 0.02).all()
    slope = (found.attribute_cov[0, 1] / found.attribute_cov[0, 0]).item()
    assert slope == pytest.approx(0.8, abs=0.05)
    expected = changes + slope * changes.flip(0)
    assert ((mean_difference(found) - expected).abs() < 5 / math.sqrt(IMAGES / 4) + 0.1).all()
    assert (mean_difference(found) - changes).norm() > 5 * (ridge(found) - changes).norm()


def test_classes_have_their_means_and_an_image_leaves_its_own():
    flow, _, _ = small_field()
    middles, labels = torch.randn(3, 16).double(), torch.arange(IMAGES) % 3
    found = compute_moments(
        flow, batches(flow, middles[labels] + torch.randn(IMAGES, 16), one_hot(labels, 3))
    )
    assert (class_means(found) - middles).abs().max() < 5 / math.sqrt(IMAGES / 3) + 0.05
    directions = fit_directions(found, ("0", "1", "2"), classes=True)
    latent = middles[[0, 2]] + 0.1 * torch.randn(2, 16)
    assert directions.nearest_class(latent.float()).tolist() == [0, 2]
    step = directions.shift({"2": 1.0}, torch.tensor([0, 2]))
    assert (
        torch.allclose(step[0], directions.changes[2] - directions.changes[0])
        and step[1].abs().max() < 1e-6
    )


def test_a_flow_of_classes_moves_by_what_parts_their_means():
    flow, _, _ = small_field()
    with_classes = make_flow(flow.bijection, (1, 4, 4), num_classes=2)
    with_classes.means.data = torch.stack((torch.zeros(16), 0.5 * torch.ones(16))).double()
    images = flow.sample(20, generator=torch.Generator().manual_seed(1))[0]
    zero, one = move_along(
        with_classes, class_directions(with_classes), images, {"1": 1.0}, torch.tensor([0.0, 1.0])
    )
    assert (zero.int() - images.int()).abs().max() <= 1
    shift = 256 * (
        flow.bijection.inverse(with_classes.means[1:])[0] - flow.bijection.mean.view(1, 1, 4, 4)
    )
    leaves = (with_classes.classify(images).argmax(1) == 0).view(-1, 1, 1, 1)
    assert leaves.any() and not leaves.all()
    assert (one - (images + shift * leaves)).abs().max() < 1.01


def test_where_networks_see_the_class_it_changes_with_the_latents_but_no_further_than_to_the_other():
    model = MODELS["glow"](bits=5, classes=2)
    model.initialize(random_images(5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.eval()
    images, directions = random_images(5, 3), class_directions(model)
    assert directions.changes.shape == (2, 192 + 2)
    own = torch.zeros(3, dtype=torch.long)
    latent = torch.cat((model.encode(images)[:, :192], one_hot(own, 2)), 1)
    step = directions.shift({"1": 1.0}, own)
    near, to, beyond = (
        model.decode(torch.cat((latent[:, :192], (latent + by * step)[:, 192:]), 1))
        for by in (0, 1, 2)
    )
    assert torch.equal(to, beyond) and not torch.equal(near, to)
    assert (
        move_along(model, directions, images, {"1": 1.0}, torch.zeros(1))[0] == images
    ).float().mean() > 0.99


def test_images_are_encoded_once_in_batches_and_each_moves_as_it_would_alone(monkeypatch):
    model, images = MODELS["glow"](bits=5, classes=2, condition_networks=False), random_images(5, 7)
    model.initialize(random_images(5))
    model.eval()
    whole = move_along(model, class_directions(model), images, {"1": 0.5}, torch.tensor([0.0, 1.0]))
    sizes = []
    encode = model.encode
    monkeypatch.setattr(
        model,
        "encode",
        lambda batch, generator: sizes.append(len(batch)) or encode(batch, generator),
    )
    monkeypatch.setattr("flowgen.evaluation.latent_directions.BATCH_SIZE", 3)
    split = move_along(model, class_directions(model), images, {"1": 0.5}, torch.tensor([0.0, 1.0]))
    assert sizes == [3, 3, 1] and (split == whole).float().mean() > 0.99


def test_several_attributes_add_up_and_unknown_ones_are_named():
    directions = Directions(("Smiling", "Male"), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    assert directions.shift({"Male": -1.0, "Smiling": 0.5}).tolist() == [0.5, -2.0]
    with pytest.raises(UserError, match="unknown attribute Smile: choose one of Smiling, Male"):
        directions.shift({"Smile": 1.0})


@pytest.fixture
def labelled(images):
    (images / "list_attr_celeba.txt").write_text(attribute_list(list(range(40))))
    return images


def test_edit_shows_a_strip_a_pair_and_a_film_and_finds_directions_once(
    labelled, tiny_run, command, monkeypatch
):
    words = ["edit", labelled / "000.png", labelled / "001.png", "--run", tiny_run]
    status, output, error = command(*words, "--attribute", "Smiling")
    assert status == 0 and "directions of 4 attributes" in error, error
    strip = Image.open(output.strip())
    assert output.strip() == str(tiny_run / "edit.png") and strip.width > 3 * strip.height
    files = list(tiny_run.glob("directions_*.pt"))
    assert len(files) == 1
    monkeypatch.setattr(
        "flowgen.commands.edit.compute_moments", lambda *given: pytest.fail("found anew")
    )
    moved: list[tuple] = []
    monkeypatch.setattr(
        "flowgen.commands.edit.move_along", lambda *given: moved.append(given) or move_along(*given)
    )
    assert (
        command(*words, "--attribute", "Smiling", "--by", 1, "--attribute", "Bald", "--by", -0.5)[0]
        == 0
    )
    assert Image.open(tiny_run / "edit.png").width < strip.width
    assert (
        command(
            *words,
            "--attribute",
            "Smiling",
            "--method",
            "difference",
            "--out",
            tiny_run / "film.gif",
        )[0]
        == 0
    )
    assert Image.open(tiny_run / "film.gif").n_frames == 2 * 25 - 2 and len(moved) == 2, (
        "once a command"
    )
    files[0].write_bytes(files[0].read_bytes()[:100])
    with pytest.raises(pytest.fail.Exception, match="found anew"):
        command("--debug", *words, "--attribute", "Smiling")


def test_directions_are_those_of_the_weights(labelled, tiny_run, command):
    words = ["edit", labelled / "000.png", "--run", tiny_run, "--attribute", "Smiling"]
    assert command(*words)[0] == 0 and command("resume", tiny_run, "trainer.steps=7")[0] == 0
    status, _, error = command(*words)
    assert (
        status == 0
        and "directions of" in error
        and len(list(tiny_run.glob("directions_*.pt"))) == 1
    )


def test_what_was_found_of_weights_is_kept_whole_and_makes_room_for_what_is_found_of_others(
    tmp_path, monkeypatch
):
    def find(weight: float, settings: object, found: dict | None) -> dict:
        checkpoint = {"ema": None, "model": {"weight": torch.tensor([weight])}}
        return cached_artifact(
            Run(tmp_path),
            checkpoint,
            "latents",
            settings,
            lambda: found or pytest.fail("found anew"),
        )

    def full(value: object, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise RuntimeError("no space left")

    (tmp_path / "latents_mine.pt").touch()
    assert find(1.0, "a", {"found": 1}) == {"found": 1} == find(1.0, "a", None)
    assert find(1.0, "b", {"found": 2}) == {"found": 2} and find(1.0, "a", None) == {"found": 1}
    assert len(list(tmp_path.iterdir())) == 3
    assert find(2.0, "a", {"found": 3}) == {"found": 3}
    before = sorted(tmp_path.iterdir())
    assert len(before) == 2 and tmp_path / "latents_mine.pt" in before, "what is not its own stays"
    monkeypatch.setattr(torch, "save", full)
    assert find(3.0, "a", {"found": 4}) == {"found": 4} and sorted(tmp_path.iterdir()) == before


def test_edit_moves_along_a_table_of_ones_own(tiny_run, images, command, tmp_path):
    lines = [
        "file,Bright,Age",
        *(f"{number:03d}.png,{1 if number % 3 else -1},{number / 2}" for number in range(40)),
    ]
    (images / "mine.csv").write_text("\n".join(lines))
    table = read_table(images / "mine.csv")
    assert table.names == ("Bright", "Age") and table.values[:4].tolist() == [
        [0, 0],
        [1, 0.5],
        [1, 1],
        [0, 1.5],
    ]
    words = ["edit", images / "000.png", "--run", tiny_run, "--labels", images / "mine.csv"]
    status, _, error = command(*words, "--attribute", "Age", "--by", 3)
    assert status == 0 and "2 attributes from 40 images" in error


def test_edit_knows_the_classes_of_folders(images, command, tmp_path):
    for number in range(40):
        target = tmp_path / "sorted" / "ab"[number % 2] / f"{number:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / f"{number:03d}.png", target)
    run = tmp_path / "classless"
    assert (
        command(
            "train",
            *SMALL,
            f"data.root={tmp_path / 'sorted'}",
            "trainer.steps=2",
            f"output_dir={run}",
        )[0]
        == 0
    )
    status, _, error = command("edit", images / "000.png", "--run", run, "--attribute", "1")
    assert status == 0 and "directions of 2 classes" in error
    assert flowgen.load(run).classes is None
    assert_plain(
        command("edit", images / "000.png", "--run", run, "--attribute", "2"),
        "unknown class 2: choose one of 0, 1",
    )


def test_mistakes_get_one_line(labelled, tiny_run, command):
    for words, answer, status in (
        (["Smile"], "choose one of Bald, Smiling, Young", 1),
        (["Human"], "unknown attribute Human", 1),  # every image has it
        (["Smiling", "--by", "much"], "give a number, such as 1", 2),
        (["Smiling", "--by", "inf"], "give a number, such as 1", 2),
        (["Smiling", "--by", "1", "--by", "2"], "2 times --by does not fit 1 times --attribute", 1),
        (["Smiling", "--attribute", "Smiling"], "named twice", 1),
        (["Smiling", "--labels", "nowhere.csv"], "cannot be read as a table", 1),
        (
            ["Smiling", "--labels", "/dev/null"],
            "cannot be read as a table",
            1,
        ),  # no file: another of these would be read for ever
        (["Smiling", "--count", "1"], "--count", 2),
        (["Smiling", "--out", "strip"], "no name of a picture", 2),
        (["Smiling", "--run", "nowhere"], "flowgen runs", 1),
    ):
        assert_plain(
            command("edit", labelled / "000.png", "--run", tiny_run, "--attribute", *words),
            answer,
            status,
        )


def test_edit_without_images_attributes_or_labels_gets_one_line(tiny_run, images, command):
    assert_plain(command("edit", "--attribute", "Smiling"), "IMG", 2)
    assert_plain(command("edit", images / "000.png"), "--attribute", 2)
    assert_plain(
        command("edit", images / "000.png", "--run", tiny_run, "--attribute", "Smiling"),
        "nothing is known of this run's images",
    )
    assert_plain(
        command("edit", images / "no.png", "--run", tiny_run, "--attribute", "Smiling"),
        "does not exist",
    )


def test_tables_that_are_none_get_one_line(tiny_run, images, command):
    words = [
        "edit",
        images / "000.png",
        "--run",
        tiny_run,
        "--attribute",
        "A",
        "--labels",
        images / "mine.csv",
    ]
    for text, answer in (
        ("", "is not a table of attributes"),
        ("file\n000.png\n", "is not a table of attributes"),
        ("file,A,A\n000.png,1,1\n", "is not a table of attributes"),
        ("file,A\n", "is not a table of attributes"),
        ("file,A\n000.png,1,2\n", "line 2 of"),
        ("file,A\n000.png,1\n000.png,yes\n", "line 3 of"),
        ("file,A\n000.png,nan\n", "line 2 of"),
        ("file,A\nnone.png,1\n", "none.png, named"),
        ("file,A\n000.png\0,1\n", "mine.csv"),
        ("file,A\n000.png,1\n", "every attribute has the same value"),
    ):
        (images / "mine.csv").write_text(text)
        assert_plain(command(*words), answer)
