"""Flows of the plane, every one on one of the toy sets, each of which several learn: there a density can be integrated."""

from collections.abc import Callable

import pytest
import torch
from conftest import fit
from test_models import glow, load_from_checkpoint

from flowgen.data.toy2d import SETS, Toy2D
from flowgen.models.flows.flow import Flow
from flowgen.models.flows.realnvp import RealNVP

PLANE = {"image_shape": (2, 1, 1), "bits": 8}
FLOWS: dict[str, Callable[[], Flow]] = {
    "glow": lambda: glow(**PLANE, width=32, steps_per_level=6),
    "glow spline": lambda: glow(**PLANE, width=32, steps_per_level=4, transform="spline"),
    "glow mixture": lambda: glow(**PLANE, width=32, steps_per_level=4, transform="mixture"),
    "realnvp": lambda: load_from_checkpoint("realnvp", **PLANE | {"width": 16}, num_blocks=1),
    "nice": lambda: load_from_checkpoint(
        "nice", **PLANE | {"width": 32}, num_layers=2, num_couplings=6
    ),
    "maf": lambda: load_from_checkpoint("maf", **PLANE | {"width": 32}),
    "tarflow": lambda: load_from_checkpoint(
        "tarflow", **PLANE | {"width": 32}, num_layers=[1, 1, 1, 1]
    ),
    "jet": lambda: load_from_checkpoint("jet", **PLANE | {"width": 16}, num_couplings=5),
    "planar": lambda: load_from_checkpoint("planar", **PLANE, num_transforms=16),
    "sylvester": lambda: load_from_checkpoint("sylvester", **PLANE),
    "iaf": lambda: load_from_checkpoint("iaf", **PLANE | {"width": 32}),
}
NAMES = list(SETS)
CELLS = 300  # a side of the grid
Trained = tuple[Flow, Toy2D, float]


@pytest.fixture(
    scope="module",
    params=[(flow, NAMES[(number + 1) % len(NAMES)]) for number, flow in enumerate(FLOWS)],
    ids=" on ".join,
)
def trained(request: pytest.FixtureRequest) -> Trained:
    """A flow that has learnt a set a little, the set, and its figure before that."""
    torch.manual_seed(0)
    flow, name = request.param
    model, data = FLOWS[flow](), Toy2D(name=name, count=5000, bits=8, random_flip=False)
    model.initialize(data.draw(0, 1000, 0)[0])
    start = model.eval().evaluate(data.batches("test", 1000))["bits_per_dim"].value
    fit(model, lambda step: data.draw(256 * step, 256, 0), steps=150, lr=3e-3)
    return model, data, start


@torch.no_grad()
def test_the_density_integrates_to_one(trained: Trained):
    """Over a square three times as wide as the data's; of Real NVP over all that its logit knows, a little more than the data's."""
    model = trained[0]
    alpha = model.bijection.bijections[0].alpha if isinstance(model, RealNVP) else 0.0
    low, width = (-alpha / (1 - 2 * alpha), 1 / (1 - 2 * alpha)) if alpha else (-1.0, 3.0)
    side = low + width * (torch.arange(CELLS) + 0.5) / CELLS
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).view(-1, 2, 1, 1)
    total = (
        sum(model.log_density(part).double().exp().sum().item() for part in grid.split(100_000))
        * (width / CELLS) ** 2
    )
    assert abs(total - 1) < 0.01


@torch.no_grad()
def test_a_trained_flow_inverts_in_float32_and_its_samples_are_finite(trained: Trained):
    model, data, _ = trained
    x = (next(data.batches("test", 1000)) + 0.5) / 256
    z, log_det = model.bijection(x)
    again, back = model.bijection.inverse(z)
    assert (again - x).abs().max() < 1e-4 and (back + log_det).abs().max() < 1e-2
    assert torch.isfinite(model.bijection.inverse(torch.randn(10_000, 2))[0]).all()


def test_a_trained_flow_has_learnt_something(trained: Trained):
    model, data, start = trained
    assert model.evaluate(data.batches("test", 1000))["bits_per_dim"].value < start - 0.01


def test_what_a_flow_of_the_plane_is_not_drawn_by_is_refused(command, tmp_path):
    words = [
        "model=tarflow",
        "model.num_layers=[1]",
        "model.width=4",
        "data=toy",
        "trainer.steps=1",
        "trainer.minutes=null",
    ]
    status, _, error = command(
        "train",
        *words,
        "trainer.init_images=16",
        "trainer.eval_images=8",
        f"output_dir={tmp_path / 'run'}",
    )
    assert status == 0, error
    for how in (
        ["--jacobi"],
        ["--out", tmp_path / "points.zip"],
        ["--temperature", 0.5, "--temperature", 1],
    ):
        status, _, error = command("sample", "--run", tmp_path / "run", *how)
        assert (
            status == 1 and "two-dimensional flow is plotted" in error and len(error.splitlines()) == 1
        )
