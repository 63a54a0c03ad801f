"""Inpainting by flows: the sampler is compared with conditionals in closed form."""

import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from enumeration import all_states, exact_distribution, small_rbm
from PIL import Image
from test_capabilities import INPAINTING_MODELS
from test_models import MODELS, build_model, initialized, random_images
from torch import Tensor

from flowgen.bijections.base import Bijection, Chain
from flowgen.bijections.elementwise import Logit, MarginalGaussianization
from flowgen.bijections.reshape import Flatten
from flowgen.commands.complete import measurement
from flowgen.data.preprocess import preprocess
from flowgen.models.flows import flow as flow_module
from flowgen.models.flows.flow import Flow
from flowgen.models.flows.hmc import StepSize, hmc_step, make_state
from flowgen.models.flows.inpainting import PixelChains
from flowgen.models.rbm import log_z
from flowgen.utils.errors import UserError

DRAWS = 1500


class LinearMap(Bijection):
    """x = mean + root z with a lower triangular root; images are square by default."""

    def __init__(self, mean: Tensor, root: Tensor, shape: tuple[int, int, int] | None = None):
        super().__init__()
        size = math.isqrt(len(mean))
        self.mean = mean
        self.root = root
        self.shape = shape or (1, size, size)

    def forward(self, x, condition=None):
        z = torch.linalg.solve_triangular(self.root, (x.flatten(1) - self.mean).T, upper=False).T
        return z, -self.root.diagonal().log().sum().expand(len(x))

    def inverse(self, z, condition=None):
        x = (self.mean + z @ self.root.T).view(-1, *self.shape)
        return x, self.root.diagonal().log().sum().expand(len(z))


class Crescent(Bijection):
    """x1 = 1/2 + z1 / 8, x2 = 1/4 + z1^2 / 16 + z2 / 32, for points (batch, 2, 1, 1)."""

    def forward(self, x, condition=None):
        z1 = 8 * (x[:, 0] - 0.5)
        z2 = 32 * (x[:, 1] - 0.25 - z1.square() / 16)
        return torch.stack((z1, z2), 1).flatten(1), torch.full((len(x),), math.log(8 * 32))

    def inverse(self, z, condition=None):
        x = torch.stack((0.5 + z[:, 0] / 8, 0.25 + z[:, 0].square() / 16 + z[:, 1] / 32), 1)
        return x.view(-1, 2, 1, 1), torch.full((len(z),), -math.log(8 * 32))


def make_flow(
    bijection: Bijection,
    shape: tuple[int, int, int],
    num_classes: int | None = None,
    bits: int = 8,
) -> Flow:
    flow = Flow(bijection, shape, bits, "uniform", num_classes)
    # A parameter, because the device and the precision of a model are those of its parameters.
    flow.register_parameter("anchor", torch.nn.Parameter(torch.zeros(())))
    return flow.double().eval()


def gaussian_field(
    shape: tuple[int, int, int], slope: Tensor, length: float
) -> tuple[Flow, Tensor, Tensor]:
    """A flow whose images are a Gaussian field, with its mean and its covariance.

    The covariance decays exponentially with the distance, over `length` pixels; the mean is
    1/2 + slope . pixel coordinates.
    """
    coordinates = torch.cartesian_prod(*(torch.arange(float(size)) for size in shape)).double()
    covariance = 0.1**2 * torch.exp(-torch.cdist(coordinates, coordinates) / length)
    mean = 0.5 + coordinates @ slope.double()
    flow = make_flow(LinearMap(mean, torch.linalg.cholesky(covariance), shape), shape)
    return flow, mean, covariance


def small_field() -> tuple[Flow, Tensor, Tensor]:
    return gaussian_field((1, 4, 4), torch.tensor([0.0, 0.02, -0.02]), length=3)


