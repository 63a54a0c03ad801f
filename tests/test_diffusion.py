"""Variational diffusion: its bound and samples are compared with distributions that are known."""

import math

import pytest
import torch
from conftest import SMALL, fit
from enumeration import all_images
from test_models import build_model

from flowgen.models.diffusion import VariationalDiffusion, stratified_times
from flowgen.training.distributed import shard_batches
from flowgen.utils.errors import UserError


class ExactDiffusion(VariationalDiffusion):
    """A model whose network is replaced by the expected noise under a known distribution."""

    def __init__(self, images: torch.Tensor, probabilities: torch.Tensor, **settings: object):
        super().__init__(
            image_shape=images.shape[1:], width=4, num_heads=1, marginals=False, **settings
        )
        self.double()
        self.images = images
        self.log_probabilities = probabilities.double().log()

    def predict_noise(self, z: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self.alpha_sigma(time)
        values = self.pixel_values(self.images.double()).flatten(1)
        distances = (z / alpha).flatten(1)[:, None] - values
        precision = (alpha / sigma).square()[:, :, 0, 0]
        logits = self.log_probabilities - precision / 2 * distances.square().sum(2)
        return (z - alpha * (logits.softmax(1) @ values).view_as(z)) / sigma


def two_images(**settings: object) -> ExactDiffusion:
    """The exact model of two equally likely images with one pixel."""
    images = torch.tensor([77, 178], dtype=torch.uint8).view(2, 1, 1, 1)
    return ExactDiffusion(images, torch.tensor([0.5, 0.5]), eval_times=100, **settings)


def four_images(**settings: object) -> ExactDiffusion:
    """The exact model of four images whose probabilities are 0.1, 0.2, 0.3 and 0.4."""
    images = torch.randint(256, (4, 1, 2, 2), dtype=torch.uint8)
    return ExactDiffusion(images, torch.tensor([0.1, 0.2, 0.3, 0.4]), **settings)


def small_model(**settings: object) -> VariationalDiffusion:
    """A model of images with three values of two bits, with perturbed parameters."""
    arguments = {"image_shape": (3, 1, 1), "bits": 2, "sampling_steps": 20}
    model = build_model("diffusion", **arguments | settings)
    model.initialize(torch.randint(4, (64, 3, 1, 1), dtype=torch.uint8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(None, 1.00), (1000, 1.02), (100, 1.11), (20, 1.64)]
)
def test_two_equally_likely_images_cost_one_bit_and_more_in_few_steps(num_steps, expected):
    """The reconstruction loss adds 0.010 bits to these values, the prior loss 0.001."""
    model = two_images(num_steps=num_steps)
    images = model.images.repeat(10_000, 1, 1, 1)
    bits = -model.log_prob(images, torch.Generator().manual_seed(0)) / math.log(2)
    assert abs(bits.mean() - 0.011 - expected) < 4 * bits.std() / math.sqrt(20_000)


def test_the_bound_of_independent_pixels_is_their_entropy_before_training():
    model = VariationalDiffusion(image_shape=(2, 64, 32), bits=3, width=8, eval_times=32)
    probabilities = torch.tensor([[30, 1, 1, 1, 1, 1, 1, 4], [1, 2, 3, 4, 4, 3, 2, 1.0]])
    probabilities /= probabilities.sum(1, keepdim=True)
    images = torch.multinomial(probabilities.repeat(8, 1), 2048, replacement=True)
    images = images.view(8, 2, 64, 32).to(torch.uint8)
    model.initialize(images)
    entropy = -(probabilities * probabilities.log2()).sum(1).mean().item()
    result = model.evaluate([images])["bits_per_dim"].value
    assert abs(result - 0.007 - entropy) < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(model.evaluate([images])["bits_per_dim"].value - result) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"marginals": False}, {"num_steps": 10}])
