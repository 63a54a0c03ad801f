"""Variational autoencoder: terms of the bound, posteriors, priors, decoders and the loss."""

import math

import pytest
import torch
from conftest import fit
from torch import Tensor
from torch import distributions as td

from flowgen.bijections.base import standard_normal_log_prob
from flowgen.models.base import EvalConfig
from flowgen.models.vae.latents import POSTERIORS, PRIORS, Encoding, make_posterior, make_prior
from flowgen.models.vae.vae import VAE
from flowgen.utils.errors import UserError

SIZE = (1, 1, 2)
IMAGES = torch.cartesian_prod(*[torch.arange(4, dtype=torch.uint8)] * 2).view(16, *SIZE)


def perturb(module: torch.nn.Module, scale: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn_like(parameter)


def tiny(scale: float = 0.1, **settings: object) -> VAE:
    """Return a VAE of images with two pixels of two bits, away from its initial parameters."""
    settings = {"latent_dim": 1, "width": 8, "num_components": 2, "num_transforms": 2} | settings
    model = VAE(image_shape=SIZE, bits=2, num_pseudo_inputs=3, **settings)
    model.initialize(IMAGES)
    perturb(model, scale)
    with torch.no_grad():
        model.encoder.layers[-1].weight.mul_(0.2)  # keep the posterior close to the prior
    return model.double().eval()


def random_encoding(count: int, latent_dim: int = 3, context: int = 4) -> Encoding:
    sizes = (latent_dim, latent_dim, context)
    return Encoding(*(0.5 * torch.randn(count, size, dtype=torch.double) for size in sizes))


def latent_grid(latent_dim: int) -> tuple[Tensor, float]:
    """Return points (points, latent_dim) that cover the prior, and the volume of each."""
    axis = torch.linspace(-8, 8, 801 if latent_dim == 1 else 101, dtype=torch.double)
    points = torch.cartesian_prod(*[axis] * latent_dim).view(-1, latent_dim)
    return points, (axis[1] - axis[0]).item() ** latent_dim


@torch.no_grad()
def exact_log_prob(model: VAE) -> Tensor:
    """Return log P(x) of `IMAGES` by integration over the latents."""
    z, volume = latent_grid(model.latent_dim)
    log_prior = model.prior.log_prob(z, model._encode) + math.log(volume)
    features = model.decoder(z)
    log_probs = []
    for image in IMAGES:
        images = image.expand(len(z), -1, -1, -1)
        log_p = model._mixture(features, images).log_prob(images).flatten(1).sum(1)
        log_probs.append((log_p + log_prior).logsumexp(0))
    return torch.stack(log_probs)


@pytest.mark.parametrize(
    "settings",
    [
        *({"posterior": name} for name in POSTERIORS),
        *({"prior": name, "latent_dim": 2} for name in PRIORS),
        {"decoder": "pixelcnn", "pixelcnn_layers": 1},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_bound_converges_to_the_exact_log_probability(settings):
    model = tiny(**settings)
    exact = exact_log_prob(model)
    assert exact.exp().sum().item() == pytest.approx(1, abs=1e-4)
    generator = torch.Generator().manual_seed(0)
    bounds = [
        model.score(
            IMAGES.repeat(20, 1, 1, 1), num_importance_samples=samples, generator=generator
        ).view(20, 16)
        for samples in (1, 8, 64)
    ]
    gaps = [(exact - bound.mean(0)).mean().item() for bound in bounds]
    assert gaps[0] > gaps[2] - 2e-3
    errors = bounds[2].std(0) / math.sqrt(20)
    assert ((bounds[2].mean(0) - exact).abs() < 5 * errors + 5e-3).all()


def test_the_kl_divergence_agrees_with_torch_and_with_draws():
    encoding = random_encoding(5)
    posterior = td.Normal(encoding.mean, encoding.log_std.exp())
    expected = td.kl_divergence(posterior, td.Normal(torch.zeros(()).double(), 1.0))
    assert torch.allclose(encoding.kl_from_standard_normal(), expected)
    many = encoding.repeat(20_000)
    gaussian = make_posterior("gaussian", 3, 0, 8, 4)
    z, log_q = gaussian(many, torch.randn_like(many.mean))
    assert torch.allclose(
        log_q, td.Normal(many.mean, many.log_std.exp()).log_prob(z).sum(1), atol=1e-9
    )
    drawn = (log_q - standard_normal_log_prob(z)).view(5, -1)
    error = drawn.std(1) / math.sqrt(drawn.shape[1])
    assert ((drawn.mean(1) - expected.sum(1)).abs() < 5 * error).all()


@pytest.mark.parametrize("name", POSTERIORS)
def test_the_density_of_a_posterior_agrees_with_autograd(name):
    posterior = make_posterior(name, 3, 2, 8, 4).double()
    encoding = random_encoding(1)
    noise = torch.randn(1, 3, dtype=torch.double)
    start, _ = posterior(encoding, noise)
    # Flows start as the identity, up to the order of the latents.
    gaussian = encoding.mean + encoding.log_std.exp() * noise
    assert torch.allclose(start.sort().values, gaussian.sort().values)
    perturb(posterior, 0.3)
    _, log_q = posterior(encoding, noise)
    jacobian = torch.autograd.functional.jacobian(
        lambda eps: posterior(encoding, eps[None])[0][0], noise[0]
    )
    expected = standard_normal_log_prob(noise) - torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(log_q, expected)
    if name != "gaussian":
        other = encoding._replace(context=encoding.context + 1)
        assert not torch.allclose(posterior(other, noise)[0], posterior(encoding, noise)[0])


def test_the_vamp_prior_is_the_mixture_of_the_posteriors_of_its_pseudo_inputs():
    prior = make_prior("vamp", 2, 0, 8, 5, (1, 2, 2))
    images = torch.rand(3, 1, 2, 2)
    with torch.no_grad():
        prior.initialize(images)
    assert torch.allclose(prior.pseudo_inputs[:3], images, atol=0.1)
    assert torch.allclose(prior.pseudo_inputs[3:], images[:2], atol=0.1)

    def encode(inputs: Tensor) -> Encoding:
        x = inputs.flatten(1)
        return Encoding(x[:, :2] * 3, x[:, 2:] - 1, x[:, :0])

    components = encode(prior.pseudo_inputs)
    mixture = td.MixtureSameFamily(
        td.Categorical(logits=torch.zeros(5)),
        td.Independent(td.Normal(components.mean, components.log_std.exp()), 1),
    )
    z = torch.randn(7, 2)
    assert torch.allclose(prior.log_prob(z, encode), mixture.log_prob(z), atol=1e-5)
    with torch.no_grad():
        sample = prior.sample(torch.randn(20_000, 2), encode, torch.Generator().manual_seed(0))
    error = 5 * sample.std(0) / math.sqrt(len(sample))
    assert ((sample.mean(0) - mixture.mean).abs() < error).all()
    assert torch.allclose(sample.var(0), mixture.variance, rtol=0.1)


def test_the_density_of_a_flow_prior_agrees_with_its_samples():
    prior = make_prior("flow", 5, 4, 8, 1, (1, 2, 2)).double()
    perturb(prior, 0.2)
    noise = torch.randn(1, 5, dtype=torch.double)
    z = prior.sample(noise, lambda images: random_encoding(1))
    jacobian = torch.autograd.functional.jacobian(lambda eps: prior.flow.inverse(eps)[0], noise)
    expected = standard_normal_log_prob(noise) - torch.linalg.slogdet(jacobian.view(5, 5)).logabsdet
    assert torch.allclose(prior.log_prob(z, lambda images: random_encoding(1)), expected)


def loss_with_noise(model: VAE, images: Tensor) -> Tensor:
    torch.manual_seed(7)
    return model(images)


@torch.no_grad()
def test_the_loss_is_the_bound_with_as_many_samples_as_in_training():
    images = IMAGES[:8]
    for samples in (1, 4):
        model = tiny(train_importance_samples=samples, prior="vamp").train()
        loss = loss_with_noise(model, images)
        torch.manual_seed(7)
        noise = torch.randn(8, samples, 1, dtype=torch.double)
        terms = model._terms(images, model._encode(model._scale(images)), noise)
        assert terms.kl.shape == (8, samples)
        bound = (terms.reconstruction - terms.kl).logsumexp(1) - math.log(samples)
        assert torch.allclose(loss, -bound.mean() / (2 * math.log(2)))
        assert model.loss_metric == (model.metric if samples == 1 else None)


@torch.no_grad()
def test_beta_and_warmup_weight_the_kl_divergence():
    model = tiny(beta=2.0, warmup_images=40).train()
    kl = model._encode(model._scale(IMAGES)).kl_from_standard_normal().sum(1).mean()
    losses = [loss_with_noise(model, IMAGES) for _ in range(5)]
    per_nat = 2 * math.log(2)
    for index, weight in enumerate((0, 0.8, 1.6, 2, 2)):
        assert torch.allclose(losses[index] - losses[0], weight * kl / per_nat)
    assert model.images_seen == 80 and model.loss_metric is None
    loss_with_noise(model.eval(), IMAGES)
    assert model.images_seen == 80


@pytest.mark.parametrize("prior", ["standard", "vamp"])
def test_free_bits_bound_the_cost_of_the_kl_divergence_and_its_gradient(prior):
    """They apply to each latent if posterior and prior are Gaussian, else to their sum."""
    model = tiny(prior=prior, latent_dim=3)
    kls = torch.tensor([[0.0, 1.0, 5.0], [0.2, 2.0, 1.0]], dtype=torch.double, requires_grad=True)
    model.free_bits = 0.5
    if prior == "vamp":
        total = kls.sum(1, keepdim=True)
        assert model._with_free_bits(total).item() == pytest.approx(4.6)
        model.free_bits = 2.0
        bounded = model._with_free_bits(total)
        assert bounded.item() == pytest.approx(6.0)
    else:
        bounded = model._with_free_bits(kls)
        assert bounded.item() == pytest.approx(0.5 + 1.5 + 3.0)
        bounded.backward()
        assert torch.equal(kls.grad, torch.tensor([[0, 0.5, 0.5]] * 2, dtype=torch.double))
    assert model(IMAGES).isfinite()


@torch.no_grad()
def test_evaluation_reports_the_terms_of_the_bound():
    model = tiny()
    metrics = model.evaluate([IMAGES], eval_config=EvalConfig(num_importance_samples=50))
    kl = model._encode(model._scale(IMAGES)).kl_from_standard_normal().sum(1).mean().item()
    assert metrics["kl"].value == pytest.approx(kl, abs=0.1)
    elbo = metrics["reconstruction"].value - metrics["kl"].value
    assert -metrics["bits_per_dim"].value * 2 * math.log(2) > elbo
    one = model.evaluate([IMAGES])
    assert -one["bits_per_dim"].value * 2 * math.log(2) == pytest.approx(
        one["reconstruction"].value - one["kl"].value
    )


@torch.no_grad()
def test_active_units_count_the_latents_that_depend_on_the_image():
    model = tiny(latent_dim=4)
    last = model.encoder.layers[-1]
    last.weight.zero_()
    assert model.evaluate([IMAGES])["active_units"].value == 0
    last.bias.zero_()
    collapsed = model.evaluate([IMAGES])
    assert collapsed["kl"].value == pytest.approx(0, abs=1e-9)
    last.weight[:2].normal_()  # the means come first
    assert model.evaluate([IMAGES])["active_units"].value == 2


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 9), (15, 28), (30, 20)])
def test_images_of_all_sizes(size):
    model = VAE(image_shape=(2, *size), bits=3, width=4, latent_dim=3)
    images = torch.randint(8, (4, 2, *size), dtype=torch.uint8)
    model.initialize(images)
    model(images).backward()
    assert model.sample(2)[0].shape == (2, 2, *size)
    assert model.decode(model.encode(images)).shape == images.shape


