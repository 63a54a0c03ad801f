"""Reverse KL: the densities, the loss, and the log Z and effective sample size of the weights."""

import json
import math

import pytest
import torch
from conftest import fit

import flowgen
from flowgen.bijections.reshape import Flatten
from flowgen.data.energy2d import Energy2D
from flowgen.models import ReverseKL
from flowgen.utils import energies
from flowgen.utils.energies import ENERGIES, density_grid, quadrature_log_z
from flowgen.utils.errors import UserError

MIXTURE_LOG_Z = math.log(2 * math.pi * energies.MIXTURE_STD**2)
IMAGES = torch.zeros(256, 2, 1, 1, dtype=torch.uint8)  # only their number counts
FLOWS = {
    "planar": {"flow": "planar", "num_transforms": 8},
    "sylvester": {"flow": "sylvester", "num_transforms": 6},
    "affine coupling": {"num_transforms": 4, "width": 16, "transform": "affine"},
    "spline coupling": {"num_transforms": 4, "width": 16},
}


def reverse_kl_flow(name: str, density: str = "mixture", **changes: object) -> ReverseKL:
    torch.manual_seed(0)
    return ReverseKL(density=density, **FLOWS[name] | changes)


def points(name: str = "mixture") -> Energy2D:
    return Energy2D(name=name, num_points=2000)


def test_energies_of_the_paper_at_some_points():
    """Table 1 of 1505.05770, computed by hand."""
    x = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    bump = math.exp(-0.5 * (4 / 0.6) ** 2)
    assert ENERGIES["u1"](x)[0].item() == pytest.approx(-math.log(1 + bump), abs=1e-6)
    assert ENERGIES["u2"](x).tolist() == pytest.approx([0, 0], abs=1e-6)  # sin(pi x / 2)
    second = math.exp(-0.5 * (3 / 0.35) ** 2)
    assert ENERGIES["u3"](x)[1].item() == pytest.approx(-math.log(1 + second), abs=1e-6)
    second = math.exp(-0.5 * (1.5 / 0.35) ** 2)
    assert ENERGIES["u4"](x)[1].item() == pytest.approx(-math.log(1 + second), abs=1e-6)


def test_quadrature_agrees_with_known_integrals():
    assert quadrature_log_z("mixture") == pytest.approx(MIXTURE_LOG_Z, abs=1e-8)
    # The band of width 0.4 is inside of the square, so that Z = 8 * 0.4 sqrt(2 pi).
    assert quadrature_log_z("u2") == pytest.approx(math.log(3.2 * math.sqrt(2 * math.pi)), abs=1e-6)
    assert quadrature_log_z("ring") == pytest.approx(  # 2 pi times the integral of r exp(-U)
        math.log(2 * math.pi * 2 * 0.2 * math.sqrt(2 * math.pi)), abs=1e-6
    )


