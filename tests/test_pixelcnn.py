"""PixelCNN: causality, exact latents and samples, inpainting, and conditional log-probabilities."""

import math

import pytest
import torch
from enumeration import all_images
from torch import Tensor

from flowgen.models.base import ClassConditional, LinearMeasurement
from flowgen.models.categorical import Categorical, draw_values
from flowgen.models.pixelcnn.networks import (
    GatedLayer,
    LinearPrediction,
    MixtureNetwork,
    PixelCNNNetwork,
)
from flowgen.models.pixelcnn.pixelcnn import MetropolisChains, PixelCNN, is_prefix
from flowgen.utils.errors import UserError

TOP = torch.tensor([[[True, True], [False, False]]])
DIAGONAL = torch.tensor([[[False, True], [True, False]]])


def random_model(scale: float = 0.3, **arguments: object) -> PixelCNN:
    """Return a small model in float64 with random parameters."""
    settings = {"image_shape": (1, 2, 2), "bits": 2, "width": 6, "num_layers": 2}
    model = PixelCNN(**settings | arguments).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
        if model.num_classes is not None:  # the distributions of the classes differ clearly
            for layer in model.network.modules():
                if isinstance(layer, GatedLayer):
                    layer.condition.weight *= 3
    return model


@pytest.mark.parametrize("bits", [1, 8])
def test_the_intervals_of_all_values_fill_the_unit_interval(bits):
    bins = 2**bits
    logits = 20 * torch.randn(1, 3 * bins, 2, 2)
    distribution = Categorical(logits.expand(bins, -1, -1, -1), channels=3)
    values = torch.arange(bins, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    low, high = distribution.interval(values)
    assert torch.equal(low[1:], high[:-1])
    assert (low[0] == 0).all() and (high[-1] == 1).all()
    assert torch.allclose(distribution.log_prob(values).double().exp(), high - low, atol=1e-6)
    assert torch.equal(distribution.quantile((low + high) / 2), values)
    assert torch.equal(distribution.quantile(low), values)


def random_images(model: PixelCNN, count: int) -> Tensor:
    return torch.randint(model.bins, (count, *model.image_shape), dtype=torch.uint8)


@torch.no_grad()
def dependencies(network: torch.nn.Module) -> Tensor:
    """Return whether outputs depend on values, (70, outputs), of images of 7x5 with two channels.

    Values and outputs are in raster order and then by channels. The parameters become random.
    """
    network.double()
    for parameter in network.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    images = torch.randint(4, (1, 2, 7, 5), dtype=torch.uint8)
    # Image k has another value k.
    values = images.permute(0, 2, 3, 1).flatten() + torch.eye(70, dtype=torch.uint8)
    changed = (values % 4).view(70, 7, 5, 2).permute(0, 3, 1, 2)
    differs = (network(changed) - network(images)).abs() > 1e-9
    return differs.permute(0, 2, 3, 1).flatten(1)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_network_sees_all_earlier_values_and_no_other(groups):
    network = PixelCNNNetwork(2, bits=2, width=16, num_layers=4, outputs=4, groups=groups)
    depends = dependencies(network).unflatten(1, (-1, 4 // groups)).any(2)
    value = torch.arange(70)[:, None]
    first_seen = torch.arange(70)[None] if groups == 2 else 2 * torch.arange(35)[None]
    assert torch.equal(depends, value < first_seen)


def test_the_linear_prediction_sees_earlier_values_nearby_and_no_other():
    depends = dependencies(LinearPrediction(2, bits=2))
    index = torch.arange(70)
    row, column = index // 10, index % 10 // 2
    near = (row - row[:, None] <= 2) & ((column - column[:, None]).abs() <= 2)
    assert torch.equal(depends, (index[:, None] < index) & near)


def test_the_linear_prediction_is_fitted_by_least_squares():
    """Values of a random walk along the rows are predicted from the pixel to the left."""
    steps = torch.randint(-1, 2, (200, 1, 12, 12))
    walks = (steps.cumsum(3) + 128).to(torch.uint8)
    prediction = LinearPrediction(1, bits=8)
    prediction.fit(walks)
    errors = 255 / 2 * (prediction(walks) - (2 * walks.float() / 255 - 1))
    assert errors[..., 1:].square().mean().item() == pytest.approx(2 / 3, abs=0.03)
    left = torch.tensor([1.0])
    torch.testing.assert_close(prediction.weight[0, 0, 2, 1:2], left, atol=0.05, rtol=0)


def test_mixtures_start_at_the_errors_of_the_linear_prediction():
    """The entropy of the steps is log2 3; the errors of the first column need more bits."""
    walks = (torch.randint(-1, 2, (200, 1, 12, 12)).cumsum(3) + 128).to(torch.uint8)
    model = PixelCNN(image_shape=(1, 12, 12), bits=8, num_components=5, width=4, num_layers=1)
    model.initialize(walks)
    assert isinstance(model.network, MixtureNetwork)
    with torch.no_grad():
        assert model.bits_per_dim(model.log_prob(walks)).mean() < math.log2(3) + 1


@pytest.mark.parametrize("bits", [1, 8])
def test_components_with_equal_means_can_separate(bits):
    """Images without contrast give all components the same initial mean and scale."""
    images = torch.ones(16, 3, 5, 5, dtype=torch.uint8)
    model = PixelCNN(image_shape=(3, 5, 5), bits=bits, num_components=4, width=4, num_layers=1)
    model.initialize(images)
    means = model.conditionals(images, None).means
    assert means.std(2).max() > 0


def test_one_component_starts_with_the_deviation_of_the_errors():
    images = (128 + 20 * torch.randn(50, 1, 8, 8)).to(torch.uint8)
    model = PixelCNN(image_shape=(1, 8, 8), bits=8, num_components=1, width=4, num_layers=1)
    model.initialize(images)
    with torch.no_grad():
        bits_per_dim = model.bits_per_dim(model.log_prob(images)).mean().item()
    entropy = 0.5 * math.log2(2 * math.pi * math.e * 20**2)
    assert entropy < bits_per_dim < entropy + 0.5


def test_every_layer_depends_on_the_condition():
    network = PixelCNNNetwork(1, bits=2, width=6, num_layers=4, outputs=3, cond_channels=4)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randint(4, (2, 1, 5, 6), dtype=torch.uint8)
    condition = torch.randn(2, 4)
    as_map = condition[:, :, None, None].expand(-1, -1, 5, 6)
    assert torch.allclose(network(x, condition), network(x, as_map), atol=1e-6)
    network(x, condition).sum().backward()
    layers = [layer for layer in network.modules() if isinstance(layer, GatedLayer)]
    assert len(layers) == 4
    assert all(layer.condition.weight.grad.abs().min() > 0 for layer in layers)


@pytest.mark.parametrize(
    "arguments",
    [
        {"image_shape": (1, 5, 6), "bits": 3},
        {"image_shape": (3, 3, 4), "bits": 8},
        {"image_shape": (3, 3, 4), "bits": 8, "num_components": 3},
        {"image_shape": (2, 1, 1), "bits": 8},
        {"image_shape": (1, 4, 4), "bits": 1, "num_classes": 3},
    ],
)
def test_latents_restore_all_images_one_by_one(arguments):
    model = random_model(0.5, **arguments).float()
    images = random_images(model, 20)
    for generator in (None, torch.Generator().manual_seed(0)):
        latents = model.encode(images, generator)
        assert torch.equal(model.decode(latents), images)
        one_by_one = [model.decode(latent[None]) for latent in latents]
        assert torch.equal(torch.cat(one_by_one), images)


@pytest.mark.parametrize("num_components", [None, 3])
def test_samples_equal_samples_drawn_value_by_value(num_components):
    model = random_model(0.5, image_shape=(2, 4, 5), bits=4, num_components=num_components)
    z = torch.randn(6, model.dimensions, dtype=torch.float64)
    expected = torch.zeros(6, 2, 4, 5, dtype=torch.uint8)
    u = torch.special.ndtr(z).view(expected.shape)
    for row in range(4):
        for column in range(5):
            for channel in range(2):
                values = model.conditionals(expected, None).quantile(u, expected)
                expected[:, channel, row, column] = values[:, channel, row, column]
    assert torch.equal(model.decode(z), expected)
    assert 2 < model.num_iterations <= 2 * 4 * 5


def test_latents_of_samples_are_standard_normal():
    model = random_model(0.5, image_shape=(1, 3, 3), bits=1)
    images, _ = model.sample(2000, generator=torch.Generator().manual_seed(0))
    latents = model.encode(images, torch.Generator().manual_seed(1))
    assert latents.mean(0).abs().max() < 4 / math.sqrt(2000)
    covariance = latents.T.cov()
    assert (covariance - torch.eye(9)).abs().max() < 4 * math.sqrt(2 / 2000)


def test_samples_have_the_probabilities_of_the_model():
    model = random_model(0.5, image_shape=(1, 1, 3), num_classes=2)
    images = all_images((1, 1, 3), 2)
    for label in range(2):
        labels = torch.full((len(images),), label)
        expected = model.log_prob(images, labels=labels).exp()
        samples, log_prob = model.sample(5000, generator=torch.Generator(), label=label)
        index = (samples.flatten(1).long() * torch.tensor([16, 4, 1])).sum(1)
        assert torch.allclose(log_prob, expected.log()[index])
        shares = torch.bincount(index, minlength=64) / 5000
        assert (shares - expected).abs().sum() / 2 < 0.08


def exact_conditional(model: PixelCNN, image: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return all images with these known pixels, and their log P(unknown | known)."""
    images = all_images(model.image_shape, model.bits)
    images = images[(images == image)[:, known].all(1)]
    return images, model.log_prob(images).log_softmax(0).detach()


@pytest.mark.parametrize("num_classes", [None, 2])
@pytest.mark.parametrize("known", [TOP, DIAGONAL], ids=["top", "diagonal"])
def test_inpainting_draws_from_the_exact_conditional(known, num_classes, monkeypatch):
    monkeypatch.setattr("flowgen.models.pixelcnn.pixelcnn.INPAINTING_CHAINS", 1000)
    model = random_model(num_layers=1, num_classes=num_classes)
    image = random_images(model, 1)
    images, log_prob = exact_conditional(model, image, known)
    generator = torch.Generator().manual_seed(0)
    result = model.inpaint(image, known, sampler="metropolis", steps=25, generator=generator)
    drawn = (3 * result.draws).round().to(torch.uint8)
    shares = (drawn[:, None] == images).flatten(2).all(2).float().mean(0)
    assert shares.sum().item() == pytest.approx(1)
    assert (shares - log_prob.exp()).abs().sum() / 2 < 0.08
    mean = (log_prob.exp()[:, None, None, None] * images).sum(0) / 3
    assert (result.mean - mean).abs().max() < 0.05
    assert (result.metrics["acceptance"] == 1) == is_prefix(known)


@torch.no_grad()
def test_chains_forget_the_class_that_they_start_with():
    model = random_model(0.5, num_layers=1, num_classes=2)
    image = random_images(model, 1)
    images, _ = exact_conditional(model, image, DIAGONAL)
    joint = [model.log_prob(images, labels=torch.full((len(images),), y)) for y in range(2)]
    posterior = torch.stack(joint).logsumexp(1).softmax(0)
    generator = torch.Generator().manual_seed(0)
    chains = MetropolisChains(model, image, ~DIAGONAL, 1000, generator)
    chains.labels = posterior.argmin().expand(1000)
    chains.log_prob = model.value_log_prob(chains.images, model.one_hot(chains.labels))
    for _ in range(25):
        chains.step()
    share = (chains.labels == posterior.argmax()).double().mean().item()
    assert share == pytest.approx(posterior.max().item(), abs=0.06)


@pytest.mark.parametrize("num_classes", [None, 2])
@pytest.mark.parametrize("known", [TOP, DIAGONAL], ids=["top", "diagonal"])
def test_conditional_log_probabilities_are_exact_for_prefixes_and_estimated_else(
    known, num_classes
):
    model = random_model(0.5, num_layers=1, num_classes=num_classes)
    image = random_images(model, 1)
    images, log_prob = exact_conditional(model, image, known)
    expected = log_prob[(images == image).flatten(1).all(1)].item()
    generator = torch.Generator().manual_seed(0)
    metrics = model.conditional_log_prob(image, known, steps=2000, generator=generator)
    result = metrics["conditional_log_probability"]
    if is_prefix(known):
        assert result.value == pytest.approx(expected, abs=1e-9) and result.error == 0
        assert metrics.facts["method"] == "exact"
    else:
        assert abs(result.value - expected) < 4 * result.error < 0.2
        assert 10 < metrics["effective_sample_size"].value < 2000


def test_the_estimate_has_no_error_if_the_pixels_are_independent():
    """Rounding errors must not make the variance of the equal weights negative."""
    model = random_model()
    torch.nn.init.zeros_(model.network.out.weight)
    image = random_images(model, 1)
    values = model.value_log_prob(image, None)
    for steps in (11, 100, 999):
        metrics = model.conditional_log_prob(image, DIAGONAL, steps=steps)
        result = metrics["conditional_log_probability"]
        assert result.value == pytest.approx(values[0, ~DIAGONAL].sum().item())
        assert result.error == pytest.approx(0, abs=1e-12)
        assert metrics["effective_sample_size"].value == pytest.approx(steps)


def test_an_unreliable_estimate_is_refused():
    model = random_model(0.5)
    with pytest.raises(UserError, match=r"effective sample size is only 1\.0: use more --steps"):
        model.conditional_log_prob(random_images(model, 1), DIAGONAL, steps=1)


def test_classes_follow_the_rule_of_bayes_and_other_models_refuse_them():
    model = random_model(0.5, num_classes=3)
    images = random_images(model, 5)
    joint = [model.log_prob(images, labels=torch.full((5,), label)) for label in range(3)]
    log_prob = torch.stack(joint, 1)
    assert torch.allclose(model.classify(images), log_prob.log_softmax(1))
    assert torch.allclose(model.score(images), log_prob.logsumexp(1) - math.log(3))
    latents = model.class_latents()
    assert torch.equal(latents[:, -3:], torch.eye(3)) and not latents[:, :-3].any()
    assert model.loss_metric is None and random_model().loss_metric is not None
    assert not PixelCNN.supports(ClassConditional, {"num_classes": None})
    with pytest.raises(UserError, match="has no classes"):
        random_model().sample(1, label=0)


def test_known_pixels_are_kept_in_color_images_and_other_measurements_refused():
    model = random_model(image_shape=(3, 4, 4), bits=5).float()
    image = random_images(model, 1)
    known = torch.rand(3, 4, 4) < 0.5
    result = model.inpaint(image, known, sampler="metropolis", steps=5)
    pixels = (31 * result.draws).round().to(torch.uint8)
    assert torch.equal(pixels[:, known], image[:, known].expand(len(pixels), -1))
    assert result.metrics["std"] > 0 and math.isfinite(result.metrics["bits_per_dim"])
    with pytest.raises(UserError, match="only inpaint missing pixels"):
        model.inpaint(image, LinearMeasurement(torch.ones(3, 1, 1)), sampler="metropolis")


def test_a_trained_model_comes_close_to_the_entropy_of_a_markov_texture():
    from test_entropy import evaluate, markov_texture, train

    images, entropy = markov_texture(20_000)
    model = PixelCNN(image_shape=(1, 8, 8), bits=1, width=8, num_layers=1)
    train(model, images, 120, lr=1e-2)
    metrics = evaluate(model, markov_texture(2000)[0])
    assert abs(metrics["bits_per_dim"] - entropy) < 3 * metrics["bits_per_dim_error"] + 0.01


def test_drawn_values_have_their_probabilities_at_each_temperature():
    logits = torch.tensor([0.0, 1.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0):
        values = draw_values(logits.expand(20_000, 3), temperature, generator)
        shares = values.bincount(minlength=3) / len(values)
        assert torch.allclose(shares, (logits / temperature).softmax(0), atol=0.01)
    assert (draw_values(logits.expand(1000, 3), 0.0, generator) == 1).all()