def left_half(shape: tuple[int, int, int]) -> Tensor:
    known = torch.zeros(shape, dtype=torch.bool)
    known[..., : shape[2] // 2] = True
    return known


def draw_unknown(flow: Flow, images: Tensor, known: Tensor, steps: int) -> Tensor:
    """Return samples of the unknown pixels, (DRAWS, unknown)."""
    generator = torch.Generator().manual_seed(0)
    return flow.inpainting_chains(images, known, DRAWS, steps, generator).samples[:, ~known]


def assert_moments(draws: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Check mean and variance within four standard errors of independent draws."""
    mean_error = (draws.mean(0) - mean).abs()
    variance_error = (draws.var(0) / variance - 1).abs()
    assert (mean_error < 4 * (variance / len(draws)).sqrt()).all(), (draws.mean(0), mean)
    assert (variance_error < 4 * math.sqrt(2 / len(draws))).all(), (draws.var(0), variance)


def assert_error(result: tuple[int, str, str], text: str) -> None:
    """Check that a command failed with one sentence that contains `text`."""
    status, _, error = result
    assert status == 1 and text in error and len(error.splitlines()) == 1, error


def test_a_gaussian_field_is_inpainted_by_its_conditional():
    """mean_m + C_mo C_oo^-1 (x_o - mean_o) and C_mm - C_mo C_oo^-1 C_om.

    Bins are 1/256 wide, which adds little to the variance.
    """
    flow, mean, covariance = small_field()
    known = left_half((1, 4, 4))
    images = flow.sample(1, generator=torch.Generator().manual_seed(3))[0]
    draws = draw_unknown(flow, images, known, 600)
    k = known.flatten()
    weight = covariance[~k][:, k] @ torch.linalg.inv(covariance[k][:, k])
    observed = (images.flatten()[k].double() + 0.5) / 256
    bin_variance = weight.square().sum(1) / 12 / 256**2
    conditional = covariance[~k][:, ~k] - weight @ covariance[k][:, ~k]
    assert_moments(
        draws,
        mean[~k] + weight @ (observed - mean[k]),
        conditional.diagonal() + bin_variance,
    )


def test_many_unknown_pixels_need_no_more_gradients():
    """The true pixel lies strictly between the smallest and largest of nine draws 80% of the time.

    There are 512 unknown pixels per image. The spread of the draws is that of the conditional.
    """
    shape = (1, 32, 32)
    flow, mean, covariance = gaussian_field(shape, torch.zeros(3), length=8)
    known = left_half(shape)
    k = known.flatten()
    images = flow.sample(12, generator=torch.Generator().manual_seed(3))[0]
    generator = torch.Generator().manual_seed(0)
    samples = flow.inpainting_chains(images, known, 9, 80, generator).samples
    draws = samples.flatten(1)[:, ~k].view(12, 9, -1)
    truth = (images.flatten(1) + 0.5) / 256
    rank = (draws < truth[:, None, ~k]).sum(1)
    coverage = ((rank > 0) & (rank < 9)).double().mean().item()
    assert coverage == pytest.approx(0.8, abs=0.06)
    weight = covariance[~k][:, k] @ torch.linalg.inv(covariance[k][:, k])
    deviation = (covariance[~k][:, ~k] - weight @ covariance[k][:, ~k]).diagonal().sqrt()
    conditional_mean = mean[~k] + (truth[:, k].double() - mean[k]) @ weight.T
    standardized = (draws - conditional_mean[:, None]) / deviation
    assert abs(standardized.mean()) < 0.1
    assert standardized.std().item() == pytest.approx(1.05, abs=0.1)


@pytest.mark.parametrize("known", ["downsample:2", "grayscale"])
def test_a_gaussian_field_is_restored_from_sums_by_its_posterior(known):
    """y = A x + N(0, s^2) with s half a bin, and K = C A^T (A C A^T + s^2)^-1.

    The posterior has mean + K (y - A mean) and C - K A C.
    """
    shape = (1, 4, 4) if known == "downsample:2" else (3, 2, 2)
    flow, mean, covariance = gaussian_field(shape, torch.tensor([0.0, 0.02, -0.02]), length=3)
    sums = measurement(known, shape)
    images = flow.sample(1, generator=torch.Generator().manual_seed(3))[0]
    generator = torch.Generator().manual_seed(0)
    draws = flow.inpainting_chains(images, sums, DRAWS, 600, generator).samples.flatten(1)
    # One row per pixel; the rows of a group are equal.
    all_rows = sums.apply(torch.eye(len(mean)).double().view(-1, *shape)).flatten(1).T
    distinct = {tuple(row.tolist()): row for row in all_rows}
    rows = torch.stack([distinct[key] for key in sorted(distinct)])
    assert torch.allclose(rows.sum(1), torch.ones(4).double())
    noise = (0.5 / 256) ** 2 * torch.eye(4).double()
    gain = covariance @ rows.T @ torch.linalg.inv(rows @ covariance @ rows.T + noise)
    y = rows @ ((images.flatten().double() + 0.5) / 256)
    assert_moments(
        draws, mean + gain @ (y - rows @ mean), (covariance - gain @ rows @ covariance).diagonal()
    )


def test_a_gray_image_is_restored_from_its_mean():
    """One block covers the image, so the measured sums of one chain have no spread."""
    flow, _, _ = small_field()
    whole = measurement("downsample:4", (1, 4, 4))
    images = flow.sample(1, generator=torch.Generator().manual_seed(3))[0]
    result = flow.inpaint(images, whole, sampler="hmc", generator=torch.Generator().manual_seed(0))
    brightness = result.draws.mean((1, 2, 3))
    # measured sums have a standard deviation of half a bin, and images are rounded once more
    assert (brightness - images.double().mean() / 255).abs().max() < 4 / 256


@pytest.mark.parametrize("index", [0, 1])
def test_a_crescent_is_inpainted_by_its_conditional(index):
    """Given x1, x2 is Gaussian; given x2, x1 has two modes. The reference is a fine grid."""
    flow = make_flow(Crescent(), (2, 1, 1))
    known = torch.tensor([index == 0, index == 1]).view(2, 1, 1)
    images = torch.tensor([200, 90], dtype=torch.uint8).view(1, 2, 1, 1)
    draws = draw_unknown(flow, images, known, 300)[:, 0]
    grid = (torch.arange(4000).double() + 0.5) / 4000
    within_bin = (images[0, index] + (torch.arange(20).double() + 0.5) / 20) / 256
    points = torch.cartesian_prod(within_bin.flatten(), grid)
    if index == 1:
        points = points.flip(1)
    log_density = flow.log_density(points.view(-1, 2, 1, 1)).view(20, -1).logsumexp(0)
    weights = log_density.softmax(0)
    mean = (weights * grid).sum()
    variance = (weights * (grid - mean).square()).sum()
    kurtosis = (weights * (grid - mean).pow(4)).sum() / variance.square()
    assert abs(draws.mean() - mean) < 4 * (variance / len(draws)).sqrt()
    variance_error = 4 * math.sqrt((kurtosis - 1) / len(draws)) + 0.02
    assert abs(draws.var() / variance - 1) < variance_error


def test_classes_are_sampled_from_their_posterior():
    """A mixture of two fields with the same covariance: p(y | x_o) by Bayes' rule."""
    flow, mean, covariance = small_field()
    shift = torch.full((16,), 0.08).double()
    root = torch.linalg.cholesky(covariance)
    latent_shift = torch.linalg.solve_triangular(root, shift[:, None], upper=False)[:, 0]
    conditional = make_flow(flow.bijection, (1, 4, 4), num_classes=2)
    conditional.means.data = torch.stack((torch.zeros_like(latent_shift), latent_shift))
    known = left_half((1, 4, 4))
    k = known.flatten()
    images = ((mean + 0.035) * 256).to(torch.uint8).view(1, 1, 4, 4)
    observed = (images.flatten()[k] + 0.5) / 256
    log_prob = [
        torch.distributions.MultivariateNormal(class_mean[k], covariance[k][:, k]).log_prob(
            observed
        )
        for class_mean in (mean, mean + shift)
    ]
    expected = torch.stack(log_prob).softmax(0)[1].item()
    generator = torch.Generator().manual_seed(0)
    chains = conditional.inpainting_chains(images, known, DRAWS, 400, generator)
    share = chains.labels.double().mean().item()
    assert 0.1 < expected < 0.9
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / DRAWS)


def test_classes_are_sampled_from_their_posterior_outside_the_unit_interval():
    """Pixels that leave [0, 1) while sampling keep their value in p(class | image).

    Both classes agree on the known pixel, so each has probability 1/2. Most of the unknown pixel's
    mass is above 1: clipped there, it would be assigned to the first class too often.
    """
    shape = (1, 1, 2)
    field = LinearMap(torch.tensor([0.5, 1.1]).double(), 0.2 * torch.eye(2).double(), shape)
    flow = make_flow(field, shape, num_classes=2)
    with torch.no_grad():
        flow.means.copy_(torch.tensor([[0.0, -1.0], [0.0, 1.0]]))
    known = torch.tensor([[[True, False]]])
    images = torch.full((1, *shape), 128, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    chains = flow.inpainting_chains(images, known, 1000, 400, generator)
    share = (chains.labels == 0).double().mean().item()
    assert share == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 1000))