def test_the_probabilities_of_all_images_add_up_to_at_most_one(settings):
    images = all_images((3, 1, 1), bits=2)
    model = small_model(eval_times=64, **settings)

    def total() -> float:
        """The sum of exp(bound) over all images, without bias: E[exp(N(0, s^2))] = exp(s^2 / 2)."""
        with torch.no_grad():
            log_prob = model.log_prob(images.repeat(32, 1, 1, 1)).view(32, 64)
        return (log_prob.mean(0) - log_prob.var(0) / 64).exp().sum().item()

    assert total() <= 1
    fit(model, lambda _: (images[torch.randint(20, (128,))],), steps=100, lr=5e-3)
    assert 0.05 < total() <= 1


def test_the_loss_is_the_mean_of_the_bound():
    model = two_images()
    images = model.images.repeat(20, 1, 1, 1)
    losses = torch.stack([model(images[torch.randperm(40)]) for _ in range(2000)])
    bound = model.bits_per_dim(model.log_prob(images.repeat(500, 1, 1, 1)))
    error = losses.std() / math.sqrt(2000) + bound.std() / math.sqrt(20_000)
    assert abs(losses.mean() - bound.mean()) < 3 * error and error < 0.04


def test_importance_samples_are_averaged_and_a_score_takes_eight():
    model = small_model(eval_times=2)
    images = torch.randint(4, (1, 3, 1, 1), dtype=torch.uint8).repeat(400, 1, 1, 1)
    with torch.no_grad():
        one = model.score(images, num_importance_samples=1)
        many = model.score(images)
    assert 6 < (one.var() / many.var()) < 11
    assert abs(one.mean() - many.mean()) < 4 * one.std() / math.sqrt(400)


def test_skipped_noise_advances_the_generator_like_a_bound():
    model = small_model()
    images = torch.randint(4, (5, 3, 1, 1), dtype=torch.uint8)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    model.log_prob(images, generators[0])
    model.draw_noise(images, generators[1])
    assert torch.equal(*(generator.get_state() for generator in generators))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samples_follow_a_known_distribution(sampler):
    model = four_images(sampler=sampler, sampling_steps=200, eval_times=1)
    samples, _ = model.sample(2000, generator=torch.Generator().manual_seed(0))
    distances = (samples[:, None].int() - model.images).abs()
    # The next value has probability 0.0013 given z_0.
    matches = (distances <= 1).flatten(2).all(2)
    assert matches.any(1).all() and (distances.flatten(2).sum(2) == 0).any(1).double().mean() > 0.95
    assert torch.allclose(
        matches.double().mean(0), model.log_probabilities.exp(), atol=0.04, rtol=0
    )


def test_latents_of_a_known_distribution_are_normal_and_decode_to_its_images():
    model = four_images(sampling_steps=500)
    indices = torch.multinomial(model.log_probabilities.exp(), 500, replacement=True)
    images = model.images[indices]
    latent = model.encode(images, torch.Generator().manual_seed(0))
    assert torch.allclose(latent.mean(0), torch.zeros(4).double(), atol=0.2)
    assert torch.allclose(latent.std(0), torch.ones(4).double(), atol=0.2)
    assert (model.decode(latent) == images).flatten(1).all(1).double().mean() > 0.95


def test_temperature_zero_is_deterministic():
    model = small_model()
    for sampler in ("ddpm", "ddim"):
        model.sampler = sampler
        samples = [model.sample(3, 0.0, torch.Generator().manual_seed(seed))[0] for seed in (0, 1)]
        assert torch.equal(samples[0], samples[1]) and (samples[0] == samples[0][:1]).all()


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_the_schedule_starts_at_a_sixth_of_a_pixel_value_and_ends_near_noise(bits):
    model = build_model("diffusion", bits=bits)
    alpha, sigma = model.alpha_sigma(torch.tensor([0.0, 1.0]))
    values = model.pixel_values(torch.arange(2**bits).double())
    assert values[0] == -values[-1] == 2.0**-bits - 1
    assert abs((values[1] - values[0]) * alpha[0] / sigma[0] - 6.04) < 0.01
    assert abs((sigma[1] / alpha[1]).square().log() - 5) < 1e-5
    assert torch.allclose(alpha.square() + sigma.square(), torch.ones(2, 1, 1, 1))