@torch.no_grad()
def test_samples_of_a_pixelcnn_decoder_equal_those_drawn_pixel_by_pixel():
    model = VAE(image_shape=(2, 3, 4), bits=3, width=8, latent_dim=2, decoder="pixelcnn")
    model.initialize(torch.randint(8, (64, 2, 3, 4), dtype=torch.uint8))
    perturb(model, 0.3)
    z = torch.randn(5, 2)
    u = torch.rand(5, 2, 3, 4)
    images = torch.zeros(5, 2, 3, 4, dtype=torch.uint8)
    features = model.decoder(z)
    for row in range(3):
        for column in range(4):
            drawn = model._mixture(features, images).quantile(u)
            images[:, :, row, column] = drawn[:, :, row, column]
    assert len(images.unique()) > 4 and torch.equal(model._decode(z, u), images)


@torch.no_grad()
def test_samples_follow_the_model():
    model = tiny(prior="vamp", scale=0.3)
    expected = exact_log_prob(model).exp()
    images, scores = model.sample(20_000, generator=torch.Generator().manual_seed(0))
    values = (images.flatten(1).long() * torch.tensor([4, 1])).sum(1)
    frequency = torch.bincount(values, minlength=16) / len(values)
    error = (expected * (1 - expected) / len(values)).sqrt()
    assert ((frequency - expected).abs() < 5 * error + 1e-9).all()
    assert scores.isfinite().all()