@pytest.mark.parametrize("name", ["glow", "glow with classes", "realnvp", "nice"])
def test_known_pixels_are_kept_and_the_seed_determines_the_result(name):
    if name in MODELS:
        model = initialized(name)
    else:
        model = MODELS["glow"](bits=5, num_classes=2)
        model.initialize(random_images(5))
    images = random_images(5, 1)
    known = torch.rand(3, 8, 8) < 0.4
    result, again = (
        model.inpaint(
            images, known, sampler="hmc", steps=40, generator=torch.Generator().manual_seed(1)
        )
        for _ in range(2)
    )
    assert torch.equal(result.draws, again.draws) and result.draws.shape[1:] == (3, 8, 8)
    pixels = (31 * result.draws).round().to(torch.uint8)
    assert torch.equal(pixels[:, known], images[:, known].expand(len(pixels), -1))
    assert 0 < result.metrics["acceptance"] <= 1 and result.metrics["std"] > 0
    assert math.isfinite(result.metrics["bits_per_dim"])


def test_complete_is_reproducible_and_prints_metrics(tiny_run, images, command, tmp_path):
    arguments = [
        "complete",
        images / "000.png",
        "--known",
        "left",
        "--run",
        tiny_run,
        "--steps",
        20,
    ]
    for name in ("first.png", "second.png"):
        status, _, error = command(*arguments, "--out", tmp_path / name)
        assert status == 0 and "acceptance" in error and "bits per dim" in error, error
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def test_complete_colorizes_and_enlarges(tiny_run, images, command, tmp_path):
    image = Image.open(images / "000.png")
    small = tmp_path / "small.png"
    gray = tmp_path / "gray.png"
    image.resize((4, 4), Image.Resampling.BOX).save(small)
    image.convert("L").save(gray)
    for path, known in (
        (small, "downsample:2"),
        (images / "000.png", "downsample:4"),
        (gray, "grayscale"),
    ):
        status, output, error = command(
            "complete", path, "--known", known, "--run", tiny_run, "--steps", 20
        )
        assert status == 0 and "acceptance" in error, error
        assert Image.open(output.strip()).width > 500
    arguments = ["complete", images / "000.png", "--run", tiny_run, "--known"]
    assert_error(command(*arguments, "downsample:3"), "one of 2, 4, 8, not '3'")
    assert_error(command(*arguments, "downsample"), "one of 2, 4, 8, not ''")
    result = command("complete", small, "--run", tiny_run, "--known", "downsample:4")
    assert_error(result, "4x4 pixels")


