"""Flows of two-dimensional data, whose density can be integrated numerically.

Each flow learns one of the toy distributions.
"""

from collections.abc import Callable

import pytest
import torch
from conftest import fit
from test_models import build_model, glow

from flowgen.data.toy2d import DISTRIBUTIONS, Toy2D
from flowgen.models.flows.flow import Flow
from flowgen.models.flows.realnvp import RealNVP

PLANE = {"image_shape": (2, 1, 1), "bits": 8}
FLOWS: dict[str, Callable[[], Flow]] = {
    "glow": lambda: glow(**PLANE, width=32, steps_per_level=6),
    "glow spline": lambda: glow(**PLANE, width=32, steps_per_level=4, transform="spline"),
    "glow mixture": lambda: glow(**PLANE, width=32, steps_per_level=4, transform="mixture"),
    "realnvp": lambda: build_model("realnvp", **PLANE, width=16, num_blocks=1),
    "nice": lambda: build_model("nice", **PLANE, width=32, num_layers=2, num_couplings=6),
    "maf": lambda: build_model("maf", **PLANE, width=32),
    "tarflow": lambda: build_model("tarflow", **PLANE, width=32, num_layers=[1, 1, 1, 1]),
    "jet": lambda: build_model("jet", **PLANE, width=16, num_couplings=5),
    "planar": lambda: build_model("planar", **PLANE, num_transforms=16),
    "sylvester": lambda: build_model("sylvester", **PLANE),
    "iaf": lambda: build_model("iaf", **PLANE, width=32),
}
DISTRIBUTION_NAMES = list(DISTRIBUTIONS)
GRID_SIZE = 300  # cells per side
Trained = tuple[Flow, Toy2D, float]


@pytest.fixture(
    scope="module",
    params=[
        (flow, DISTRIBUTION_NAMES[(index + 1) % len(DISTRIBUTION_NAMES)])
        for index, flow in enumerate(FLOWS)
    ],
    ids=" on ".join,
)
def trained(request: pytest.FixtureRequest) -> Trained:
    """A flow after a short training, its data, and its bits/dim before the training."""
    torch.manual_seed(0)
    flow, name = request.param
    model = FLOWS[flow]()
    data = Toy2D(name=name, num_points=5000, bits=8, random_flip=False)
    model.initialize(data.train_batch(0, 1000, 0)[0])
    initial = model.eval().evaluate(data.batches("test", 1000))["bits_per_dim"].value
    fit(model, lambda step: data.train_batch(256 * step, 256, 0), steps=150, lr=3e-3)
    return model, data, initial


@torch.no_grad()
def test_the_density_integrates_to_one(trained: Trained):
    """The grid is three times as wide as the data; for Real NVP it is the domain of its logit."""
    model = trained[0]
    if isinstance(model, RealNVP):
        alpha = model.bijection.bijections[0].alpha
        low = -alpha / (1 - 2 * alpha)
        width = 1 / (1 - 2 * alpha)
    else:
        low = -1.0
        width = 3.0
    centers = low + width * (torch.arange(GRID_SIZE) + 0.5) / GRID_SIZE
    grid = torch.stack(torch.meshgrid(centers, centers, indexing="xy"), -1).view(-1, 2, 1, 1)
    density = [model.log_density(points).double().exp() for points in grid.split(100_000)]
    integral = torch.cat(density).sum().item() * (width / GRID_SIZE) ** 2
    assert abs(integral - 1) < 0.01


@torch.no_grad()
def test_a_trained_flow_inverts_in_float32_and_its_samples_are_finite(trained: Trained):
    model, data, _ = trained
    x = (next(data.batches("test", 1000)) + 0.5) / 256
    z, log_det = model.bijection(x)
    again, inverse_log_det = model.bijection.inverse(z)
    assert (again - x).abs().max() < 1e-4 and (inverse_log_det + log_det).abs().max() < 1e-2
    assert torch.isfinite(model.bijection.inverse(torch.randn(10_000, 2))[0]).all()


def test_training_improves_the_likelihood(trained: Trained):
    model, data, initial = trained
    assert model.evaluate(data.batches("test", 1000))["bits_per_dim"].value < initial - 0.01


def test_options_that_do_not_apply_to_two_dimensional_flows_are_rejected(command, tmp_path):
    overrides = [
        "model=tarflow",
        "model.num_layers=[1]",
        "model.width=4",
        "data=toy",
        "trainer.steps=1",
        "trainer.minutes=null",
        "trainer.init_images=16",
        "trainer.eval_images=8",
    ]
    status, _, error = command("train", *overrides, f"output_dir={tmp_path / 'run'}")
    assert status == 0, error
    for options in (
        ["--jacobi"],
        ["--out", tmp_path / "points.zip"],
        ["--temperature", 0.5, "--temperature", 1],
    ):
        status, _, error = command("sample", "--run", tmp_path / "run", *options)
        assert status == 1 and "points of the plane are plotted" in error
        assert len(error.splitlines()) == 1
