"""VQ-VAE: quantizers, gradients, the prior, samples and the bound agree with their formulas."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from conftest import fit
from test_models import build_model

from flowgen.models.base import EvalConfig
from flowgen.models.vqvae import (
    DEAD_USAGE,
    EMA_DECAY,
    FSQ,
    VQVAE,
    CodePrior,
    EMACodebook,
    straight_through,
)

QUANTIZERS = {
    "fsq": {"fsq_levels": [3, 2]},
    "vq": {"quantizer": "vq", "codebook_size": 6, "code_dim": 3},
}


def random_images(count: int, shape: tuple[int, ...] = (1, 4, 4), bits: int = 2) -> torch.Tensor:
    return torch.randint(2**bits, (count, *shape), dtype=torch.uint8)


def tiny_model(quantizer: str, **changes: object) -> VQVAE:
    """A model of images of 1x4x4 pixels with four codes each, with perturbed parameters."""
    arguments = {"image_shape": (1, 4, 4), "bits": 2, "patch": 2, "num_layers": 1}
    model = build_model("vqvae", **arguments | QUANTIZERS[quantizer] | changes)
    model.initialize(random_images(64, model.image_shape, model.bits))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=QUANTIZERS)
def model(request: pytest.FixtureRequest) -> VQVAE:
    return tiny_model(request.param)


def every_code(levels: Sequence[int]) -> torch.Tensor:
    """All codes with these numbers of levels, (codes, digits)."""
    return torch.tensor(list(itertools.product(*map(range, levels))))


def every_sequence(model: VQVAE) -> torch.Tensor:
    """All sequences of codes, (sequences, patches, digits)."""
    codes = every_code(model.quantizer.levels)
    patches = math.prod(model.grid)
    indices = torch.tensor(list(itertools.product(range(len(codes)), repeat=patches)))
    return codes[indices]


# Quantizers


@pytest.mark.parametrize("levels", [[2], [3, 2], [8, 5, 5]])
def test_fsq_rounds_to_the_nearest_code_and_outputs_of_the_encoder_reach_every_code(levels):
    quantizer = FSQ(levels)
    vectors = quantizer.vectors(every_code(levels))
    assert vectors.abs().max() == 1 and len(vectors.unique(dim=0)) == len(vectors)
    assert torch.equal(quantizer.codes(vectors), every_code(levels))
    z = quantizer.bound(2 * torch.randn(20_000, len(levels), dtype=torch.double))
    codes = quantizer.codes(z)
    assert torch.equal(codes.unique(dim=0), every_code(levels))
    distance = (z - quantizer.vectors(codes)).norm(dim=1)
    assert torch.allclose(distance, torch.cdist(z, vectors.double()).amin(1), atol=1e-5)
    outside = quantizer.codes(torch.full((1, len(levels)), 7.0))
    assert torch.equal(quantizer.vectors(outside), torch.ones(1, len(levels)))


def test_a_codebook_returns_the_nearest_vector():
    codebook = EMACodebook(8, 3).double()
    z = torch.randn(50, 3, dtype=torch.double)
    codebook.initialize(z)
    vectors = codebook.vectors(torch.arange(8)[:, None])
    assert torch.cdist(vectors, z).amin(1).max() < 1e-5
    distance = (z - codebook.vectors(codebook.codes(z))).norm(dim=1)
    assert torch.allclose(distance, torch.cdist(z, vectors).amin(1), atol=1e-5)


def test_the_codebook_is_the_moving_average_of_the_vectors_near_each_code():
    """N_k <- r N_k + (1 - r) n_k and m_k alike; e_k = m_k / N_k (1711.00937, appendix A.1)."""
    codebook = EMACodebook(4, 2).double()
    start = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]], dtype=torch.double)
    codebook.sums.copy_(start / 4)
    counts = torch.full((4,), 25.0, dtype=torch.double)
    sums = 25 * start
    for _ in range(3):
        z = torch.randn(100, 2, dtype=torch.double)
        codes = torch.cdist(z, sums / counts[:, None]).argmin(1)
        codebook.update(z)
        for code in range(4):
            near = z[codes == code]
            counts[code] = EMA_DECAY * counts[code] + (1 - EMA_DECAY) * len(near)
            sums[code] = EMA_DECAY * sums[code] + (1 - EMA_DECAY) * near.sum(0)
    vectors = codebook.vectors(torch.arange(4)[:, None])
    assert torch.allclose(vectors, sums / counts[:, None], atol=1e-12)
    assert not torch.allclose(vectors, start, atol=1e-3)


def test_a_codebook_computes_in_full_precision_under_autocast():
    codebooks = [EMACodebook(32, 4), EMACodebook(32, 4)]
    codebooks[1].load_state_dict(codebooks[0].state_dict())
    z = 0.1 * torch.randn(1000, 4) + 1
    codebooks[0].update(z)
    with torch.autocast("cpu", torch.bfloat16):
        codebooks[1].update(z)
    assert torch.equal(codebooks[0].sums, codebooks[1].sums)


def test_codes_that_are_hardly_used_restart_at_outputs_of_the_encoder():
    codebook = EMACodebook(4, 2)
    z = torch.randn(100, 2)
    codebook.initialize(z)
    codebook.usage[1] = 0.9 * DEAD_USAGE / 4
    codebook.sums[1] = 100.0  # far away
    before = codebook.vectors(torch.arange(4)[:, None])
    codebook.update(z)
    after = codebook.vectors(torch.arange(4)[:, None])
    assert torch.cdist(after[1:2], z).min() < 1e-5
    assert codebook.usage[1] == 0.25
    others = [0, 2, 3]
    assert 0 < (after[others] - before[others]).abs().max() < 0.2


def test_unused_codes_wait_while_all_outputs_are_near_to_a_code():
    codebook = EMACodebook(4, 2)
    z = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).repeat(50, 1)
    codebook.sums.copy_(torch.tensor([[9.0, 9.0], [9.0, -9.0], [-1.0, 0.0], [1.0, 0.0]]) / 4)
    for _ in range(400):
        noisy = z + 0.01 * torch.randn_like(z)
        codebook.update(noisy)
        assert torch.equal(codebook.codes(noisy)[:, 0], torch.tensor([2, 3]).repeat(50))
    assert torch.allclose(codebook.vectors(torch.tensor([[0], [1]])).abs(), torch.tensor(9.0))
    assert codebook.usage.min() > 0.9 * DEAD_USAGE / 4
    for _ in range(10):
        codebook.update(torch.cat((z, torch.tensor([[0.0, 1.0]]).repeat(100, 1))))
    assert codebook.codes(torch.tensor([[0.0, 1.0]])).item() < 2


def test_evaluation_does_not_change_the_codebook():
    model = tiny_model("vq")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()(random_images(8))
    model.evaluate([random_images(8)])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.train()(random_images(8))
    assert not torch.equal(model.quantizer.usage, before["quantizer.usage"])
    assert 1 <= model.diagnostics()["code_perplexity"] <= 6


# Gradients


def test_straight_through_returns_the_vectors_exactly_and_passes_the_gradient_to_z():
    z = torch.randn(100, requires_grad=True)
    vectors = torch.randn(100)
    output = straight_through(z, vectors)
    assert torch.equal(output, vectors)
    weights = torch.randn(100)
    (output * weights).sum().backward()
    assert torch.equal(z.grad, weights)


def test_the_loss_trains_all_networks_but_the_prior_does_not_reach_the_encoder(model):
    images = random_images(8)
    model(images).backward()
    for part in (model.encoder, model.decoder, model.prior):
        assert all(parameter.grad.any() for parameter in part.parameters())
    model.zero_grad()
    codes = model.quantizer.codes(model.encode_patches(images))
    model.prior.log_prob(codes).sum().backward()
    assert model.prior.transformer.embed.weight.grad.any()
    for part in (model.encoder, model.decoder):
        assert all(parameter.grad is None for parameter in part.parameters())


def test_the_loss_is_the_bound_and_with_a_codebook_the_commitment_cost():
    images = random_images(8)
    model = tiny_model("fsq").eval()
    assert torch.allclose(model(images), model.bits_per_dim(model.log_prob(images)).mean())
    model = tiny_model("vq", commitment_cost=0.5).eval()
    z = model.encode_patches(images)
    distance = (z - model.quantizer.vectors(model.quantizer.codes(z))).square().sum((1, 2))
    expected = model.bits_per_dim(model.log_prob(images) - 0.5 * distance).mean()
    assert torch.allclose(model(images), expected)


# Likelihood


@torch.no_grad()
def test_the_prior_is_normalized_over_all_sequences_of_codes(model):
    codes = every_sequence(model)
    assert len(codes) == 6**4
    log_prob = model.double().prior.log_prob(codes)
    assert log_prob.logsumexp(0).abs() < 1e-10
    assert log_prob.std() > 0.1


@torch.no_grad()
def test_the_bound_is_one_term_of_the_sum_over_every_sequence(model):
    """P(x) = sum_c p(c) P(x | c) >= p(c) P(x | c) for the codes c of the encoder."""
    model = model.double().eval()
    codes = every_sequence(model)
    log_prior = model.prior.log_prob(codes)
    vectors = model.quantizer.vectors(codes)
    for image in random_images(3):
        pixels = model.pixel_distribution(vectors).log_prob(image.expand(len(codes), -1, -1, -1))
        terms = log_prior + pixels.sum((1, 2, 3))
        bound = model.log_prob(image[None]).item()
        assert (terms - bound).abs().min() < 1e-9
        assert bound < terms.logsumexp(0)


def test_evaluation_splits_the_bound_into_pixels_and_codes(model):
    images = random_images(40)
    metrics = model.eval().evaluate(images.split(16))
    total = metrics["bits_per_dim"].value
    parts = metrics["pixel_bits_per_dim"].value + metrics["code_bits_per_dim"].value
    assert total == pytest.approx(parts, abs=1e-6)
    uniform = 4 * math.log2(6) / 16
    assert metrics["uniform_code_bits_per_dim"].value == pytest.approx(uniform)
    codes = model.quantizer.codes(model.encode_patches(images)).flatten(0, 1)
    counts = Counter(map(tuple, codes.tolist()))
    perplexity = math.prod((160 / count) ** (count / 160) for count in counts.values())
    assert metrics["code_perplexity"].value == pytest.approx(perplexity)
    many = model.evaluate(images.split(16), eval_config=EvalConfig(num_importance_samples=8))
    assert many == metrics


def test_at_the_start_the_prior_is_uniform():
    model = build_model("vqvae", image_shape=(1, 8, 8))
    images = random_images(64, (1, 8, 8), bits=5)
    model.initialize(images)
    metrics = model.evaluate([images])
    uniform = metrics["uniform_code_bits_per_dim"].value
    assert metrics["code_bits_per_dim"].value == pytest.approx(uniform)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_two_equally_likely_images_cost_one_bit(quantizer):
    model = build_model("vqvae", image_shape=(1, 4, 4), bits=1, **QUANTIZERS[quantizer])
    pair = random_images(2, bits=1)
    batch = pair.repeat(8, 1, 1, 1)
    model.initialize(batch)
    fit(model, lambda _: (batch,), steps=160, lr=2e-2, decay=0.5)
    bits = 16 * model.evaluate([pair])["bits_per_dim"].value
    assert 1 <= bits < 1.1


@torch.no_grad()
def test_classes_condition_the_prior():
    model = tiny_model("fsq", num_classes=3).double().eval()
    images = random_images(5)
    per_class = torch.stack(
        [model.log_prob(images, labels=torch.full((5,), label)) for label in range(3)], 1
    )
    assert per_class.std(1).min() > 1e-3
    assert torch.allclose(model.log_prob(images), per_class.logsumexp(1) - math.log(3))
    assert torch.allclose(model.classify(images), per_class.log_softmax(1))
    labels = torch.tensor([2, 0, 1, 1, 0])
    expected = model.bits_per_dim(per_class[range(5), labels]).mean()
    assert torch.allclose(model(images, labels), expected)
    samples, log_prob = model.sample(4, label=1, generator=torch.Generator().manual_seed(0))
    again, _ = model.sample(4, generator=torch.Generator().manual_seed(0), start_index=1)
    assert torch.equal(samples[:1], again[:1]) and log_prob.isfinite().all()
    assert model.class_latents().shape == (3, 4 * model.quantizer.dim)


# Samples and latents


@torch.no_grad()
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_samples_follow_the_model(quantizer):
    """Images of two binary pixels: P(x) = sum_c p(c) P(x | c)."""
    model = tiny_model(quantizer, image_shape=(1, 1, 2), bits=1, patch=1).eval()
    codes = every_sequence(model)
    log_prior = model.prior.log_prob(codes)
    pixels = model.pixel_distribution(model.quantizer.vectors(codes))
    samples, log_prob = model.sample(20_000, generator=torch.Generator().manual_seed(0))
    for values in itertools.product((0, 1), repeat=2):
        wanted = torch.tensor(values, dtype=torch.uint8).view(1, 1, 1, 2)
        log_joint = log_prior + pixels.log_prob(wanted.expand(36, -1, -1, -1)).sum((1, 2, 3))
        share = (samples == wanted).all((1, 2, 3)).double().mean().item()
        assert share == pytest.approx(log_joint.exp().sum().item(), abs=0.015)
        scores = log_prob[(samples == wanted).all((1, 2, 3))]
        assert (scores[:, None] - log_joint).abs().amin(1).max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_temperature_is_the_power_of_the_probability_of_each_digit(temperature):
    prior = CodePrior(1, [3, 2], width=8, num_heads=2, num_layers=1)
    for parameter in prior.parameters():
        parameter += 0.5 * torch.randn_like(parameter)
    samples, _ = prior.sample(20_000, temperature)
    joint = prior.log_prob(every_code([3, 2])[:, None]).view(3, 2)
    first = (joint.logsumexp(1) / temperature).softmax(0)
    second = (joint / temperature).softmax(1)
    index = 2 * samples[:, 0, 0] + samples[:, 0, 1]
    shares = index.bincount(minlength=6) / len(index)
    assert (shares - (first[:, None] * second).flatten()).abs().max() < 0.015


def test_decoding_latents_quantizes_them(model):
    images = random_images(8)
    latent = model.encode(images)
    assert latent.shape == (8, 4 * model.quantizer.dim)
    codes = model.quantizer.codes(model.encode_patches(images))
    quantized = model.quantizer.vectors(codes).flatten(1)
    assert not torch.allclose(latent, quantized)
    assert torch.equal(model.decode(latent), model.decode(quantized))


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((2, 1, 1), (1, 1)),
        ((1, 28, 28), (7, 7)),
        ((3, 32, 32), (8, 8)),
        ((3, 64, 64), (16, 16)),
        ((3, 12, 20), (3, 5)),
        ((1, 7, 6), (7, 6)),
    ],
)
def test_images_of_all_sizes_have_one_code_per_patch(shape, grid):
    model = build_model("vqvae", image_shape=shape, bits=8)
    images = random_images(4, shape, bits=8)
    model.initialize(images)
    model(images).backward()
    assert model.grid == grid
    assert model.decode(model.encode(images)).shape == images.shape
    assert torch.isfinite(model.eval().score(images)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizer": "gumbel"}, "quantizer must be one of fsq, vq"),
        ({"fsq_levels": []}, "fsq_levels must be a list"),
        ({"fsq_levels": 8}, "fsq_levels must be a list"),
        ({"fsq_levels": [8, 1]}, "fsq_levels must be a whole number"),
        ({"codebook_size": 1}, "codebook_size must be a whole number"),
        ({"commitment_cost": -1.0}, "commitment_cost must be"),
        ({"patch": 3}, "patch=3 does not divide"),
        ({"num_heads": 3}, "is not a multiple of num_heads=3"),
        ({"prior_layers": 0}, "prior_layers must be a whole number"),
    ],
)
def test_arguments_are_checked(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        build_model("vqvae", **changes)
    assert len(str(error.value).splitlines()) == 1