def test_pixel_values_given_z_0_have_a_normalized_probability():
    model = build_model("diffusion", bits=8, image_shape=(1, 16, 16)).double()
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    model.initialize(images)
    noise = 3 * torch.randn(1, 1, 16, 16, dtype=torch.double)
    alpha, sigma = model.alpha_sigma(torch.zeros(1, dtype=torch.double))
    z = alpha * model.pixel_values(images.double()) + sigma * noise
    distance = z[..., None] / alpha - model.pixel_values(torch.arange(256).double())
    logits = model.log_frequencies[0] - (distance * alpha / sigma).square() / 2
    expected = -logits.log_softmax(-1).gather(-1, images.long()[..., None])[..., 0]
    assert torch.allclose(model._reconstruction_loss(images, noise), expected, atol=1e-8)


def test_times_are_spread_over_the_whole_batch_of_several_processes():
    images = torch.randint(4, (8, 3, 1, 1), dtype=torch.uint8)
    model = small_model().train()
    losses = []
    for parts in (1, 2):
        for rank in range(parts):
            part = small_model().train()
            part.load_state_dict(model.state_dict())
            shard_batches(part, rank, parts)
            torch.manual_seed(0)
            losses.append(part(images.chunk(parts)[rank]).item())
    assert abs(losses[0] - (losses[1] + losses[2]) / 2) < 1e-5
    times = stratified_times((1000,))
    assert torch.equal((1000 * times).floor(), torch.arange(1000.0))


def test_training_learns_how_pixels_depend_on_each_other():
    """The second pixel equals the first one. The frequencies alone cost 2 bits per pixel."""
    model = build_model("diffusion", image_shape=(2, 1, 1), bits=2, width=8, eval_times=64)

    def batch(step: int) -> tuple[torch.Tensor]:
        return (torch.randint(4, (128, 1, 1, 1)).expand(-1, 2, -1, -1).to(torch.uint8),)

    model.initialize(*batch(0))
    fit(model, batch, steps=150, lr=1e-2, decay=0.5)
    assert 1 < model.evaluate([batch(step)[0] for step in range(8)])["bits_per_dim"].value < 1.4


@pytest.mark.parametrize("size", [(2, 1, 1), (1, 28, 28), (3, 64, 64), (3, 6, 9), (1, 7, 5)])
def test_every_image_size_fits(size):
    model = build_model("diffusion", image_shape=size, sampling_steps=1, eval_times=1)
    images = torch.randint(32, (2, *size), dtype=torch.uint8)
    model.initialize(images)
    model(images).backward()
    assert model.sample(2)[0].shape == (2, *size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps must be a whole number"),
        ({"sampling_steps": 0}, "sampling_steps must be a whole number"),
        ({"eval_times": 0}, "eval_times must be a whole number"),
        ({"sampler": "euler"}, "sampler must be one of ddpm, ddim"),
        ({"marginals": "yes"}, "marginals must be one of True, False"),
        ({"num_heads": 3}, "num_heads=3 does not divide"),
        ({"levels": 4}, "choose fewer levels"),
    ],
)
def test_invalid_arguments_are_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        build_model("diffusion", **changes)


def test_commands_use_a_diffusion_model(command, images, tmp_path):
    run = tmp_path / "run"
    overrides = [
        *[override for override in SMALL if "steps_per_level" not in override],
        "model=diffusion",
        "model.sampling_steps=3",
        "model.eval_times=2",
        f"data.root={images}",
        "trainer.steps=2",
    ]
    outcome = command("train", *overrides, f"output_dir={run}")
    assert outcome[0] == 0, outcome
    first, second = images / "000.png", images / "001.png"
    for words in (
        ("evaluate", "num_importance_samples=2"),
        ("score", first),
        ("sample", "--count", 2),
        ("interpolate", first, second, "--steps", 3),
    ):
        status, output, error = command(*words, "--run", run)
        assert status == 0, error
        assert words[0] != "evaluate" or "<= " in output
        assert words[0] != "interpolate" or "does not reconstruct images exactly" in error
    status, _, error = command("export", run, tmp_path / "model.safetensors")
    assert status == 0, error
    _, _, error = command("complete", first, "--known", "left", "--run", run)
    assert "is not a run of a model that fills in missing pixels" in error
