"""Completion by flows: the sampler against conditionals that are known in closed form."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_abilities import COMPLETE
from test_cli import assert_plain
from test_models import MODELS, noise, started
from torch import Tensor

from flowgen.bijections.base import Bijection
from flowgen.bijections.chain import Chain
from flowgen.bijections.elementwise import MarginalGaussianization
from flowgen.commands.complete import measurement
from flowgen.models.flows.flow import Flow
from flowgen.models.flows.hmc import StepSize, evaluate_density, hmc_step
from flowgen.models.flows.inpainting import InpaintingChains, PixelPosterior
from flowgen.utils.console import no_progress
from flowgen.utils.errors import UserError

DRAWS = 1500


class Field(Bijection):
    """A Gaussian field: x = mean + root z of images (batch, *shape), by default of one channel and square."""

    def __init__(self, mean: Tensor, root: Tensor, shape: tuple[int, int, int] | None = None):
        super().__init__()
        side = math.isqrt(len(mean))
        self.mean, self.root, self.shape = mean, root, shape or (1, side, side)

    def forward(self, x, condition=None):
        z = torch.linalg.solve_triangular(self.root, (x.flatten(1) - self.mean).T, upper=False).T
        return z, -self.root.diagonal().log().sum().expand(len(x))

    def inverse(self, z, condition=None):
        return (self.mean + z @ self.root.T).view(
            -1, *self.shape
        ), self.root.diagonal().log().sum().expand(len(z))


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
    flow.register_parameter(
        "anchor", torch.nn.Parameter(torch.zeros(()))
    )  # what says the device and the precision
    return flow.double().eval()


def field() -> tuple[Flow, Tensor, Tensor]:
    places = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).double()
    covariance = 0.1**2 * torch.exp(-torch.cdist(places, places) / 3)
    mean = 0.5 + 0.02 * (places[:, 0] - places[:, 1])
    return flow_of(Field(mean, torch.linalg.cholesky(covariance)), (1, 4, 4)), mean, covariance


def complete(flow: Flow, images: Tensor, known: Tensor, steps: int) -> Tensor:
    """The missing numbers of so many draws, (DRAWS, missing)."""
    return flow.restore(images, known, DRAWS, steps, torch.Generator().manual_seed(0)).points[
        :, ~known
    ]


def assert_moments(draws: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Within four errors of so many independent draws."""
    assert ((draws.mean(0) - mean).abs() < 4 * (variance / len(draws)).sqrt()).all(), (
        draws.mean(0),
        mean,
    )
    assert ((draws.var(0) / variance - 1).abs() < 4 * math.sqrt(2 / len(draws))).all(), (
        draws.var(0),
        variance,
    )


def test_a_gaussian_field_is_completed_by_its_conditional():
    """mean_m + C_mo C_oo^-1 (x_o - mean_o), C_mm - C_mo C_oo^-1 C_om; a level is 1 / 256 wide, which moves neither by much."""
    flow, mean, covariance = field()
    known = torch.zeros(1, 4, 4, dtype=torch.bool)
    known[..., :2] = True
    images = flow.sample(1, generator=torch.Generator().manual_seed(3))[0]
    draws = complete(flow, images, known, 600)
    k = known.flatten()
    weight = covariance[~k][:, k] @ torch.linalg.inv(covariance[k][:, k])
    exact = (images.flatten()[k].double() + 0.5) / 256
    of_level = weight.square().sum(1) / 12 / 256**2
    assert_moments(
        draws,
        mean[~k] + weight @ (exact - mean[k]),
        (covariance[~k][:, ~k] - weight @ covariance[k][:, ~k]).diagonal() + of_level,
    )


def test_many_missing_pixels_take_no_more_gradients():
    """Of 512 the truth lies between the smallest and the largest of nine draws four times in five; their spread is the conditional's."""
    shape = (1, 32, 32)
    places = torch.cartesian_prod(*(torch.arange(float(side)) for side in shape)).double()
    covariance = 0.1**2 * torch.exp(-torch.cdist(places, places) / 8)
    flow = flow_of(
        Field(torch.full((1024,), 0.5).double(), torch.linalg.cholesky(covariance), shape), shape
    )
    known = torch.zeros(shape, dtype=torch.bool)
    known[..., :16] = True
    k, images = known.flatten(), flow.sample(12, generator=torch.Generator().manual_seed(3))[0]
    found = flow.restore(images, known, 9, 80, torch.Generator().manual_seed(0))
    draws, whole = found.points.flatten(1)[:, ~k].view(12, 9, -1), (images.flatten(1) + 0.5) / 256
    below = (draws < whole[:, None, ~k]).sum(1)
    assert ((below > 0) & (below < 9)).double().mean().item() == pytest.approx(0.8, abs=0.06)
    weight = covariance[~k][:, k] @ torch.linalg.inv(covariance[k][:, k])
    deviation = (covariance[~k][:, ~k] - weight @ covariance[k][:, ~k]).diagonal().sqrt()
    standard = (draws - (0.5 + (whole[:, k].double() - 0.5) @ weight.T)[:, None]) / deviation
    assert abs(standard.mean()) < 0.1 and standard.std().item() == pytest.approx(1.05, abs=0.1)


