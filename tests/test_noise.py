"""Flows of noisy images: their samples are denoised, and they report no likelihood of images."""

import json
import math

import pytest
import torch
from conftest import SMALL
from test_models import build_model, random_images

from flowgen.models.base import EvalConfig, SupportsInpainting
from flowgen.models.flows.dequantization import UniformDequantizer
from flowgen.models.flows.flow import denoise
from flowgen.models.flows.tarflow import TarFlow
from flowgen.training.checkpoint import read_checkpoint
from flowgen.utils.errors import UserError
from flowgen.utils.metrics import BITS_PER_DIM, NOISY_BITS_PER_DIM

NOISY = {"dequantization": "gaussian:0.05", "gaussianize": False}
SMALL_TARFLOW = ["model.num_layers=[1]", *[key for key in SMALL if "steps_per_level" not in key]]


def noisy_tarflow(**changes: object) -> TarFlow:
    arguments = NOISY | {"num_layers": [1, 1], "transform": "affine", "local": False}
    model = build_model("tarflow", **arguments | changes)
    model.initialize(torch.randint(32, (64, *model.image_shape), dtype=torch.uint8))
    return model.eval()


def read_rows(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_tweedies_formula_gives_the_posterior_mean_of_a_gaussian():
    """x ~ N(m, v), y = x + s e: E[x | y] = (v y + s^2 m) / (v + s^2)."""
    mean = 0.3
    variance = 0.04
    deviation = 0.1
    y = torch.rand(5, 3, dtype=torch.float64)
    density = torch.distributions.Normal(mean, math.sqrt(variance + deviation**2))
    x = denoise(y, deviation, lambda y: density.log_prob(y).sum(1))
    expected = (variance * y + deviation**2 * mean) / (variance + deviation**2)
    assert torch.allclose(x, expected, atol=1e-12)


def test_uniform_noise_never_rounds_to_the_next_pixel_value(monkeypatch):
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    largest = torch.full((1, 1, 16, 16), 1 - 2**-24)
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: largest)
    noise, _ = UniformDequantizer()(images, torch.float32, None)
    assert torch.equal(((images + noise) / 256 * 256).floor().to(torch.uint8), images)


def test_noise_is_centered_at_the_bins_and_has_the_right_deviation():
    images = random_images(5, 300)
    x, _ = noisy_tarflow()._dequantize(images, torch.Generator().manual_seed(0))
    noise = x - (images + 0.5) / 32
    assert abs(noise.mean()) < 1e-3 and abs(noise.std() - 0.05) < 1e-3


@pytest.mark.parametrize("num_classes", [None, 3])
def test_samples_are_denoised_after_the_inverse(num_classes):
    model = noisy_tarflow(num_classes=num_classes)
    images, log_prob = model.sample(6, generator=torch.Generator().manual_seed(1))
    assert log_prob is None
    model.dequantizer.std = 0.0
    noisy_images, _ = model.sample(6, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(images, noisy_images)
    labels = None if num_classes is None else torch.arange(6) % 3
    z = torch.randn(6, 192, generator=torch.Generator().manual_seed(1))
    one_hot = model.one_hot(labels)
    x, _ = model.bijection.inverse(z if labels is None else z + one_hot @ model.means, one_hot)
    expected = model._quantize(denoise(x, 0.05, lambda y: model.log_density(y, labels)))
    assert torch.equal(images, expected)


def test_continuous_samples_are_denoised():
    model = noisy_tarflow(image_shape=(2, 1, 1))
    z = torch.randn(9, 2)
    with torch.no_grad():
        x, _ = model.bijection.inverse(z)
    assert torch.equal(model.decode_continuous(z), denoise(x, 0.05, model.log_density))
    assert not torch.allclose(model.decode_continuous(z), x, atol=1e-4)


def test_noisy_flows_report_bits_per_dim_of_noisy_images_only():
    model = noisy_tarflow()
    images = random_images(5, 8)
    metrics = model.evaluate([images], eval_config=EvalConfig(num_importance_samples=2))
    assert list(metrics.measured) == ["noisy_bits_per_dim"]
    assert model.metric == model.loss_metric == NOISY_BITS_PER_DIM
    assert model.likelihood == "none"
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        log_prob = torch.stack([model.log_prob(images, generator) for _ in range(2)]).mean()
    bits_per_dim = -log_prob.item() / (192 * math.log(2))
    assert abs(metrics["noisy_bits_per_dim"].value - bits_per_dim) < 1e-4
    for method in (model.score, model.statistics):
        with pytest.raises(UserError, match="has no likelihood of images"):
            method(images)
    assert not TarFlow.supports(SupportsInpainting, NOISY)
    assert TarFlow.supports(SupportsInpainting, {"dequantization": "uniform"})
    plain = build_model("tarflow", num_layers=[1])
    assert plain.metric == BITS_PER_DIM and plain.likelihood == "bound"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tarflow", {"gaussianize": True}, "needs model.gaussianize=false"),
        ("realnvp", {"dequantization": "gaussian:0.05"}, "does not work with model=realnvp"),
        *[
            ("tarflow", {"dequantization": f"gaussian{end}"}, "one of uniform, variational")
            for end in ("", ":", ":0", ":-1", ":nan", ":a")
        ],
    ],
)
def test_invalid_arguments_are_rejected(name, changes, message):
    with pytest.raises(UserError, match=message):
        build_model(name, **(NOISY if name == "tarflow" else {}) | changes)


def test_commands_print_no_likelihood_of_images(command, images, tmp_path):
    run = tmp_path / "run"
    overrides = ["experiment=noise", *SMALL_TARFLOW, f"data.root={images}", "trainer.steps=2"]
    status, _, error = command("train", *overrides, f"output_dir={run}")
    assert status == 0, error
    rows = read_rows(run)
    assert "noisy_bits_per_dim" in rows[-1] and not any("bits_per_dim" in row for row in rows)
    status, output, _ = command("evaluate", "--run", run, "--json")
    assert status == 0
    assert "noisy_bits_per_dim" in json.loads(output) and "bits_per_dim" not in json.loads(output)
    status, _, error = command("score", images / "000.png", "--run", run)
    assert status == 1 and "has no likelihood of images" in error and len(error.splitlines()) == 1


def test_a_run_resumed_with_other_noise_forgets_its_best_metric(command, images, tmp_path):
    run = tmp_path / "run"
    overrides = ["model=tarflow", *SMALL_TARFLOW, f"data.root={images}", "trainer.steps=2"]
    status, _, error = command("train", *overrides, "model.gaussianize=false", f"output_dir={run}")
    assert status == 0, error
    assert command("resume", run, "trainer.steps=4", "model.dequantization=gaussian:0.5")[0] == 0
    rows = [row for row in read_rows(run) if row["split"] == "validation"]
    noisy = [row["noisy_bits_per_dim"] for row in rows if "noisy_bits_per_dim" in row]
    plain = [row["bits_per_dim"] for row in rows if "bits_per_dim" in row]
    assert min(plain) < min(noisy)
    assert read_checkpoint(run / "checkpoints" / "last.pt")["progress"]["best"] == min(noisy)
