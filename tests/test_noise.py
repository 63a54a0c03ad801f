"""Flows of images with noise: what is taken away from samples, and that no figure passes for a likelihood of images."""

import json
import math

import pytest
import torch
from conftest import SMALL
from test_models import load_from_checkpoint, noise

from flowgen.models.base import EvalConfig, SupportsInpainting
from flowgen.models.flows.flow import denoised
from flowgen.models.flows.tarflow import TarFlow
from flowgen.training.checkpoint import read_checkpoint
from flowgen.utils.errors import UserError
from flowgen.utils.metrics import BITS_PER_DIM, NOISY_BITS_PER_DIM

NOISY = {"dequantisation": "gaussian:0.05", "gaussianize": False}


def noisy(**changes: object) -> TarFlow:
    model = load_from_checkpoint(
        "tarflow", **NOISY | {"num_layers": [1, 1], "transform": "affine", "local": False} | changes
    )
    model.initialize(torch.randint(32, (64, *model.image_shape), dtype=torch.uint8))
    return model.eval()


def test_of_a_gaussian_tweedie_gives_the_mean_of_what_was_there_before_the_noise():
    """x ~ N(m, v), y = x + s e: E[x | y] = (v y + s^2 m) / (v + s^2)."""
    mean, variance, deviation, y = 0.3, 0.04, 0.1, torch.rand(5, 3, dtype=torch.float64)
    density = torch.distributions.Normal(mean, math.sqrt(variance + deviation**2))
    found = denoised(y, deviation, lambda y: density.log_prob(y).sum(1))
    assert torch.allclose(
        found, (variance * y + deviation**2 * mean) / (variance + deviation**2), atol=1e-12
    )


def test_noise_has_its_deviation_about_the_middles_of_the_levels():
    images = noise(5, 300)
    x, _ = noisy()._dequantize(images, torch.Generator().manual_seed(0))
    rest = x - (images + 0.5) / 32
    assert abs(rest.mean()) < 1e-3 and abs(rest.std() - 0.05) < 1e-3


@pytest.mark.parametrize("classes", [None, 3])
def test_samples_are_denoised_where_the_inverse_leads(classes):
    model = noisy(num_classes=classes)
    images, _ = model.sample(6, generator=torch.Generator().manual_seed(1))
    model.dequantizer.deviation = 0.0
    before, _ = model.sample(6, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(images, before)
    labels = None if classes is None else torch.arange(6) % 3
    z = torch.randn(6, 192, generator=torch.Generator().manual_seed(1))
    one_hot = model._one_hot(labels)
    x, _ = model.bijection.inverse(z if labels is None else z + one_hot @ model.means, one_hot)
    assert torch.equal(
        images, model._quantize(denoised(x, 0.05, lambda y: model.log_density(y, labels)))
    )


def test_points_of_the_plane_are_denoised_too():
    model, z = noisy(image_shape=(2, 1, 1)), torch.randn(9, 2)
    with torch.no_grad():
        x, _ = model.bijection.inverse(z)
    assert torch.equal(
        model.points(z), denoised(x, 0.05, model.log_density)
    ) and not torch.allclose(model.points(z), x, atol=1e-4)


def test_its_figure_is_one_of_images_with_noise_and_it_knows_no_other():
    model, images = noisy(), noise(5, 8)
    found = model.evaluate([images], how=EvalConfig(draws=2))
    assert (
        list(found.measured) == ["noisy_bits_per_dim"]
        and model.metric == model.loss_metric == NOISY_BITS_PER_DIM
    )
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        each = torch.stack([model.log_prob(images, generator) for _ in range(2)]).mean()
    assert abs(found["noisy_bits_per_dim"].value + each.item() / (192 * math.log(2))) < 1e-4
    for judged in (model.score, model.statistics):
        with pytest.raises(UserError, match="knows no likelihood of images"):
            judged(images)
    assert not TarFlow.supports(SupportsInpainting, NOISY) and TarFlow.supports(
        SupportsInpainting, {"dequantisation": "uniform"}
    )
    assert load_from_checkpoint("tarflow", num_layers=[1]).metric == BITS_PER_DIM


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("tarflow", {"gaussianize": True}, "needs model.gaussianize=false"),
        ("realnvp", {"dequantisation": "gaussian:0.05"}, "another model than realnvp"),
        *[
            ("tarflow", {"dequantisation": f"gaussian{end}"}, "one of uniform, variational")
            for end in ("", ":", ":0", ":-1", ":nan", ":a")
        ],
    ],
)
def test_arguments_are_checked(name, changes, words):
    with pytest.raises(UserError, match=words):
        load_from_checkpoint(name, **(NOISY if name == "tarflow" else {}) | changes)


def test_commands_print_no_likelihood_of_images(command, images, tmp_path):
    words = [word for word in SMALL if "steps_per_level" not in word]
    words = [
        "experiment=noise",
        "model.num_layers=[1]",
        *words,
        f"data.root={images}",
        "trainer.steps=2",
    ]
    status, _, error = command("train", *words, f"output_dir={tmp_path / 'run'}")
    assert status == 0, error
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert "noisy_bits_per_dim" in rows[-1] and not any("bits_per_dim" in row for row in rows)
    status, said, _ = command("evaluate", "--run", tmp_path / "run", "--json")
    assert (
        status == 0
        and "noisy_bits_per_dim" in json.loads(said)
        and "bits_per_dim" not in json.loads(said)
    )
    status, _, error = command("score", images / "000.png", "--run", tmp_path / "run")
    assert status == 1 and "knows no likelihood of images" in error and len(error.splitlines()) == 1


def test_a_run_that_goes_on_with_other_noise_forgets_its_best_figure(command, images, tmp_path):
    words = [
        "model=tarflow",
        "model.num_layers=[1]",
        *[word for word in SMALL if "steps_per_level" not in word],
        f"data.root={images}",
    ]
    run = tmp_path / "run"
    assert (
        command("train", *words, "model.gaussianize=false", "trainer.steps=2", f"output_dir={run}")[
            0
        ]
        == 0
    )
    assert command("resume", run, "trainer.steps=4", "model.dequantization=gaussian:0.5")[0] == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    noisy = [
        row["noisy_bits_per_dim"]
        for row in rows
        if row["split"] == "validation" and "noisy_bits_per_dim" in row
    ]
    plain = [
        row["bits_per_dim"]
        for row in rows
        if row["split"] == "validation" and "bits_per_dim" in row
    ]
    assert min(plain) < min(noisy)
    assert read_checkpoint(run / "checkpoints" / "last.pt")["progress"]["best"] == min(noisy)