def test_complete_crops_and_resizes_like_the_training_images(tiny_run, images, command, tmp_path):
    wide = tmp_path / "wide.png"
    resized = tmp_path / "resized.png"
    picture = Image.new("RGB", (24, 16), "red")
    picture.paste(Image.open(images / "000.png").resize((16, 16)), (4, 0))
    picture.save(wide)
    pixels = preprocess(wide.read_bytes(), 8, 3, None)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(resized)
    arguments = ["--known", "left", "--run", tiny_run, "--steps", 5, "--out"]
    outputs = [tmp_path / "first.png", tmp_path / "second.png"]
    status, _, error = command("complete", wide, *arguments, outputs[0])
    assert status == 0 and "wide.png is 24x16 pixels: cropped and resized to 8x8" in error, error
    status, _, error = command("complete", resized, *arguments, outputs[1])
    assert status == 0 and "cropped" not in error, error
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_measurements_are_weighted_means_of_pixels():
    images = torch.rand(2, 3, 4, 4)
    gray = measurement("grayscale", (3, 4, 4)).apply(images)
    small = measurement("downsample:2", (3, 4, 4)).apply(images)
    luma = 0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]
    assert torch.allclose(gray, luma[:, None].expand(-1, 3, -1, -1))
    assert torch.allclose(small[:, :, 1, 3], images[:, :, :2, 2:].mean((2, 3)))
    with pytest.raises(UserError, match="color images"):
        measurement("grayscale", (1, 28, 28))
    rbm = INPAINTING_MODELS["rbm"]()
    with pytest.raises(UserError, match="an RBM can only inpaint missing pixels"):
        rbm.inpaint(
            torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
            measurement("downsample:2", (1, 8, 8)),
            sampler="gibbs",
        )