@pytest.mark.parametrize("keep", ["downsample:2", "grayscale"])
def test_a_gaussian_field_is_restored_from_sums_by_its_posterior(keep):
    """Given y = A x + N(0, s^2) with s half a level: mean + K (y - A mean), C - K A C, with K = C A^T (A C A^T + s^2)^-1."""
    shape = (1, 4, 4) if keep == "downsample:2" else (3, 2, 2)
    places = torch.cartesian_prod(*(torch.arange(float(side)) for side in shape)).double()
    covariance = 0.1**2 * torch.exp(-torch.cdist(places, places) / 3)
    mean = 0.5 + 0.02 * (places[:, 1] - places[:, 2])
    flow = flow_of(Field(mean, torch.linalg.cholesky(covariance), shape), shape)
    known = measurement(keep, shape)
    images = flow.sample(1, generator=torch.Generator().manual_seed(3))[0]
    draws = flow.restore(
        images, known, DRAWS, 600, torch.Generator().manual_seed(0)
    ).points.flatten(1)
    each = (
        known.of(torch.eye(len(mean)).double().view(-1, *shape)).flatten(1).T
    )  # a row for every pixel, alike within a group
    rows = torch.stack(
        sorted({tuple(row.tolist()): row for row in each}.values(), key=lambda row: row.tolist())
    )
    assert torch.allclose(rows.sum(1), torch.ones(4).double())
    noise = (0.5 / 256) ** 2 * torch.eye(4).double()
    gain = covariance @ rows.T @ torch.linalg.inv(rows @ covariance @ rows.T + noise)
    y = rows @ ((images.flatten().double() + 0.5) / 256)
    assert_moments(
        draws, mean + gain @ (y - rows @ mean), (covariance - gain @ rows @ covariance).diagonal()
    )


@pytest.mark.parametrize("which", [0, 1])
def test_a_crescent_in_the_plane_is_completed_by_its_conditional(which):
    """By x1 the height is a Gaussian; by the height x1 has two modes, whose law is had from the density on a fine grid."""
    flow = flow_of(Bent(), (2, 1, 1))
    known = torch.tensor([which == 0, which == 1]).view(2, 1, 1)
    images = torch.tensor([200, 90], dtype=torch.uint8).view(1, 2, 1, 1)
    draws = complete(flow, images, known, 300)[:, 0]
    grid = (torch.arange(4000).double() + 0.5) / 4000
    fine = (images[0, which] + (torch.arange(20).double() + 0.5) / 20) / 256
    points = (
        torch.cartesian_prod(fine.flatten(), grid).flip(1)
        if which
        else torch.cartesian_prod(fine.flatten(), grid)
    )
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
    with_classes.means.data = torch.stack(
        (
            torch.zeros(16).double(),
            torch.linalg.solve_triangular(root, far[:, None], upper=False)[:, 0],
        )
    )
    known = torch.zeros(1, 4, 4, dtype=torch.bool)
    known[..., :2] = True
    k, images = known.flatten(), ((mean + 0.035) * 256).to(torch.uint8).view(1, 1, 4, 4)
    law = [
        torch.distributions.MultivariateNormal((mean + shift)[k], covariance[k][:, k])
        for shift in (0.0, far)
    ]
    wanted = (
        torch.stack([each.log_prob((images.flatten()[k] + 0.5) / 256) for each in law])
        .softmax(0)[1]
        .item()
    )
    found = (
        with_classes.restore(images, known, DRAWS, 400, torch.Generator().manual_seed(0))
        .labels.double()
        .mean()
        .item()
    )
    assert 0.1 < wanted < 0.9 and abs(found - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / DRAWS)


@pytest.mark.parametrize("name", ["glow", "glow with classes", "realnvp", "nice"])
def test_what_is_known_stays_and_the_same_seed_draws_the_same(name):
    model = started(name) if name in MODELS else MODELS["glow"](bits=5, classes=2)
    if name not in MODELS:
        model.initialize(noise(5))
    images, known = noise(5, 1), torch.rand(3, 8, 8) < 0.4
    one, other = (
        model.inpaint(
            images, known, method="langevin", sweeps=40, generator=torch.Generator().manual_seed(1)
        )
        for _ in range(2)
    )
    assert torch.equal(one.draws, other.draws) and one.draws.shape[1:] == (3, 8, 8)
    assert torch.equal(
        (31 * one.draws).round().to(torch.uint8)[:, known],
        images[:, known].expand(len(one.draws), -1),
    )
    assert (
        0 < one.figures["acceptance"] <= 1
        and one.figures["spread"] > 0
        and math.isfinite(one.figures["bits_per_dim"])
    )


