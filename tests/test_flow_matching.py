"""Continuous flows: the solver and its estimates are compared with closed forms."""

import math
import sys

import pytest
import torch
from conftest import SMALL, fit
from test_models import build_model

from flowgen.bijections.continuous import CNF
from flowgen.data.toy2d import Toy2D
from flowgen.models.base import SupportsInpainting
from flowgen.models.flows import flow_matching
from flowgen.models.flows.flow import Flow
from flowgen.models.flows.flow_matching import FlowMatching
from flowgen.utils.errors import UserError


class LinearVelocity(torch.nn.Module):
    """dx/dt = A x."""

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix)

    def forward(self, x, t, condition=None):
        return x @ self.matrix.T


def random_batch(count: int) -> torch.Tensor:
    return torch.randint(32, (count, 1, 2, 2), dtype=torch.uint8)


def small_model(**changes: object) -> FlowMatching:
    """A model of images of 1x2x2 pixels with perturbed parameters, in float64."""
    arguments = {
        "image_shape": (1, 2, 2),
        "num_layers": 1,
        "tolerance": 1e-9,
        "gaussianize": False,
    }
    model = build_model("flow_matching", **arguments | changes)
    model.initialize(random_batch(64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


def test_a_linear_velocity_is_integrated_to_the_matrix_exponential():
    matrix = torch.randn(6, 6, dtype=torch.float64)
    flow = CNF(LinearVelocity(matrix), 1e-10, 6)
    x = torch.randn(5, 6, dtype=torch.float64)
    z, log_det = flow(x)
    assert torch.allclose(z, x @ torch.linalg.matrix_exp(-matrix).T, atol=1e-8)
    assert torch.allclose(log_det, -matrix.trace().expand(5), atol=1e-8)


def test_the_estimated_log_det_is_unbiased_and_does_not_depend_on_the_batch():
    matrix = torch.randn(6, 6, dtype=torch.float64)
    flow = CNF(LinearVelocity(matrix), 1e-6, 0)
    x = torch.randn(5000, 6, dtype=torch.float64)
    with torch.no_grad():
        log_det = flow(x)[1]
        repeated = flow(x)[1]
        shifted = flow(x + 1)[1]
        single = flow(x[7:8])[1]
    standard_error = log_det.std() / math.sqrt(5000)
    assert abs(log_det.mean() + matrix.trace()) < 4 * standard_error and log_det.std() > 0.1
    assert torch.equal(log_det, repeated) and not torch.equal(log_det, shifted)
    assert torch.allclose(single, log_det[7], atol=1e-4)


def test_inverse_and_log_det_agree_with_autograd():
    model = small_model(num_classes=3)
    condition = torch.eye(3, dtype=torch.float64)[1:2]
    x = torch.rand(1, 1, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        z, log_det = model.bijection(x, condition)
        again, inverse_log_det = model.bijection.inverse(z, condition)
    assert (again - x).abs().max() < 1e-8 and abs(inverse_log_det + log_det) < 1e-8
    jacobian = torch.autograd.functional.jacobian(
        lambda x: model.bijection(x, condition)[0], x
    ).view(4, 4)
    assert abs(torch.linalg.slogdet(jacobian).logabsdet - log_det) < 1e-8


def test_log_prob_of_samples_equals_the_density_of_the_forward_pass():
    model = small_model(tolerance=1e-7)
    z = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    _, log_prob = model.sample(4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        log_density = model.log_density(model.bijection.inverse(z)[0])
    assert torch.allclose(log_prob, log_density - 4 * math.log(32), atol=1e-4)


def test_the_solver_difference_falls_with_the_tolerance_and_does_not_change_it():
    model = small_model()
    images = random_batch(10)
    differences = []
    for tolerance in (1.0, 1e-3):
        model.cnf.tolerance = tolerance
        differences.append(model.evaluate([images])["solver_difference"].value)
        assert model.cnf.tolerance == tolerance
    assert differences[0] > 3 * differences[1] > 0


def test_log_probabilities_of_estimates_are_averaged_over_samples():
    model = small_model(exact_trace_dims=0, tolerance=0.1)
    images = random_batch(8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        log_prob = torch.stack([model.log_prob(images, generator) for _ in range(3)])
        score = model.score(
            images, num_importance_samples=3, generator=torch.Generator().manual_seed(0)
        )
    assert torch.allclose(score, log_prob.mean(0))


def test_training_learns_two_classes_and_samples_the_requested_class():
    model = build_model(
        "flow_matching",
        image_shape=(1, 2, 2),
        num_classes=2,
        width=16,
        num_layers=1,
        gaussianize=False,
        tolerance=0.1,
    )

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(64) % 2
        images = 4 + 20 * labels[:, None, None, None] + torch.randint(4, (64, 1, 2, 2))
        return images.to(torch.uint8), labels

    model.initialize(*batch(0))
    fit(model, batch, steps=80, lr=1e-2)
    for label in (0, 1):
        images, _ = model.sample(32, generator=torch.Generator().manual_seed(0), label=label)
        assert (images.float().mean() - (5.5 + 20 * label)).abs() < 3
    assert (model.classify(batch(0)[0]).argmax(1) == batch(0)[1]).all()


@torch.no_grad()
def test_a_density_in_two_dimensions_integrates_to_one_and_inverts():
    """The grid is three times as wide as the data."""
    model = build_model(
        "flow_matching", image_shape=(2, 1, 1), bits=8, width=16, num_layers=1, tolerance=1e-3
    )
    data = Toy2D(name="moons", num_points=1000, bits=8, random_flip=False)
    model.initialize(data.train_batch(0, 1000, 0)[0])
    initial = model.eval().evaluate(data.batches("test", 250, 250))["bits_per_dim"].value
    with torch.enable_grad():
        fit(model, lambda step: data.train_batch(256 * step, 256, 0), steps=100, lr=5e-3)
    trained = model.evaluate(data.batches("test", 250, 250))["bits_per_dim"].value
    assert trained < initial - 0.1
    centers = -1 + 3 * (torch.arange(40) + 0.5) / 40
    grid = torch.stack(torch.meshgrid(centers, centers, indexing="xy"), -1).view(-1, 2, 1, 1)
    assert abs(model.log_density(grid).exp().sum().item() * (3 / 40) ** 2 - 1) < 0.01
    x = (next(data.batches("test", 500)) + 0.5) / 256
    z, log_det = model.bijection(x)
    again, inverse_log_det = model.bijection.inverse(z)
    assert (again - x).abs().max() < 1e-4 and (inverse_log_det + log_det).abs().max() < 1e-2


def test_a_velocity_that_diverges_returns_nan():
    flow = CNF(LinearVelocity(torch.full((2, 2), 1e30)), 1e-6, 2)
    x, log_det = flow.inverse(torch.ones(3, 2))
    assert x.isnan().all() and log_det.isnan().all()


def test_a_missing_solver_package_raises_one_sentence(monkeypatch):
    monkeypatch.setattr(flow_matching, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="package torchdiffeq"):
        small_model()


def test_the_solver_works_after_a_model_was_built_on_the_meta_device(monkeypatch):
    """The constants of torchdiffeq would have no data if it were imported on the meta device."""
    for name in [name for name in sys.modules if name.startswith("torchdiffeq")]:
        monkeypatch.delitem(sys.modules, name)
    with torch.device("meta"):
        build_model("flow_matching")
    flow = CNF(LinearVelocity(torch.eye(2)), 1e-3, 2)
    assert flow(torch.ones(1, 2))[0].isfinite().all()


@pytest.mark.parametrize(
    "changes", [{"tolerance": -1}, {"exact_trace_dims": -1}, {"num_layers": 0}, {"num_classes": 0}]
)
def test_invalid_arguments_are_rejected(changes):
    with pytest.raises(UserError, match=f"{next(iter(changes))} must be"):
        small_model(**changes)


def test_commands_train_and_evaluate_it(command, images, tmp_path):
    run = tmp_path / "run"
    overrides = [
        *[override for override in SMALL if "steps_per_level" not in override],
        "model=flow_matching",
        "model.num_layers=1",
        "model.tolerance=1",
        "trainer.eval_images=4",
        f"data.root={images}",
        "trainer.steps=2",
    ]
    status, _, error = command("train", *overrides, f"output_dir={run}")
    assert status == 0, error
    status, output, error = command("evaluate", "--run", run, "--json")
    assert status == 0 and '"solver_difference": ' in output and '"bits_per_dim": ' in output, error
    assert not FlowMatching.supports(SupportsInpainting, {}) and FlowMatching.supports(Flow, {})
