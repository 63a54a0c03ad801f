"""The score of each image, of every model: its log-probability in nats, or what is known of it."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from enumeration import machine, states
from test_models import glow, random_images
from test_rbm_runs import TINY

import flowgen
from flowgen.commands.evaluate import OF_LOG_Z, merged
from flowgen.config.runs import find_checkpoint
from flowgen.models.base import EvalConfig
from flowgen.training.checkpoint import export_safetensors, read_portable_metadata, zoo, zoo_file
from flowgen.utils.metrics import LOG_PROBABILITY, UNNORMALIZED

Command = Callable[..., tuple[int, str, str]]


def test_the_scores_of_an_rbm_are_its_exact_log_probabilities_once_it_is_evaluated():
    rbm, images = machine(6, 4), states(6).view(-1, 1, 1, 6).to(torch.uint8)
    assert rbm.eval().score_metric == UNNORMALIZED and torch.equal(
        rbm.score(images), -rbm.free_energy(states(6))
    )
    rbm.load_eval_results(rbm.evaluate([images], eval_config=EvalConfig(cross_check=True)).row())
    assert rbm.score_metric == LOG_PROBABILITY and rbm.score(
        images
    ).exp().sum().item() == pytest.approx(1, abs=1e-10)
    assert rbm.train().score_metric == UNNORMALIZED, "training changes log Z"


def test_log_z_that_may_not_be_quoted_is_not_taken():
    rbm = machine(6, 4)
    for figures in ({}, {"log_z": 3.0}, {"log_z": 3.0, "reliable": False}, {"reliable": True}):
        rbm.load_eval_results(figures)
        assert rbm.log_z is None


def test_the_scores_of_a_flow_are_what_evaluation_sums_up():
    model, images = glow(), random_images(5, 10)
    model.initialize(images)
    score = model.score(
        images, num_importance_samples=3, generator=torch.Generator().manual_seed(0)
    )
    assert score.shape == (10,) and model.score_metric == LOG_PROBABILITY
    bits = model.evaluate([images], eval_config=EvalConfig(num_importance_samples=3))[
        "bits_per_dim"
    ].value
    assert -score.mean().item() / (192 * math.log(2)) == pytest.approx(bits, rel=1e-5)


def test_log_z_is_kept_with_the_weights_that_were_evaluated(
    images: Path, tmp_path: Path, command: Command
):
    run = tmp_path / "rbm"
    assert (
        command("train", *TINY, f"data.root={images}", "trainer.steps=4", f"output_dir={run}")[0]
        == 0
    )
    assert flowgen.load(run).score_metric == UNNORMALIZED
    assert command("evaluate", "--run", run, "data.binarization=threshold")[0] == 0
    assert set(find_checkpoint(str(run))[1]["metrics"]) == set(OF_LOG_Z), (
        "other images have the same log Z"
    )
    figures = json.loads(command("evaluate", "--run", run, "--json")[1])
    model, pixels = (
        flowgen.load(run),
        states(8)[:, None].repeat(1, 8, 1).view(-1, 1, 8, 8).to(torch.uint8),
    )
    assert model.score_metric == LOG_PROBABILITY
    assert torch.allclose(
        model.score(pixels), -model.free_energy(model.units(pixels)) - figures["log_z"]
    )
    command("evaluate", "--run", run, "--json", "cross_check=false")
    assert flowgen.load(run).score_metric == LOG_PROBABILITY, "a short look takes nothing away"
    assert find_checkpoint(str(run))[1]["metrics"] == figures

    export_safetensors(
        find_checkpoint(str(run))[1], figures, "flowgen train", tmp_path / "rbm.safetensors"
    )
    assert flowgen.load(tmp_path / "rbm.safetensors").log_z == figures["log_z"]

    assert command("resume", run, "trainer.steps=6")[0] == 0
    assert flowgen.load(run).score_metric == UNNORMALIZED, "other weights"
    (run / "evaluation.json").write_text("{")
    assert flowgen.load(run).score_metric == UNNORMALIZED


def test_of_two_evaluations_the_surer_log_z_is_kept_and_figures_of_the_runs_own_images():
    def found(name: str, error: float, reliable: bool = True) -> dict[str, object]:
        return {
            "log_likelihood": name,
            "images": 9,
            "log_z": name,
            "log_z_error": error,
            "reliable": reliable,
            "verdict": name,
        }

    fine, coarse = found("fine", 0.1), found("coarse", 0.5)
    of_fine = {key: fine[key] for key in OF_LOG_Z}
    assert (
        merged({}, coarse, own=True)
        == merged(coarse | {"log_likelihood": 3}, coarse, own=True)
        == coarse
    )
    assert (
        merged(coarse, fine, own=True)
        == merged(fine, coarse, own=True)
        == merged(fine, coarse, own=False)
        == fine
    )
    assert (
        merged({}, fine, own=False) == of_fine
        and merged(coarse, fine, own=False) == coarse | of_fine
    )
    assert merged(of_fine, coarse, own=True) == coarse | of_fine
    doubtful = found("doubtful", 0.01, reliable=False)
    assert merged(fine, doubtful, own=True) == fine and merged({}, doubtful, own=True) == doubtful
    flow, again = {"bits_per_dim": 2.0, "images": 9}, {"bits_per_dim": 1.0, "images": 9, "draws": 8}
    assert (
        merged(flow, again, own=True) == again
        and merged(flow, again, own=False) == flow
        and merged({}, again, own=False) == {}
    )


@pytest.mark.skipif("zoo/rbm_mnist" not in zoo(), reason="not in the zoo")
def test_the_zoos_rbm_brings_its_log_z():
    assert (
        flowgen.load("zoo/rbm_mnist").log_z
        == read_portable_metadata(zoo_file("zoo/rbm_mnist"))["metrics"]["log_z"]
    )
