"""RBMs on the command line: train, resume, sample, evaluate and complete."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL, save_image, save_images, trained
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
    root = save_images(folder / "images")
    overrides = [*TINY, f"data.root={root}", "trainer.steps=20"]
    return trained(folder, rbm=overrides) / "rbm"


@pytest.fixture
def rbm_run(twenty_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(twenty_steps, tmp_path / "rbm"))


def test_a_run_contains_its_metrics_and_a_picture_of_its_filters(rbm_run):
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
    assert Image.open(rbm_run / "features.png").width > 100
    assert (rbm_run / "samples" / "step_00000020.png").exists()


@pytest.mark.parametrize(
    ("phase", "binarization"),
    [
        ("cd", "static"),
        ("cd", "dynamic"),
        ("pcd", "dynamic"),
        ("tempering", "dynamic"),
        ("mean_field", "dynamic"),
    ],
)
def test_a_resumed_run_is_bit_identical(images, tmp_path, command, phase, binarization):
    """Chains, temperatures, offsets, momentum and random states are restored."""
    overrides = [
        *TINY,
        f"data.root={images}",
        f"model/negative_phase={phase}",
        f"data.binarization={binarization}",
        "trainer.warmdown_ratio=0",
    ]
    for name, steps in (("whole", 110), ("stopped", 56)):
        output = f"output_dir={tmp_path / name}"
        assert command("train", *overrides, f"trainer.steps={steps}", output)[0] == 0
    # Remove the evaluation at the end of the shorter run, which the longer run did not do there.
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    train_lines = [line for line in lines if json.loads(line)["split"] == "train"]
    metrics.write_text("\n".join(train_lines) + "\n")
    last = tmp_path / "stopped" / "checkpoints" / "last.pt"
    state = read_checkpoint(last)
    state["progress"]["best"] = float("inf")
    torch.save(state, last)
    assert command("resume", tmp_path / "stopped", "trainer.steps=110")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_load_returns_an_rbm(rbm_run):
    rbm = flowgen.load(rbm_run)
    assert isinstance(rbm, RBM)
    assert rbm.weight.shape == (64, 6)
    assert rbm.visible_bias.shape == (64,)
    assert rbm.hidden_bias.shape == (6,)


def test_evaluate_is_exact_for_small_models_and_names_the_binarization(rbm_run, command):
    status, out, error = command("evaluate", "--run", rbm_run, "--json")
    assert status == 0, error
    metrics = json.loads(out)
    assert metrics["reliable"] is True
    assert "exact" in metrics["verdict"]
    assert metrics["binarization"] == "dynamic"
    assert metrics["log_likelihood"] < 0
    assert metrics["log_likelihood_error"] > 0
    assert "log_likelihood" in command("evaluate", "--run", rbm_run)[1]


def test_evaluate_prints_all_estimates_of_log_z(images, tmp_path, command):
    run = tmp_path / "run"
    overrides = [
        *TINY,
        "model.hidden=24",
        f"data.root={images}",
        "trainer.steps=4",
        f"output_dir={run}",
    ]
    assert command("train", *overrides)[0] == 0
    settings = ("ais_steps=50", "evaluation.ais_chains=20")
    metrics = json.loads(command("evaluate", "--run", run, "--json", *settings)[1])
    for name in ("forward", "reverse", "bridge"):
        assert metrics[f"log_z_{name}_error"] > 0
        assert metrics[f"effective_sample_size_{name}"] > 1
        assert metrics[f"log_likelihood_{name}"] < 0
    assert isinstance(metrics["reliable"], bool)
    settings = ("ais_steps=50", "cross_check=false")
    quick = json.loads(command("evaluate", "--run", run, "--json", *settings)[1])
    assert quick["log_z_error"] > 0
    assert "reliable" not in quick


def test_settings_of_the_evaluation_are_not_settings_of_the_model(rbm_run, images, command):
    message = "there is no setting model.ais_steps, did you mean evaluation.ais_steps?"
    overrides = [*TINY, f"data.root={images}", "trainer.steps=1"]
    assert_one_line_error(command("evaluate", "--run", rbm_run, "model.ais_steps=50"), message)
    assert_one_line_error(command("train", *overrides, "model.ais_steps=50"), message)
    message = "ais_steps must be a whole number of at least 1"
    assert_one_line_error(command("evaluate", "--run", rbm_run, "ais_steps=0"), message)


@pytest.mark.parametrize("sampler", ["gibbs", "tempering", "mean-field"])
def test_sample_and_chain_with_every_sampler(rbm_run, command, sampler):
    options = ("--run", rbm_run, "--sampler", sampler)
    status, out, error = command("sample", *options, "--count", 5, "--steps", 3, "--temperature", 1)
    assert status == 0, error
    assert Image.open(out.strip()).width > 200
    status, out, error = command("chain", *options, "--frames", 6, "--count", 9)
    assert status == 0, error
    frames = [frame.copy() for frame in ImageSequence.Iterator(Image.open(out.strip()))]
    assert len(frames) > 1
    assert frames[0].width == frames[0].height


@pytest.mark.parametrize("known", ["left", "right", "top", "bottom", "border", "random:40", "mask"])
def test_complete_shows_one_row_per_sampler(rbm_run, images, command, tmp_path, known):
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 3, 5))
    mask.save(tmp_path / "mask.png")
    known = str(tmp_path / "mask.png") if known == "mask" else known
    arguments = (images / "000.png", "--known", known, "--run", rbm_run, "--steps", 20)
    status, out, error = command("complete", *arguments)
    assert status == 0, error
    picture = Image.open(out.strip())
    assert picture.height > 3 * 56  # a row for each of the three samplers
    single = command("complete", *arguments, "--sampler", "gibbs")
    assert Image.open(single[1].strip()).height < picture.height / 2


def test_complete_prints_the_conditional_log_probability(rbm_run, tiny_run, images, command):
    words = ["complete", images / "000.png", "--log-prob", "--known"]
    status, output, _ = command(*words, "top", "--run", rbm_run)
    first, unknown, method = output.splitlines()
    assert status == 0 and re.fullmatch(
        r"log P\(unknown \| known\) -\d+\.\d{3} ± 0\.000 nats, exact", first
    )
    assert unknown == "unknown numbers 32 of 64" and method == "method enumeration of one layer"
    status, _, error = command(*words, "downsample:2", "--run", tiny_run)
    assert status == 1 and "--log-prob needs known pixels" in error
    status, _, error = command(*words, "top", "--run", rbm_run, "--sampler", "gibbs")
    assert status == 2 and "leave out --sampler" in error


def test_commands_use_the_most_recent_compatible_run(elsewhere, images, command):
    root = f"data.root={images}"
    rbm = (*TINY, root, "trainer.steps=2", "output_dir=outputs/rbm")
    glow = (*SMALL, root, "trainer.steps=1", "output_dir=outputs/glow")
    assert command("train", *rbm)[0] == 0
    assert command("train", *glow)[0] == 0
    assert "outputs/rbm" in command("chain", "--frames", 2, "--count", 4)[1]
    assert "outputs/glow" in command("sample", "--count", 2)[1]
    options = ("--count", 2, "--sampler", "gibbs", "--steps", 2)
    assert "outputs/rbm" in command("sample", *options)[1]


def assert_one_line_error(
    outcome: tuple[int, str, str], message: str, expected_status: int = 1
) -> None:
    status, _, error = outcome
    assert status == expected_status, outcome
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_complete_explains_bad_input_in_one_line(rbm_run, tiny_run, images, tmp_path, command):
    wrong_size = save_image(tmp_path / "wrong.png", (16, 16, 3))
    for name, value in (("all", 255), ("none", 0)):
        Image.new("L", (8, 8), value).save(tmp_path / f"{name}.png")
    image = images / "000.png"
    complete = ("complete", image, "--run", rbm_run, "--known")
    assert_one_line_error(command(*complete, tmp_path / "all.png"), "every pixel")
    assert_one_line_error(command(*complete, tmp_path / "none.png"), "no pixel")
    assert_one_line_error(command(*complete, wrong_size), "16x16 pixels")
    assert_one_line_error(
        command(*complete, "middle"),
        "--known must be left, right, top, bottom, border, random:PERCENT, grayscale",
    )
    for percent in ("0", "100", "half"):
        assert_one_line_error(command(*complete, f"random:{percent}"), "random:PERCENT")
    assert_one_line_error(command(*complete, tmp_path / "missing.png"), "does not exist")
    assert_one_line_error(
        command(*complete, "left", "--sampler", "magic"),
        "must be one of gibbs, tempering, mean-field, not 'magic'",
    )
    flow = ("complete", image, "--known", "left", "--run", tiny_run)
    assert_one_line_error(command(*flow, "--sampler", "gibbs"), "must be hmc")


def test_chain_and_sample_explain_bad_input_in_one_line(rbm_run, tiny_run, command):
    for arguments in (("chain",), ("sample", "--sampler", "gibbs")):
        outcome = command(*arguments, "--run", tiny_run)
        assert_one_line_error(outcome, "run of a model that samples with Markov chains")
    chain = ("chain", "--run", rbm_run)
    assert_one_line_error(command(*chain, "--out", "film.png"), ".gif", 2)
    assert_one_line_error(command(*chain, "--sampler", "magic"), "magic", 2)
    assert_one_line_error(command(*chain, "--frames", 10**9), "--frames=1000000000 needs")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.bits=8", "set data.bits=1"),
        ("model.negative_phase=cd", "write it with a slash, as in model/negative_phase=NAME"),
        ("data.binarization=maybe", "threshold, static, dynamic"),
        ("model/negative_phase=magic", "magic"),
    ],
)
def test_train_explains_bad_settings_in_one_line(images, command, override, message):
    overrides = (*TINY, f"data.root={images}", "trainer.steps=1")
    assert_one_line_error(command("train", *overrides, override), message)


def test_evaluate_explains_bad_syntax_in_one_line(rbm_run, command):
    outcome = command("evaluate", "--run", rbm_run, "model.hidden=[8")
    assert_one_line_error(outcome, "cannot be parsed")
