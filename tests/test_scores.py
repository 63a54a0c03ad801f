"""Scores of images: log-probabilities in nats, or unnormalized ones without a known log Z."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from enumeration import all_states, small_rbm
from test_models import glow, random_images
from test_rbm_runs import TINY

import flowgen
from flowgen.api import merge_evaluations
from flowgen.config.runs import find_checkpoint
from flowgen.models.base import EvalConfig
from flowgen.training.checkpoint import export_safetensors, read_safetensors, zoo_file
from flowgen.utils.metrics import LOG_PROBABILITY, UNNORMALIZED

Command = Callable[..., tuple[int, str, str]]


def test_the_scores_of_an_evaluated_rbm_are_exact_log_probabilities():
    rbm = small_rbm(6, 4).eval()
    images = all_states(6).view(-1, 1, 1, 6).to(torch.uint8)
    assert rbm.score_metric == UNNORMALIZED
    assert torch.equal(rbm.score(images), -rbm.free_energy(all_states(6)))
    metrics = rbm.evaluate([images], eval_config=EvalConfig(cross_check=True))
    rbm.load_eval_results(metrics.row())
    assert rbm.score_metric == LOG_PROBABILITY
    assert rbm.score(images).exp().sum().item() == pytest.approx(1, abs=1e-10)
    assert rbm.train().score_metric == UNNORMALIZED, "training changes log Z"


def test_an_unreliable_log_z_is_not_used():
    rbm = small_rbm(6, 4)
    for metrics in ({}, {"log_z": 3.0}, {"log_z": 3.0, "reliable": False}, {"reliable": True}):
        rbm.load_eval_results(metrics)
        assert rbm.log_z is None


def test_the_mean_score_of_a_flow_is_its_evaluation():
    model, images = glow(), random_images(5, 10)
    model.initialize(images)
    generator = torch.Generator().manual_seed(0)
    score = model.score(images, num_importance_samples=3, generator=generator)
    assert score.shape == (10,)
    assert model.score_metric == LOG_PROBABILITY
    config = EvalConfig(num_importance_samples=3)
    bits = model.evaluate([images], eval_config=config)["bits_per_dim"].value
    assert -score.mean().item() / (192 * math.log(2)) == pytest.approx(bits, rel=1e-5)


def test_log_z_is_stored_with_the_evaluated_weights(images: Path, tmp_path: Path, command: Command):
    run = tmp_path / "rbm"
    overrides = (*TINY, f"data.root={images}", "trainer.steps=4", f"output_dir={run}")
    assert command("train", *overrides)[0] == 0
    assert flowgen.load(run).score_metric == UNNORMALIZED
    assert command("evaluate", "--run", run, "data.binarization=threshold")[0] == 0
    assert flowgen.load(run).score_metric == UNNORMALIZED, "an evaluation of other images"
    metrics = json.loads(command("evaluate", "--run", run, "--json")[1])
    model = flowgen.load(run)
    pixels = all_states(8)[:, None].repeat(1, 8, 1).view(-1, 1, 8, 8).to(torch.uint8)
    assert model.score_metric == LOG_PROBABILITY
    expected = -model.free_energy(model.to_visible(pixels)) - metrics["log_z"]
    assert torch.allclose(model.score(pixels), expected)
    command("evaluate", "--run", run, "--json", "cross_check=false")
    assert flowgen.load(run).score_metric == LOG_PROBABILITY, "a quick evaluation removes nothing"
    checkpoint = find_checkpoint(str(run))[1]
    assert checkpoint["metrics"] == metrics

    file = tmp_path / "rbm.safetensors"
    export_safetensors(checkpoint, metrics, "flowgen train", file)
    assert flowgen.load(file).log_z == metrics["log_z"]

    assert command("resume", run, "trainer.steps=6")[0] == 0
    assert flowgen.load(run).score_metric == UNNORMALIZED, "the weights have changed"
    (run / "evaluation.json").write_text("{")
    assert flowgen.load(run).score_metric == UNNORMALIZED


def test_merged_evaluations_keep_the_most_accurate_log_z():
    def evaluation(name: str, error: float, reliable: bool = True) -> dict[str, object]:
        return {
            "log_likelihood": name,
            "images": 9,
            "log_z": name,
            "log_z_error": error,
            "reliable": reliable,
            "verdict": name,
        }

    fine, coarse = evaluation("fine", 0.1), evaluation("coarse", 0.5)
    assert merge_evaluations({}, coarse) == coarse
    assert merge_evaluations(coarse | {"log_likelihood": 3}, coarse) == coarse
    assert merge_evaluations(coarse, fine) == fine
    assert merge_evaluations(fine, coarse) == fine
    unreliable = evaluation("unreliable", 0.01, reliable=False)
    assert merge_evaluations(fine, unreliable) == fine
    assert merge_evaluations({}, unreliable) == unreliable
    flow = {"bits_per_dim": 2.0, "images": 9}
    again = {"bits_per_dim": 1.0, "images": 9, "bits": 8}
    assert merge_evaluations(flow, again) == again


def test_the_rbm_of_the_zoo_has_a_log_z():
    metadata = read_safetensors(zoo_file("zoo/rbm_mnist"), with_weights=False)
    assert flowgen.load("zoo/rbm_mnist").log_z == metadata["metrics"]["log_z"]


def test_a_later_evaluation_without_samples_keeps_the_sample_quality():
    plain = {"bits_per_dim": 1.0, "images": 9}
    sampled = {"sample_count": 100, "sample_coverage": 0.5, "training_coverage": 0.9}
    again = {"sample_count": 200, "sample_coverage": 0.6, "test_readable": 0.9}
    assert merge_evaluations(plain | sampled, plain) == plain | sampled
    assert merge_evaluations(plain | sampled, plain | again) == plain | again
    log_z = {"log_z": 1.0, "log_z_error": 0.1, "reliable": True, "verdict": "reliable"}
    quick = {"images": 9, "log_z": 2.0, "log_z_error": 0.5} | sampled
    merged = merge_evaluations(plain | log_z, quick)
    assert merged == plain | log_z | sampled, "an evaluation with a less certain log Z"