@pytest.mark.parametrize("name", ENERGIES)
def test_points_follow_the_density(name):
    """The frequencies of 8 x 8 large cells, by a chi-squared test."""
    data = Energy2D(name=name, num_points=20_000)
    expected = density_grid(name).unfold(0, 128, 128).unfold(1, 128, 128).sum((2, 3)).flatten()
    expected = 20_000 * expected / expected.sum()
    x, y = (data.test.images.flatten(1) // 32).long().T
    observed = torch.bincount(8 * y + x, minlength=64)
    often = expected > 5
    chi_squared = ((observed - expected).square() / expected)[often].sum().item()
    degrees = int(often.sum()) - 1
    assert abs(chi_squared - degrees) < 5 * math.sqrt(2 * degrees)
    rest = expected[~often].sum().item()
    assert abs(observed[~often].sum().item() - rest) < 5 * math.sqrt(rest) + 5


@pytest.mark.parametrize("name", FLOWS)
def test_a_new_flow_is_uniform_and_estimates_log_z(name):
    """Importance sampling from the uniform distribution; every density is smooth enough."""
    for density in ("u1", "mixture"):
        flow = reverse_kl_flow(name, density)
        x, _ = flow.importance_samples(20_000)
        assert x.abs().max() <= 4.001
        assert (torch.histc(x, 8, -4, 4) / 5000 - 1).abs().max() < 0.1
        metrics = flow.evaluate(points(density).batches("test", 2000, 100))
        assert metrics["bits_per_dim"].value == pytest.approx(8, abs=1e-4)
        log_z = metrics["log_z"]
        assert abs(log_z.value - quadrature_log_z(density)) < 4 * log_z.error < 0.2


@pytest.mark.parametrize("name", FLOWS)
def test_the_weights_of_samples_agree_with_the_density_of_the_flow(name):
    """The density by the other direction of the bijection, in float64."""
    flow = reverse_kl_flow(name).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        x, log_weights = flow.importance_samples(200)
        unit = ((x + 4) / 8).view(-1, 2, 1, 1)
        log_q = flow.log_density(unit) - math.log(64)
    expected = -ENERGIES["mixture"](x) - log_q
    assert torch.allclose(log_weights, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["planar", "spline coupling"])
def test_training_lowers_the_kl_divergence_and_log_z_is_right(name):
    flow = reverse_kl_flow(name)
    data = points()
    before = flow.evaluate(data.batches("test", 500, 500))
    fit(flow, lambda step: (IMAGES,), steps=300, lr=5e-3, decay=0.5)
    after = flow.evaluate(data.batches("test", 500, 500))
    assert after["reverse_kl"].value < 0.3 * before["reverse_kl"].value
    if name == "spline coupling":  # the others may miss a mode in so short a time
        log_z = after["log_z"]
        assert abs(log_z.value - MIXTURE_LOG_Z) < 3 * log_z.error
        assert after["relative_effective_sample_size"].value > 0.7
        assert after["reverse_kl"].value > -3 * after["reverse_kl"].error


def test_annealing_raises_the_inverse_temperature_in_training_only():
    flow = reverse_kl_flow("planar", anneal_samples=512).train()

    def loss_and_terms() -> tuple[float, float, float]:
        torch.manual_seed(0)
        loss = flow(IMAGES).item()
        torch.manual_seed(0)
        x, log_weights = flow.importance_samples(len(IMAGES))
        log_target = flow.log_target(x)
        return loss, (log_target - log_weights).mean().item(), log_target.mean().item()

    for beta in (0.01, 0.51, 1, 1):
        loss, log_q, log_target = loss_and_terms()
        assert loss == pytest.approx(log_q - beta * log_target, abs=1e-4)
    assert flow.samples_seen == 4 * 256
    flow.samples_seen.zero_()
    flow.eval()
    loss, log_q, log_target = loss_and_terms()
    assert loss == pytest.approx(log_q - log_target, abs=1e-4) and flow.samples_seen == 0


def test_a_flow_that_equals_its_target_has_equal_weights(monkeypatch):
    """The target is the density of the flow times exp(3)."""
    flow = reverse_kl_flow("spline coupling")
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)

    def log_target(x: torch.Tensor) -> torch.Tensor:
        unit = Flatten(2, 1, 1).inverse((x + 4) / 8)[0]
        return flow.log_density(unit) - math.log(64) + 3

    monkeypatch.setattr(flow, "log_target", log_target)
    metrics = flow.evaluate(points().batches("test", 100, 100))
    assert metrics["relative_effective_sample_size"].value == pytest.approx(1, abs=1e-4)
    assert metrics["log_z"].value == pytest.approx(3, abs=1e-3)


def test_other_data_is_refused():
    with pytest.raises(UserError, match="set data=energy"):
        ReverseKL(density="moons")
    with pytest.raises(UserError, match="set data=energy"):
        ReverseKL(image_shape=(1, 28, 28))


SMALL = [
    "model=reverse_kl",
    "model.num_transforms=2",
    "model.width=4",
    "trainer.steps=4",
    "trainer.minutes=null",
    "trainer.batch_size=8",
    "trainer.init_images=8",
    "trainer.eval_images=8",
]


def test_commands_train_evaluate_and_plot(command, tmp_path):
    energy = ["data=energy", "data.name=ring", "data.num_points=200"]
    run = tmp_path / "run"
    status, _, error = command("train", *SMALL, *energy, f"output_dir={run}")
    assert status == 0, error
    assert flowgen.load(run).density == "ring"
    status, output, error = command("evaluate", "--run", run, "--json")
    assert status == 0, error
    metrics = json.loads(output)
    assert metrics["quadrature_log_z"] == pytest.approx(quadrature_log_z("ring"))
    assert 0 < metrics["relative_effective_sample_size"] <= 1 and metrics["log_z_error"] > 0
    status, _, error = command("sample", "--run", run, "--count", 50)
    assert status == 0 and (run / "sample.png").is_file(), error
    status, _, error = command("resume", run, "trainer.steps=6")
    assert status == 0, error
    status, _, error = command("evaluate", "data.name=u2", "--run", run)
    assert status == 1 and "set data=energy data.name=ring" in error
    for data in ("toy", "mnist_sample"):
        status, _, error = command("train", *SMALL, f"data={data}", f"output_dir={tmp_path}/other")
        assert status == 1 and "set data=energy data.name=NAME" in error
        assert len(error.splitlines()) == 1
