"""Continuous flows: what the solver says against closed forms, what is estimated against what is exact."""

import math
import sys

import pytest
import torch
from conftest import SMALL, fit
from test_models import load_from_checkpoint

from flowgen.bijections import continuous
from flowgen.bijections.continuous import CNF
from flowgen.data.toy2d import Toy2D
from flowgen.models.base import SupportsInpainting
from flowgen.models.flows.flow import Flow
from flowgen.models.flows.flow_matching import FlowMatching
from flowgen.utils.errors import UserError


class Linear(torch.nn.Module):
    """dx/dt = A x."""

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix)

    def forward(self, x, t, condition=None):
        return x @ self.matrix.T


def small(**changes: object) -> FlowMatching:
    """Of images of one channel and 2x2 pixels, pushed off its start, in float64."""
    arguments = {
        "image_shape": (1, 2, 2),
        "num_layers": 1,
        "tolerance": 1e-9,
        "gaussianize": False,
    } | changes
    model = load_from_checkpoint("flow_matching", **arguments)
    model.initialize(torch.randint(32, (64, 1, 2, 2), dtype=torch.uint8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


def test_a_linear_velocity_is_followed_as_its_matrix_exponential_says():
    matrix = torch.randn(6, 6, dtype=torch.float64)
    flow, x = CNF(Linear(matrix), 1e-10, exact_trace_dims=6), torch.randn(5, 6, dtype=torch.float64)
    z, log_det = flow(x)
    assert torch.allclose(z, x @ torch.linalg.matrix_exp(-matrix).T, atol=1e-8)
    assert torch.allclose(log_det, -matrix.trace().expand(5), atol=1e-8)


def test_the_estimate_is_unbiased_and_the_same_for_the_same_image_in_any_company():
    matrix = torch.randn(6, 6, dtype=torch.float64)
    flow, x = CNF(Linear(matrix), 1e-6, exact_trace_dims=0), torch.randn(5000, 6, dtype=torch.float64)
    with torch.no_grad():
        log_det = flow(x)[1]
        again, other, alone = flow(x)[1], flow(x + 1)[1], flow(x[7:8])[1]
    assert (
        abs(log_det.mean() + matrix.trace()) < 4 * log_det.std() / math.sqrt(5000)
        and log_det.std() > 0.1
    )
    assert torch.equal(log_det, again) and not torch.equal(log_det, other)
    assert torch.allclose(alone, log_det[7], atol=1e-4)


def test_density_and_jacobian_are_those_of_autograd():
    model, condition = small(classes=3), torch.eye(3, dtype=torch.float64)[1:2]
    x = torch.rand(1, 1, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        z, log_det = model.bijection(x, condition)
        again, back = model.bijection.inverse(z, condition)
    assert (again - x).abs().max() < 1e-8 and abs(back + log_det) < 1e-8
    jacobian = torch.autograd.functional.jacobian(
        lambda x: model.bijection(x, condition)[0], x
    ).view(4, 4)
    assert abs(torch.linalg.slogdet(jacobian).logabsdet - log_det) < 1e-8


def test_samples_carry_their_density():
    model = small(tolerance=1e-7)
    z = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    _, carried = model.sample(4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        density = model.log_density(model.bijection.inverse(z)[0])
    assert torch.allclose(carried, density - 4 * math.log(32), atol=1e-4)


def test_the_solver_difference_falls_with_the_tolerance_and_leaves_it_as_it_was():
    model, images, found = small(), torch.randint(32, (10, 1, 2, 2), dtype=torch.uint8), []
    flow = model.bijection.bijections[-1]
    for tolerance in (1.0, 1e-3):
        flow.tolerance = tolerance
        found.append(model.evaluate([images])["solver_difference"].value)
        assert flow.tolerance == tolerance
    assert found[0] > 3 * found[1] > 0


def test_draws_of_an_estimate_are_averaged_as_logarithms():
    model, images = (
        small(exact=0, tolerance=0.1),
        torch.randint(32, (8, 1, 2, 2), dtype=torch.uint8),
    )
    with torch.no_grad():
        each = [
            model.log_prob(images, generator)
            for generator in [torch.Generator().manual_seed(0)]
            for _ in range(3)
        ]
        score = model.score(images, draws=3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(score, torch.stack(each).mean(0))


def test_training_learns_two_classes_and_draws_the_one_asked_for():
    model = load_from_checkpoint(
        "flow_matching",
        channels=1,
        size=2,
        num_classes=2,
        width=16,
        num_layers=1,
        gaussianize=False,
        tolerance=0.1,
    )

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(64) % 2
        return (4 + 20 * labels[:, None, None, None] + torch.randint(4, (64, 1, 2, 2))).to(
            torch.uint8
        ), labels

    model.initialize(*batch(0))
    fit(model, batch, steps=80, lr=1e-2)
    for label in (0, 1):
        images, _ = model.sample(32, generator=torch.Generator().manual_seed(0), label=label)
        assert (images.float().mean() - (5.5 + 20 * label)).abs() < 3
    assert (model.classify(batch(0)[0]).argmax(1) == batch(0)[1]).all()


@torch.no_grad()
def test_in_the_plane_it_learns_a_density_that_integrates_to_one_and_inverts():
    """Over a square three times as wide as the data's."""
    model = load_from_checkpoint(
        "flow_matching", image_shape=(2, 1, 1), bits=8, width=16, num_layers=1, tolerance=1e-3
    )
    data = Toy2D(name="moons", num_points=1000, bits=8, random_flip=False)
    model.initialize(data.train_batch(0, 1000, 0)[0])
    start = model.eval().evaluate(data.batches("test", 250, 250))["bits_per_dim"].value
    with torch.enable_grad():
        fit(model, lambda step: data.train_batch(256 * step, 256, 0), steps=100, lr=5e-3)
    assert model.evaluate(data.batches("test", 250, 250))["bits_per_dim"].value < start - 0.1
    side = -1 + 3 * (torch.arange(40) + 0.5) / 40
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).view(-1, 2, 1, 1)
    assert abs(model.log_density(grid).exp().sum().item() * (3 / 40) ** 2 - 1) < 0.01
    x = (next(data.batches("test", 500)) + 0.5) / 256
    z, log_det = model.bijection(x)
    again, back = model.bijection.inverse(z)
    assert (again - x).abs().max() < 1e-4 and (back + log_det).abs().max() < 1e-2


def test_a_flow_that_no_solver_follows_gives_no_numbers():
    flow = CNF(Linear(torch.full((2, 2), 1e30)), 1e-6, exact_trace_dims=2)
    x, log_det = flow.inverse(torch.ones(3, 2))
    assert x.isnan().all() and log_det.isnan().all()


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(continuous, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"flowgen\[flow_matching\]"):
        small()


def test_a_model_built_without_data_leaves_the_solver_whole(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torchdiffeq")]:
        monkeypatch.delitem(sys.modules, name)
    with torch.device("meta"):
        load_from_checkpoint("flow_matching")
    assert CNF(Linear(torch.eye(2)), 1e-3, exact_trace_dims=2)(torch.ones(1, 2))[0].isfinite().all()


@pytest.mark.parametrize(
    "changes", [{"tolerance": -1}, {"exact_trace_dims": -1}, {"num_layers": 0}, {"num_classes": 0}]
)
def test_arguments_are_checked(changes):
    with pytest.raises(UserError, match="must be"):
        small(**changes)


def test_commands_know_it(command, images, tmp_path):
    words = [word for word in SMALL if "steps_per_level" not in word]
    run = tmp_path / "run"
    model = [
        "model=flow_matching",
        "model.num_layers=1",
        "model.tolerance=1",
        "trainer.eval_images=4",
    ]
    status, _, error = command(
        "train", *words, *model, f"data.root={images}", "trainer.steps=2", f"output_dir={run}"
    )
    assert status == 0, error
    status, said, error = command("evaluate", "--run", run, "--json")
    assert status == 0 and '"solver_difference": ' in said and '"bits_per_dim": ' in said, error
    assert not FlowMatching.supports(SupportsInpainting, {}) and FlowMatching.supports(Flow, {})
