"""Completion by flows: the sampler against conditionals that are known in closed form."""

import math

import pytest
import torch
from test_models import MODELS, noise, started
from torch import Tensor

from flowgen.bijections import Bijection
from flowgen.models import Flow

DRAWS = 1500


class Field(Bijection):
    """A Gaussian field: x = mean + root z of images (batch, 1, size, size)."""

    def __init__(self, mean: Tensor, root: Tensor):
        super().__init__()
        self.mean, self.root = mean, root

    def forward(self, x, condition=None):
        z = torch.linalg.solve_triangular(self.root, (x.flatten(1) - self.mean).T, upper=False).T
        return z, -self.root.diagonal().log().sum().expand(len(x))

    def inverse(self, z, condition=None):
        side = math.isqrt(len(self.mean))
        return (self.mean + z @ self.root.T).view(-1, 1, side, side), self.root.diagonal().log().sum().expand(len(z))


class Bent(Bijection):
    """A crescent in the plane: x1 = 1/2 + z1 / 8, x2 = 1/4 + z1^2 / 16 + z2 / 32, of points (batch, 2, 1, 1)."""

    def forward(self, x, condition=None):
        first = 8 * (x[:, 0] - 0.5)
        second = 32 * (x[:, 1] - 0.25 - first.square() / 16)
        return torch.stack((first, second), 1).flatten(1), torch.full((len(x),), math.log(8 * 32))

    def inverse(self, z, condition=None):
        x = torch.stack((0.5 + z[:, 0] / 8, 0.25 + z[:, 0].square() / 16 + z[:, 1] / 32), 1)
        return x.view(-1, 2, 1, 1), torch.full((len(z),), -math.log(8 * 32))


def flow_of(bijection: Bijection, shape: tuple[int, int, int], classes: int | None = None) -> Flow:
    flow = Flow(bijection, shape, 8, "uniform", classes)
    flow.register_parameter("anchor", torch.nn.Parameter(torch.zeros(())))  # what says the device and the precision
    return flow.double().eval()


def field() -> tuple[Flow, Tensor, Tensor]:
    places = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).double()
    covariance = 0.1**2 * torch.exp(-torch.cdist(places, places) / 3)
    mean = 0.5 + 0.02 * (places[:, 0] - places[:, 1])
    return flow_of(Field(mean, torch.linalg.cholesky(covariance)), (1, 4, 4)), mean, covariance


def complete(flow: Flow, levels: Tensor, known: Tensor, steps: int) -> Tensor:
    """The missing numbers of so many draws, (DRAWS, missing)."""
    return flow.restore(levels, known, DRAWS, steps, torch.Generator().manual_seed(0)).points[:, ~known]