@torch.no_grad()
def test_encode_returns_the_posterior_mean_or_a_draw():
    model = tiny()
    encoding = model._encode(model._scale(IMAGES))
    assert torch.equal(model.encode(IMAGES), encoding.mean)
    images = IMAGES[:1].repeat(20_000, 1, 1, 1)
    draws = model.encode(images, torch.Generator().manual_seed(0))
    assert draws.mean().item() == pytest.approx(encoding.mean[0].item(), abs=0.05)
    assert draws.std().item() == pytest.approx(encoding.log_std[0].exp().item(), rel=0.05)


def test_training_finds_that_all_images_are_one_of_two():
    """Their entropy is one bit per image; independent pixels would cost one bit each."""
    torch.manual_seed(0)
    pattern = torch.randint(2, (1, 1, 4, 4), dtype=torch.uint8)
    images = torch.cat((pattern, 1 - pattern)).repeat(16, 1, 1, 1)
    model = VAE(image_shape=(1, 4, 4), bits=1, width=8, latent_dim=1)
    model.initialize(images)
    fit(model, lambda _: (images,), steps=150, lr=1e-2)
    metrics = model.evaluate([images])
    assert 1 < 16 * metrics["bits_per_dim"].value < 3
    assert metrics["active_units"].value == 1
    assert torch.equal(model.decode(model.encode(images)), images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"posterior": "maf"}, "posterior must be one of gaussian, planar, sylvester, iaf"),
        ({"prior": "normal"}, "prior must be one of standard, vamp, flow"),
        ({"decoder": "mlp"}, "decoder must be one of factorized, pixelcnn"),
        ({"latent_dim": 0}, "latent_dim must be a whole number of at least 1"),
        ({"beta": -1.0}, "beta must be a number of at least 0"),
        ({"warmup_images": 0.5}, "warmup_images must be a whole number"),
        ({"prior": "flow", "latent_dim": 1}, "prior=flow needs latent_dim of at least 2"),
        ({"free_bits": 0.1, "train_importance_samples": 2}, "free_bits needs the KL divergence"),
    ],
)
def test_invalid_arguments_are_rejected(settings, message):
    with pytest.raises(UserError, match=message):
        VAE(image_shape=(1, 4, 4), **settings)