def test_chains_that_start_outside_the_support_reach_it():
    generator = torch.Generator().manual_seed(0)

    def density(x: Tensor) -> Tensor:
        return torch.where(x.abs().amax(1) < 5, -0.5 * x.square().sum(1), torch.nan)

    state = make_state(torch.full((50, 1), 5.5), density)
    step_size = StepSize.find_reasonable(state, density, generator)
    for _ in range(200):
        state, _ = hmc_step(state, density, step_size, 5, True, generator)
        current = make_state(state.position, density)
        assert torch.equal(state.log_density, current.log_density)
        assert torch.equal(state.gradient, current.gradient)
    assert (state.position.abs() < 5).all() and state.log_density.isfinite().all()


@pytest.mark.parametrize(
    "violation",
    [
        torch.zeros(6),  # the known part says nothing
        torch.tensor([1.0, 1, 1, 50, 50, 50]),  # it says more about the second image
        torch.tensor([1.0, 1, torch.nan, 1, 1, torch.inf]),  # two chains are not images
    ],
    ids=["none", "uneven", "not finite"],
)
def test_chains_start_as_far_apart_as_samples_unless_the_decoder_fails(violation):
    class Chains(PixelChains):
        def scale_of(self, h):
            return 1.0

        def violation(self, h):
            return violation + h.new_zeros(())

    flow = Flow(Flatten(1, 8, 8), (1, 8, 8), bits=8)
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(6, dtype=torch.long)
    chains = Chains(flow, torch.zeros(6, 1, 8, 8), None, labels, generator)
    chains.perturb(num_images=2)
    distance = chains.position.square().mean(1).sqrt()
    assert ((distance > 0.7) == violation.isfinite()).all()
    assert (distance[~violation.isfinite()] < 0.1).all()


def test_a_model_that_finds_no_image_raises_one_sentence():
    mean = torch.full((16,), torch.nan).double()
    flow = make_flow(LinearMap(mean, torch.eye(16).double()), (1, 4, 4))
    known = torch.ones(1, 4, 4, dtype=torch.bool)
    with pytest.raises(UserError, match="keep other pixels"):
        flow.inpainting_chains(torch.zeros(1, 1, 4, 4), known, 2, 8)