def test_complete_shows_a_flows_answers(tiny_run, images, command, tmp_path):
    words = [
        "complete",
        images / "000.png",
        "--known",
        "left",
        "--run",
        tiny_run,
        "--steps",
        20,
        "--out",
    ]
    for name in ("one.png", "other.png"):
        status, _, error = command(*words, tmp_path / name)
        assert status == 0 and "acceptance" in error and "bits per dim" in error, error
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_complete_colours_and_enlarges(tiny_run, images, command, tmp_path):
    whole, small = Image.open(images / "000.png"), tmp_path / "small.png"
    whole.resize((4, 4), Image.Resampling.BOX).save(small)
    whole.convert("L").save(tmp_path / "grey.png")
    for path, keep in (
        (small, "downsample:2"),
        (images / "000.png", "downsample:4"),
        (tmp_path / "grey.png", "grayscale"),
    ):
        status, output, error = command(
            "complete", path, "--known", keep, "--run", tiny_run, "--steps", 20
        )
        assert status == 0 and "acceptance" in error and Image.open(output.strip()).width > 500, (
            error
        )
    words = ["complete", images / "000.png", "--run", tiny_run, "--known"]
    assert_plain(command(*words, "downsample:3"), "one of 2, 4, 8, not '3'")
    assert_plain(command(*words, "downsample"), "one of 2, 4, 8, not ''")
    assert_plain(
        command("complete", small, "--run", tiny_run, "--known", "downsample:4"), "4x4 pixels"
    )


def test_what_is_kept_of_sums_is_what_is_shown_of_them():
    images = torch.rand(2, 3, 4, 4)
    grey, smaller = (
        measurement("grayscale", (3, 4, 4)).of(images),
        measurement("downsample:2", (3, 4, 4)).of(images),
    )
    assert torch.allclose(
        grey,
        (0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2])[:, None].expand(
            -1, 3, -1, -1
        ),
    )
    assert torch.allclose(smaller[:, :, 1, 3], images[:, :, :2, 2:].mean((2, 3)))
    with pytest.raises(UserError, match="color images"):
        measurement("grayscale", (1, 28, 28))
    machine = COMPLETE["rbm"]()
    with pytest.raises(UserError, match="an RBM restores pixels"):
        machine.inpaint(
            torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
            measurement("downsample:2", (1, 8, 8)),
            method="gibbs",
        )


def test_a_chain_that_starts_where_there_is_no_density_finds_its_way():
    generator = torch.Generator().manual_seed(0)

    def density(x: Tensor) -> Tensor:
        return torch.where(x.abs().amax(1) < 5, -0.5 * x.square().sum(1), torch.nan)

    position = evaluate_density(torch.full((50, 1), 5.5), density)
    step = StepSize.reasonable(position, density, generator)
    for _ in range(200):
        position = hmc_step(position, density, step, 5, True, generator)
    assert (position.place.abs() < 5).all() and position.value.isfinite().all()


def test_chains_start_as_far_out_as_draws_are_where_that_makes_an_image():
    """Whether what is known says nothing at all, or more of one image than of its neighbour."""
    for far in (
        torch.zeros(6),
        torch.tensor([1.0, 1, 1, 50, 50, 50]),
        torch.tensor([1.0, 1, torch.nan, 1, 1, torch.inf]),
    ):
        target = SimpleNamespace(
            levels=torch.zeros(6, 1, 8, 8),
            body=Chain(),
            spread=lambda h: 1.0,
            violation=lambda h, far=far: far + h.new_zeros(()),
        )
        chains = InpaintingChains(
            target, None, torch.zeros(6), torch.Generator().manual_seed(0), no_progress
        )
        chains.scatter(images=2)
        out = chains.place.square().mean(1).sqrt()
        assert ((out > 0.7) == far.isfinite()).all() and (out[~far.isfinite()] < 0.1).all()


def test_where_the_model_finds_no_image_a_sentence_says_so():
    flow = flow_of(Field(torch.full((16,), torch.nan).double(), torch.eye(16).double()), (1, 4, 4))
    with pytest.raises(UserError, match="keep other pixels"):
        flow.restore(torch.zeros(1, 1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool), 2, 8)


def test_a_chain_far_out_stands_for_an_image():
    """Where rounding reaches 0 and 1 the head would be infinite, and the classes' probabilities no numbers."""
    x = torch.rand(9, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    head = MarginalGaussianization(1, 256)
    head.initialize(x)
    pixels = PixelPosterior(
        head, Chain(), torch.zeros_like(x), torch.zeros(1, 2, 2, dtype=torch.bool), 256
    )
    for far in (-30.0, 30.0):
        found = pixels.points(torch.full((9, 4), far))
        assert ((found > 0) & (found < 1)).all() and head(found)[0].isfinite().all()
