"""An RBM through the command line: trained, resumed, sampled from, judged, and asked to complete images."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_image, save_images, trained
from PIL import Image, ImageSequence
from test_training import assert_same_run

import flowgen
from flowgen.models.rbm.rbm import RBM
from flowgen.training.checkpoint import read_checkpoint

Command = Callable[..., tuple[int, str, str]]
TINY = [
    "model=rbm",
    "data=folder",
    "data.size=8",
    "data.channels=1",
    "model.hidden=6",
    "trainer.batch_size=7",
    "trainer.init_images=16",
    "trainer.log_every=2",
    "trainer.save_every=2",
]


@pytest.fixture(scope="module")
def twenty_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twenty_steps")
    return (
        trained(
            folder, rbm=[*TINY, f"data.root={save_images(folder / 'images')}", "trainer.steps=20"]
        )
        / "rbm"
    )


@pytest.fixture
def rbm_run(twenty_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(twenty_steps, tmp_path / "rbm"))


def test_a_run_leaves_its_figures_and_a_picture_of_its_weights(rbm_run):
    rows = [json.loads(line) for line in (rbm_run / "metrics.jsonl").read_text().splitlines()]
    test = next(row for row in rows if row["split"] == "test")
    assert {
        "log_likelihood",
        "log_likelihood_error",
        "reconstruction_error",
        "pseudo_log_likelihood",
        "free_energy_gap",
    } <= test.keys()
    assert "autocorrelation" in next(row for row in rows if row["split"] == "train")
    assert (
        Image.open(rbm_run / "features.png").width > 100
        and (rbm_run / "samples" / "step_00000020.png").exists()
    )


@pytest.mark.parametrize(
    ("phase", "binarise"),
    [
        ("cd", "static"),
        ("cd", "dynamic"),
        ("pcd", "dynamic"),
        ("tempering", "dynamic"),
        ("mean_field", "dynamic"),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(images, tmp_path, command, phase, binarization):
    """Chains, ladder, offsets, momentum and random states included."""
    words = [
        *TINY,
        f"data.root={images}",
        f"model/negative_phase={phase}",
        f"data.binarization={binarization}",
        "trainer.warmdown_ratio=0",
    ]
    for name, steps in (("whole", 110), ("stopped", 56)):
        assert (
            command("train", *words, f"trainer.steps={steps}", f"output_dir={tmp_path / name}")[0]
            == 0
        )
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    kept = [
        line for line in metrics.read_text().splitlines() if json.loads(line)["split"] == "train"
    ]
    metrics.write_text(
        "\n".join(kept) + "\n"
    )  # the end of a run is judged, which the longer run did not do there
    state = read_checkpoint(tmp_path / "stopped" / "checkpoints" / "last.pt")
    state["progress"]["best"] = float("inf")
    torch.save(state, tmp_path / "stopped" / "checkpoints" / "last.pt")
    assert command("resume", tmp_path / "stopped", "trainer.steps=110")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_what_the_checkpoint_holds_is_an_rbm(rbm_run):
    rbm = flowgen.load(rbm_run)
    assert (
        isinstance(rbm, RBM)
        and rbm.weight.shape == (64, 6)
        and rbm.visible_bias.shape == (64,)
        and rbm.hidden_bias.shape == (6,)
    )


def test_evaluate_is_exact_where_it_can_be_and_names_the_binarisation(rbm_run, command):
    status, out, error = command("evaluate", "--run", rbm_run, "--json")
    assert status == 0, error
    figures = json.loads(out)
    assert (
        figures["reliable"] is True
        and "exact" in figures["verdict"]
        and figures["binarization"] == "dynamic"
    )
    assert figures["log_likelihood"] < 0 and figures["log_likelihood_error"] > 0
    assert "log_likelihood" in command("evaluate", "--run", rbm_run)[1]


def test_evaluate_prints_the_sandwich(images, tmp_path, command):
    words = [
        *TINY,
        "model.hidden=24",
        f"data.root={images}",
        "trainer.steps=4",
        f"output_dir={tmp_path / 'r'}",
    ]
    assert command("train", *words, f"data.root={images}", f"output_dir={tmp_path / 'r'}")[0] == 0
    figures = json.loads(
        command(
            "evaluate",
            "--run",
            tmp_path / "r",
            "--json",
            "ais_steps=50",
            "evaluation.ais_chains=20",
        )[1]
    )
    for name in ("forward", "reverse", "bridge"):
        assert (
            figures[f"log_z_{name}_error"] > 0
            and figures[f"effective_size_{name}"] > 1
            and figures[f"log_likelihood_{name}"] < 0
        )
    assert isinstance(figures["reliable"], bool)
    look = json.loads(
        command("evaluate", "--run", tmp_path / "r", "--json", "ais_steps=50", "cross_check=false")[
            1
        ]
    )
    assert look["log_z_error"] > 0 and "reliable" not in look


def test_how_to_evaluate_is_no_setting_of_the_model(rbm_run, images, command):
    words = "model.betas is no setting of the model: write evaluation.ais_steps=50, or `flowgen evaluate ais_steps=50`"
    assert_plain(command("evaluate", "--run", rbm_run, "model.betas=50"), words)
    assert_plain(
        command("train", *TINY, f"data.root={images}", "trainer.steps=1", "model.betas=50"), words
    )
    assert_plain(
        command("evaluate", "--run", rbm_run, "ais_steps=0"),
        "betas must be a whole number of at least 1",
    )


def test_checkpoints_that_say_in_their_model_how_to_evaluate_still_load(tiny_run, command):
    path = tiny_run / "checkpoints" / "last.pt"
    state = read_checkpoint(path)
    del state["config"]["evaluation"]
    state["config"]["model"]["draws"] = 3
    torch.save(state, path)
    assert flowgen.load(tiny_run).classes is None
    assert json.loads(command("evaluate", "--run", tiny_run, "--json")[1])["draws"] == 3
    assert (
        json.loads(command("evaluate", "--run", tiny_run, "--json", "num_importance_samples=2")[1])[
            "draws"
        ]
        == 2
    )
    assert (
        command("resume", tiny_run, "trainer.steps=7", "evaluation.num_importance_samples=4")[0]
        == 0
    )
    assert read_checkpoint(path)["config"]["evaluation"]["num_importance_samples"] == 4


@pytest.mark.parametrize("method", ["gibbs", "tempering", "mean-field"])
def test_sample_and_chain_by_every_method(rbm_run, command, method):
    status, out, error = command(
        "sample",
        "--run",
        rbm_run,
        "--sampler",
        method,
        "--count",
        5,
        "--steps",
        3,
        "--temperature",
        1,
    )
    assert status == 0, error
    assert Image.open(out.strip()).width > 200
    status, out, error = command(
        "chain", "--run", rbm_run, "--sampler", method, "--frames", 6, "--count", 9
    )
    assert status == 0, error
    frames = [frame.copy() for frame in ImageSequence.Iterator(Image.open(out.strip()))]
    assert len(frames) > 1 and frames[0].width == frames[0].height


@pytest.mark.parametrize("keep", ["left", "right", "top", "bottom", "border", "random:40", "mask"])
def test_complete_keeps_what_is_known(rbm_run, images, command, tmp_path, keep):
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 3, 5))
    mask.save(tmp_path / "mask.png")
    keep = str(tmp_path / "mask.png") if keep == "mask" else keep
    status, out, error = command(
        "complete", images / "000.png", "--known", keep, "--run", rbm_run, "--steps", 20
    )
    assert status == 0, error
    page = Image.open(out.strip())
    assert page.height > 3 * 56  # a row for each of the three samplers
    one = command(
        "complete",
        images / "000.png",
        "--known",
        keep,
        "--run",
        rbm_run,
        "--steps",
        20,
        "--sampler",
        "gibbs",
    )
    assert Image.open(one[1].strip()).height < page.height / 2


def test_the_newest_run_that_fits_is_taken(elsewhere, images, command):
    from conftest import SMALL

    assert (
        command("train", *TINY, f"data.root={images}", "trainer.steps=2", "output_dir=outputs/rbm")[
            0
        ]
        == 0
    )
    assert (
        command(
            "train", *SMALL, f"data.root={images}", "trainer.steps=1", "output_dir=outputs/glow"
        )[0]
        == 0
    )
    assert "outputs/rbm" in command("chain", "--frames", 2, "--count", 4)[1]
    assert "outputs/glow" in command("sample", "--count", 2)[1]
    assert "outputs/rbm" in command("sample", "--count", 2, "--sampler", "gibbs", "--steps", 2)[1]


def assert_plain(outcome: tuple[int, str, str], words: str, status: int = 1) -> None:
    assert (
        outcome[0] == status and words in outcome[2] and len(outcome[2].strip().splitlines()) == 1
    ), outcome


def test_bad_input_gets_one_plain_line(rbm_run, tiny_run, images, tmp_path, command):
    wrong = save_image(tmp_path / "wrong.png", (16, 16, 3))
    for name, shade in (("all", 255), ("none", 0)):
        Image.new("L", (8, 8), shade).save(tmp_path / f"{name}.png")
    complete = ("complete", images / "000.png", "--run", rbm_run, "--known")
    assert_plain(
        command("complete", wrong, "--known", "left", "--run", rbm_run),
        "16x16 pixels, and the images of this model are 8x8",
    )
    assert_plain(command(*complete, tmp_path / "all.png"), "every pixel as known")
    assert_plain(command(*complete, tmp_path / "none.png"), "no pixel as known")
    assert_plain(command(*complete, wrong), "resize it first")
    assert_plain(
        command(*complete, "middle"),
        "--known must be left, right, top, bottom, border, random:PERCENT, grayscale",
    )
    assert_plain(command(*complete, tmp_path / "lost.png"), "does not exist")
    assert_plain(
        command(*complete, "left", "--sampler", "magic"),
        "method must be one of gibbs, tempering, mean-field, not 'magic'",
    )
    assert_plain(
        command("chain", "--run", tiny_run), "is no run of a model that draws by Markov chains"
    )
    assert_plain(
        command(
            "complete", images / "000.png", "--known", "left", "--run", tiny_run, "--sampler", "gibbs"
        ),
        "must be langevin",
    )
    for share in ("0", "100", "half"):
        assert_plain(command(*complete, f"random:{share}"), "random:PERCENT")
    assert_plain(
        command("sample", "--run", tiny_run, "--sampler", "gibbs"),
        "is no run of a model that draws by Markov chains",
    )
    assert_plain(command("chain", "--run", rbm_run, "--out", "film.png"), "let it end in .gif", 2)
    assert_plain(command("chain", "--run", rbm_run, "--sampler", "magic"), "magic", 2)
    assert_plain(command("chain", "--run", rbm_run, "--frames", 10**9), "--frames=1000000000 needs")
    assert_plain(
        command("train", *TINY, f"data.root={images}", "data.bits=8", "trainer.steps=1"),
        "leave data.bits at 1",
    )
    assert_plain(
        command(
            "train", *TINY, f"data.root={images}", "model.negative_phase=cd", "trainer.steps=1"
        ),
        "with a slash",
    )
    assert_plain(command("evaluate", "--run", rbm_run, "model.hidden=[8"), "cannot be read")
    assert_plain(
        command(
            "train", *TINY, f"data.root={images}", "data.binarization=maybe", "trainer.steps=1"
        ),
        "threshold, static, dynamic",
    )
    assert_plain(
        command(
            "train", *TINY, f"data.root={images}", "model/negative_phase=magic", "trainer.steps=1"
        ),
        "magic",
    )