def assert_moments(draws: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Within four errors of so many independent draws."""
    assert ((draws.mean(0) - mean).abs() < 4 * (variance / len(draws)).sqrt()).all(), (draws.mean(0), mean)
    assert ((draws.var(0) / variance - 1).abs() < 4 * math.sqrt(2 / len(draws))).all(), (draws.var(0), variance)


def test_a_gaussian_field_is_completed_by_its_conditional():
    """mean_m + C_mo C_oo^-1 (x_o - mean_o), C_mm - C_mo C_oo^-1 C_om; a level is 1 / 256 wide, which moves neither by much."""
    flow, mean, covariance = field()
    known = torch.zeros(1, 4, 4, dtype=torch.bool)
    known[..., :2] = True
    levels = flow.sample(1, generator=torch.Generator().manual_seed(3))[0]
    draws = complete(flow, levels, known, 600)
    k = known.flatten()
    weight = covariance[~k][:, k] @ torch.linalg.inv(covariance[k][:, k])
    exact = (levels.flatten()[k].double() + 0.5) / 256
    of_level = weight.square().sum(1) / 12 / 256**2
    assert_moments(
        draws, mean[~k] + weight @ (exact - mean[k]), (covariance[~k][:, ~k] - weight @ covariance[k][:, ~k]).diagonal() + of_level
    )


@pytest.mark.parametrize("which", [0, 1])
def test_a_crescent_in_the_plane_is_completed_by_its_conditional(which):
    """By x1 the height is a Gaussian; by the height x1 has two modes, whose law is had from the density on a fine grid."""
    flow = flow_of(Bent(), (2, 1, 1))
    known = torch.tensor([which == 0, which == 1]).view(2, 1, 1)
    levels = torch.tensor([200, 90], dtype=torch.uint8).view(1, 2, 1, 1)
    draws = complete(flow, levels, known, 300)[:, 0]
    grid = (torch.arange(4000).double() + 0.5) / 4000
    fine = (levels[0, which] + (torch.arange(20).double() + 0.5) / 20) / 256
    points = torch.cartesian_prod(fine.flatten(), grid).flip(1) if which else torch.cartesian_prod(fine.flatten(), grid)
    share = flow.log_density(points.view(-1, 2, 1, 1)).view(20, -1).logsumexp(0).softmax(0)
    mean = (share * grid).sum()
    variance = (share * (grid - mean).square()).sum()
    kurtosis = (share * (grid - mean).pow(4)).sum() / variance.square()
    assert abs(draws.mean() - mean) < 4 * (variance / len(draws)).sqrt()
    assert abs(draws.var() / variance - 1) < 4 * math.sqrt((kurtosis - 1) / len(draws)) + 0.02


def test_classes_are_drawn_as_what_is_known_says():
    """A mixture of two fields of one covariance: p(y | x_o) by Bayes' rule."""
    flow, mean, covariance = field()
    with_classes = flow_of(flow.bijection, (1, 4, 4), classes=2)
    root, far = torch.linalg.cholesky(covariance), torch.full((16,), 0.08).double()
    with_classes.means.data = torch.stack((torch.zeros(16).double(), torch.linalg.solve_triangular(root, far[:, None], upper=False)[:, 0]))
    known = torch.zeros(1, 4, 4, dtype=torch.bool)
    known[..., :2] = True
    k, levels = known.flatten(), ((mean + 0.035) * 256).to(torch.uint8).view(1, 1, 4, 4)
    law = [torch.distributions.MultivariateNormal((mean + shift)[k], covariance[k][:, k]) for shift in (0.0, far)]
    wanted = torch.stack([each.log_prob((levels.flatten()[k] + 0.5) / 256) for each in law]).softmax(0)[1].item()
    found = with_classes.restore(levels, known, DRAWS, 400, torch.Generator().manual_seed(0)).labels.double().mean().item()
    assert 0.1 < wanted < 0.9 and abs(found - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / DRAWS)


@pytest.mark.parametrize("name", ["glow", "glow with classes", "realnvp", "nice"])
def test_what_is_known_stays_and_the_same_seed_draws_the_same(name):
    model = started(name) if name in MODELS else MODELS["glow"](bits=5, classes=2)
    if name not in MODELS:
        model.initialize(noise(5))
    levels, known = noise(5, 1), torch.rand(3, 8, 8) < 0.4
    one, other = (model.complete(levels, known, method="langevin", sweeps=40, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one.draws, other.draws) and one.draws.shape[1:] == (3, 8, 8)
    assert torch.equal((31 * one.draws).round().to(torch.uint8)[:, known], levels[:, known].expand(len(one.draws), -1))
    assert 0 < one.figures["acceptance"] <= 1 and one.figures["spread"] > 0 and math.isfinite(one.figures["bits_per_dim"])


def test_complete_shows_a_flows_answers(tiny_run, images, command, tmp_path):
    words = ["complete", images / "000.png", "--keep", "left", "--run", tiny_run, "--sweeps", 20, "--out"]
    for name in ("one.png", "other.png"):
        status, _, error = command(*words, tmp_path / name)
        assert status == 0 and "acceptance" in error and "bits per dim" in error, error
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()