def test_extreme_positions_decode_to_valid_images():
    """At x = 0 and x = 1, which rounding could reach, the head would be infinite."""
    x = torch.rand(9, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    head = MarginalGaussianization(1, 256)
    head.initialize(x)
    known = torch.zeros(1, 2, 2, dtype=torch.bool)
    flow = Flow(Chain(head, Flatten(1, 2, 2)), (1, 2, 2), bits=8)
    labels = torch.zeros(9, dtype=torch.long)
    chains = PixelChains(flow, torch.zeros_like(x), known, labels, None)
    for value in (-30.0, 30.0):
        chains.position = torch.full((9, 4), value)
        decoded = chains.samples
        assert ((decoded > 0) & (decoded < 1)).all() and head(decoded)[0].isfinite().all()


def test_classes_of_extreme_positions_are_drawn():
    """The inverse of the logit is beyond 1 there, where the logit is not a number."""
    flow = Flow(Chain(Logit(), Flatten(1, 2, 2)), (1, 2, 2), bits=8, num_classes=2)
    torch.nn.init.zeros_(flow.means)
    known = torch.zeros(1, 2, 2, dtype=torch.bool)
    labels = torch.zeros(9, dtype=torch.long)
    chains = PixelChains(flow, torch.zeros(9, 1, 2, 2), known, labels, torch.Generator())
    chains.position = torch.full((9, 4), 30.0)
    chains.sample_exactly(2, 1)
    assert chains.labels.float().mean() not in (0, 1)


def test_coverage_of_varying_pixels_is_that_of_the_interval_under_the_right_law(capsys):
    """For Bernoulli(0.05), selection by the samples alone would give a coverage of 0.934."""
    script = Path(__file__).parents[1] / "scripts" / "benchmarks" / "interval_coverage.py"
    print_row = runpy.run_path(str(script))["print_row"]
    torch.manual_seed(0)
    values = torch.bernoulli(torch.full((200, 10, 400), 0.05))
    print_row("exact", values[:, 1:], values[:, 0])
    of_all, of_varying = (
        float(value) for value in re.findall(r"([\d.]+) ±", capsys.readouterr().out)[:2]
    )
    assert of_all == pytest.approx(0.9, abs=0.005)
    assert of_varying == pytest.approx(0.9, abs=0.008)


def test_conditional_log_prob_of_a_clamped_rbm_is_exact():
    rbm = small_rbm(visible=(1, 2, 3), hidden=4)
    images = all_states(6).to(torch.uint8).view(-1, 1, 2, 3)
    probabilities = exact_distribution(rbm).view(2, 2, 2, 2, 2, 2)  # unit 0 comes last
    known = torch.tensor([[[True, False, True], [False, False, True]]])
    conditional = probabilities / probabilities.sum((1, 2, 4), keepdim=True)
    for index in range(0, 64, 7):
        metrics = rbm.conditional_log_prob(images[index : index + 1], known)
        value = metrics["conditional_log_probability"]
        assert value.value == pytest.approx(conditional.flatten()[index].log().item(), abs=1e-9)
        assert (value.error, value.likelihood) == (0, "exact")


def test_conditional_log_prob_of_a_large_rbm_is_estimated_with_its_error(monkeypatch):
    """The estimates are compared with the value by enumeration."""
    rbm = small_rbm(visible=(1, 3, 4), hidden=6, scale=0.5)
    known = torch.arange(12).view(1, 3, 4) < 6
    image = torch.randint(2, (1, 1, 3, 4), dtype=torch.uint8)
    exact = rbm.conditional_log_prob(image, known)["conditional_log_probability"]
    monkeypatch.setattr(log_z, "MAX_ENUMERATED_UNITS", 0)
    metrics = rbm.conditional_log_prob(
        image, known, steps=200, generator=torch.Generator().manual_seed(0)
    )
    value = metrics["conditional_log_probability"]
    assert 0 < value.error < 0.1 and abs(value.value - exact.value) < 4 * value.error
    assert value.likelihood == "estimate" and "200 steps" in metrics.facts["method"]
    monkeypatch.setattr(log_z, "MIN_EFFECTIVE_SIZE", 10**6)
    with pytest.raises(
        UserError, match=r"200 steps, because the effective .* is only .*: increase --steps"
    ):
        rbm.conditional_log_prob(image, known, steps=200)


def check_conditional_log_prob(model: Flow, image: tuple[int, int]) -> None:
    """Compare P(x1 | x0) of two numbers of two bits with a ratio of integrals over bins."""
    centers = (torch.arange(400, dtype=torch.double) + 0.5) / 400
    grid = torch.cartesian_prod(centers, centers).view(-1, 2, 1, 1)
    with torch.no_grad():
        density = model.log_density(grid).exp().view(4, 100, 4, 100)
    probabilities = density.mean((1, 3))
    exact = (probabilities / probabilities.sum(1, keepdim=True)).log()
    known = torch.tensor([True, False]).view(2, 1, 1)
    metrics = model.conditional_log_prob(
        torch.tensor(image, dtype=torch.uint8).view(1, 2, 1, 1),
        known,
        steps=15,
        generator=torch.Generator().manual_seed(0),
    )
    value = metrics["conditional_log_probability"]
    assert value.error < 0.25
    assert abs(value.value - exact[image].item()) < 4 * value.error


@pytest.mark.parametrize(
    ("name", "changes"),
    [("maf", {"num_transforms": 1}), ("glow", {"num_classes": 2, "steps_per_level": 1})],
)
def test_conditional_log_prob_of_a_flow_agrees_with_numerical_integration(name, changes):
    model = build_model(name, **changes | {"image_shape": (2, 1, 1), "bits": 2})
    model.initialize(random_images(2, 500, 2, (1, 1)) // 2 + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.eval().double()
    for image in ((1, 2), (2, 0)):
        check_conditional_log_prob(model, image)


@pytest.mark.parametrize("head", [[], [Logit(0.01)]], ids=["no head", "logit"])
def test_conditional_log_prob_excludes_points_outside_and_the_slope_of_the_head(head):
    """Without a head, the flow has much probability outside of the unit square."""
    scale = 1.0 if head else 0.3
    root = scale * torch.tensor([[1, 0], [0.6, 1]], dtype=torch.double)
    mean = torch.tensor([0.5, 0.2], dtype=torch.double)
    flow = make_flow(Chain(*head, LinearMap(mean, root, (2, 1, 1))), (2, 1, 1), bits=2)
    for image in ((1, 2), (2, 0)):
        check_conditional_log_prob(flow, image)


def test_conditional_log_prob_of_a_mixture_of_classes_is_the_closed_form():
    """One of ten classes explains the image nearly alone."""
    shape = (1, 2, 2)
    flow, _, covariance = gaussian_field(shape, torch.tensor([0.0, 0.02, -0.01]), 2.0)
    image = flow.sample(1, generator=torch.Generator().manual_seed(1))[0]
    flow.means = torch.cat((flow.means, flow.means.new_full((9, 4), 2.0)))
    centers = flow.bijection.inverse(flow.means)[0].flatten(1)
    known = torch.arange(4).view(shape) < 2
    k = known.flatten()
    x = (image.flatten().double() + 0.5) / 256
    normal = torch.distributions.MultivariateNormal
    of_image = normal(centers, covariance).log_prob(x).logsumexp(0)
    of_known = normal(centers[:, k], covariance[k][:, k]).log_prob(x[k]).logsumexp(0)
    expected = (of_image - of_known).item() - 2 * math.log(256)
    metrics = flow.conditional_log_prob(
        image, known, steps=100, generator=torch.Generator().manual_seed(0)
    )
    value = metrics["conditional_log_probability"]
    assert value.error < 0.15
    assert abs(value.value - expected) < 4 * value.error + 0.02


def test_conditional_log_prob_of_a_gaussian_field_is_the_closed_form(monkeypatch):
    shape = (1, 3, 3)
    flow, mean, covariance = gaussian_field(shape, torch.tensor([0.0, 0.02, -0.01]), 2.0)
    known = torch.arange(9).view(shape) < 4
    image = (256 * flow.sample(1, generator=torch.Generator().manual_seed(1))[0].double()) // 256
    x = (image.flatten() + 0.5) / 256
    k = known.flatten()
    gain = covariance[~k][:, k] @ torch.linalg.inv(covariance[k][:, k])
    conditional = torch.distributions.MultivariateNormal(
        mean[~k] + gain @ (x[k] - mean[k]), covariance[~k][:, ~k] - gain @ covariance[k][:, ~k]
    )
    metrics = flow.conditional_log_prob(
        image.to(torch.uint8), known, steps=60, generator=torch.Generator().manual_seed(0)
    )
    value = metrics["conditional_log_probability"]
    expected = conditional.log_prob(x[~k]).item() - 5 * math.log(256)
    assert value.error < 0.3 and abs(value.value - expected) < 4 * value.error + 0.02
    monkeypatch.setattr(flow_module, "MIN_EFFECTIVE_SIZE", 50)
    with pytest.raises(UserError, match="the effective sample size is only"):
        flow.conditional_log_prob(image.to(torch.uint8), known, steps=2)
