"""GAN: the losses of both players, gradient penalties, samples, training, and refusals."""

import copy
import json
import math

import pytest
import torch
from conftest import save_image, trained
from test_models import build_model, random_images
from test_noise import read_rows
from torch.nn import functional as F

import flowgen
from flowgen.bijections.networks import RandomSource
from flowgen.models.base import ClassConditional
from flowgen.models.gan import (
    GAN,
    GRADIENT_PENALTIES,
    Discriminator,
    Generator,
    adversarial_losses,
    halved_sizes,
)
from flowgen.utils.errors import UserError
from flowgen.utils.frechet import PrincipalComponents, frechet_distance

LOSSES = tuple(GRADIENT_PENALTIES)
SMALL = ["model=gan", "model.width=4", "model.discriminator_width=4", "model.latent_dim=4"]
TRAINER = ["trainer.steps=2", "trainer.minutes=null", "trainer.batch_size=4", "trainer.log_every=1"]


def gan(**changes: object) -> GAN:
    """Return a small model whose parameters are perturbed, as if it had been trained."""
    model = build_model("gan", **{"discriminator_width": 4, "latent_dim": 6} | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def losses(discriminator, real, fake, loss, gradient_penalty=1.0, one_hot=None):
    return adversarial_losses(
        discriminator,
        real,
        fake,
        one_hot,
        loss=loss,
        gradient_penalty=gradient_penalty,
        random_source=RandomSource(),
    )


def slope(discriminator, x, one_hot):
    """The gradient of the logit of each image, one image at a time."""
    x = x.detach().requires_grad_()
    rows = [
        torch.autograd.grad(
            discriminator(x[i : i + 1], None if one_hot is None else one_hot[i : i + 1]).sum(),
            x,
            create_graph=True,
        )[0][i].flatten()
        for i in range(len(x))
    ]
    return torch.stack(rows)


def player_losses(loss, weight, discriminator, real, fake, one_hot, u):
    """The losses of generator and discriminator as the papers write them."""
    d_real, d_fake = discriminator(real, one_hot), discriminator(fake, one_hot)
    squares = [slope(discriminator, x, one_hot).square().sum(1) for x in (real, fake)]
    if loss == "nonsaturating":
        return -F.logsigmoid(d_fake).mean(), (
            -F.logsigmoid(d_real) - F.logsigmoid(-d_fake) + weight / 2 * squares[0]
        ).mean()
    if loss == "r3gan":
        return -F.logsigmoid(d_fake - d_real).mean(), (
            -F.logsigmoid(d_real - d_fake) + weight / 2 * (squares[0] + squares[1])
        ).mean()
    points = u * fake.detach() + (1 - u) * real
    norm = slope(discriminator, points, one_hot).square().sum(1).sqrt()
    return -d_fake.mean(), (d_fake - d_real + weight * (norm - 1).square()).mean()


@pytest.mark.parametrize("num_classes", [None, 2])
@pytest.mark.parametrize("weight", [None, 0.7])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradients_are_those_of_two_players_with_their_own_losses(loss, weight, num_classes):
    """Each player's loss is differentiated on its own, as two optimizers would do."""
    model = gan(loss=loss, gradient_penalty=weight, num_classes=num_classes).double()
    images = random_images(5, 4)
    labels = torch.tensor([0, 1, 1, 0]) if num_classes else None
    torch.manual_seed(3)
    total = model(images, labels)
    total.backward()

    torch.manual_seed(3)
    z = torch.randn(4, 6, dtype=torch.double)
    noise = [torch.rand(4, 3, 8, 8, dtype=torch.double) for _ in range(2)]
    u = torch.rand(4, 1, 1, 1, dtype=torch.double)
    one_hot = F.one_hot(labels, 2).double() if num_classes else None
    latent = torch.cat((z, one_hot), 1) if num_classes else z
    real = (images + noise[0]) / 32
    fake = (31 * model.generator(latent) + noise[1]) / 32
    weight = GRADIENT_PENALTIES[loss] if weight is None else weight
    arguments = (loss, weight, copy.deepcopy(model.discriminator), real, fake, one_hot, u)
    generator_loss, discriminator_loss = player_losses(*arguments)
    expected = torch.autograd.grad(
        generator_loss, [*model.generator.parameters()], retain_graph=True
    )
    expected += torch.autograd.grad(discriminator_loss, [*arguments[2].parameters()])
    assert torch.allclose(total, generator_loss + discriminator_loss)
    actual = [p.grad for p in (*model.generator.parameters(), *model.discriminator.parameters())]
    assert all(
        torch.allclose(a, b, rtol=1e-6, atol=1e-12) for a, b in zip(actual, expected, strict=True)
    )
    assert all(gradient.abs().max() > 0 for gradient in actual)
    assert model.diagnostics() == {
        "generator_loss": pytest.approx(generator_loss.item()),
        "discriminator_loss": pytest.approx(discriminator_loss.item()),
    }


class Linear(torch.nn.Module):
    """D(x) = sum of w x^2 / 2, whose gradient is w x."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x, one_hot=None):
        return (self.weight * x.square() / 2).flatten(1).sum(1)


def test_gradient_penalties_agree_with_a_closed_form():
    w = torch.rand(1, 2, 3, dtype=torch.double)
    x, y = torch.rand(2, 5, 1, 2, 3, dtype=torch.double)
    discriminator = Linear(w)

    def penalty(loss):
        torch.manual_seed(1)
        with_penalty = losses(discriminator, x, y, loss, 0.4)[1]
        return (with_penalty - losses(discriminator, x, y, loss, 0.0)[1]).item()

    def square(points):
        return (w * points).square().flatten(1).sum(1)

    assert penalty("nonsaturating") == pytest.approx(0.2 * square(x).mean().item())
    assert penalty("r3gan") == pytest.approx(0.2 * (square(x) + square(y)).mean().item())
    torch.manual_seed(1)
    u = torch.rand(5, 1, 1, 1, dtype=torch.double)
    expected = 0.4 * (square(u * y + (1 - u) * x).sqrt() - 1).square().mean()
    assert penalty("wgan_gp") == pytest.approx(expected.item())


def test_a_gradient_of_zero_has_a_finite_penalty():
    discriminator = Linear(torch.zeros(1, 2, 3))
    loss = losses(discriminator, *torch.rand(2, 5, 1, 2, 3), "wgan_gp")[1]
    assert loss == 1
    loss.backward()
    assert torch.isfinite(discriminator.weight.grad).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_discriminator_learns_to_rate_images_above_others(loss):
    discriminator = Discriminator((1, 8, 8), 4)
    real = 0.5 + torch.rand(32, 1, 8, 8) / 32
    fake = torch.rand(32, 1, 8, 8)
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        losses(discriminator, real, fake, loss, 0.01)[1].backward()
        optimizer.step()
    assert (discriminator(real) > discriminator(fake)).all()


@pytest.mark.parametrize(
    "shape", [(2, 1, 1), (1, 28, 28), (3, 4, 4), (3, 64, 64), (1, 20, 6), (3, 3, 33)], ids=str
)
def test_networks_take_images_of_every_size(shape):
    sizes = halved_sizes(shape[1:])
    assert len(sizes) > 1 and max(sizes[-1]) <= 4
    images = Generator(shape, 3, 2)(torch.randn(5, 3))
    assert images.shape == (5, *shape) and images.min() > 0 and images.max() < 1
    assert Discriminator(shape, 2)(images).shape == (5,)


@pytest.mark.parametrize("bits", [1, 8])
def test_samples_are_pixel_values_without_log_prob(bits):
    model = gan(bits=bits, image_shape=(1, 6, 10)).eval()
    images, log_prob = model.sample(5, generator=torch.Generator().manual_seed(1))
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        brightness = model.generator(z)
    assert images.dtype == torch.uint8 and images.shape == (5, 1, 6, 10)
    assert torch.equal(images, (brightness * (2**bits - 1)).round().to(torch.uint8))
    assert log_prob is None and torch.equal(model.decode(z), images)


def test_the_temperature_scales_latents():
    model = gan().eval()
    images, _ = model.sample(4, 0.5, torch.Generator().manual_seed(1))
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(images, model.decode(0.5 * z))
    constant, _ = model.sample(3, 0.0)
    assert (constant == constant[:1]).all()


def test_evaluation_reports_the_frechet_distance_of_samples():
    model = gan().eval()
    real, train = random_images(5, 90), random_images(5, 80)
    metrics = model.evaluate(real.split(40), train.split(30))
    state = torch.get_rng_state()
    assert metrics == model.evaluate(real.split(40), train.split(30))
    assert torch.equal(torch.get_rng_state(), state)
    samples, _ = model.sample(90, generator=torch.Generator().manual_seed(0))
    features = PrincipalComponents(train, 31)
    expected = frechet_distance(features(samples).double(), features(real).double())
    assert metrics.row() == {
        "frechet": pytest.approx(expected, rel=1e-5), "bits": 5, "images": 90
    }  # fmt: skip
    assert model.evaluate([real])["frechet"].value > 0  # without training images
    assert math.isnan(model.evaluate([real[:1]])["frechet"].value)


IMAGES = torch.tensor([4, 27], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 4, 4)


def train_on_two_images(**changes: object) -> GAN:
    """Train a model on a dark and a bright image, the classes 0 and 1, without momentum."""
    model = build_model("gan", image_shape=(1, 4, 4), discriminator_width=16, **changes)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, betas=(0.0, 0.99))
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, 2 - step / 200)
        labels = torch.randint(2, (16,))
        optimizer.zero_grad()
        model(IMAGES[labels], labels if model.num_classes else None).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_gan_learns_both_of_two_images(loss):
    penalty = 1.0 if loss == "wgan_gp" else None
    model = train_on_two_images(loss=loss, gradient_penalty=penalty)
    samples, _ = model.sample(200, generator=torch.Generator().manual_seed(0))
    distance = (samples[:, None].float() - IMAGES.float()).abs().mean((2, 3, 4))
    assert distance.min(1).values.mean() < 6  # that of gray samples is 11.5
    assert distance.argmin(1).bincount(minlength=2).min() > 40


def test_a_gan_with_classes_draws_the_requested_class():
    model = train_on_two_images(num_classes=2)
    for label in range(2):
        samples, _ = model.sample(50, label=label)
        assert (samples.float() - IMAGES[label].float()).abs().mean() < 4
    cycle, _ = model.sample(4, start_index=1)
    assert (cycle.float().mean((1, 2, 3)) > 16).tolist() == [True, False, True, False]
    with pytest.raises(UserError, match="label 2 is not one of the model's 2 classes"):
        model.sample(1, label=2)
    assert GAN.supports(ClassConditional, {"num_classes": 2})
    assert not GAN.supports(ClassConditional, {"num_classes": None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "hinge"}, "loss must be one of nonsaturating, wgan_gp, r3gan"),
        ({"gradient_penalty": -1}, "gradient_penalty must be"),
        ({"gradient_penalty": "much"}, "gradient_penalty must be"),
        ({"latent_dim": 0}, "latent_dim must be a whole number"),
        ({"width": 0}, "width must be a whole number"),
        ({"discriminator_width": 0}, "discriminator_width must be a whole number"),
        ({"num_classes": 0}, "num_classes must be a whole number"),
        ({"bits": 9}, "bits must be a whole number"),
    ],
    ids=str,
)
def test_invalid_arguments_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model("gan", **changes)


def test_a_gan_has_no_likelihood_and_no_encoder():
    model = gan(num_classes=2)
    images = random_images(5, 2)
    for method in (model.score, model.statistics, model.classify):
        with pytest.raises(UserError, match="has no likelihood of images"):
            method(images)
    for method in (lambda: model.encode(images), model.class_latents):
        with pytest.raises(UserError, match="cannot find the latents of an image"):
            method()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run with classes, whose folder has the images."""
    folder = tmp_path_factory.mktemp("gan")
    for index in range(1200):
        save_image(folder / "images" / "ab"[index % 2] / f"{index:04d}.png", (4, 6, 3))
    data = ["data=folder", f"data.root={folder / 'images'}", "data.size=[4,6]"]
    classes = ["model.num_classes=2", "trainer.eval_images=16", "trainer.eval_every=1"]
    return trained(folder, run=[*SMALL, *data, *TRAINER, *classes]) / "run"


def test_commands_report_sample_quality(run, command, tmp_path):
    rows = read_rows(run)
    train = next(row for row in rows if row["split"] == "train")
    assert train["loss"] == pytest.approx(train["generator_loss"] + train["discriminator_loss"])
    assert [row["frechet"] > 0 for row in rows if row["split"] != "train"] == [True] * 3
    assert not any("bits_per_dim" in row for row in rows)
    status, output, _ = command("evaluate", "--run", run, "--json", "samples=100")
    metrics = json.loads(output)
    assert status == 0 and metrics["likelihood"] == "none" and metrics["sample_frechet"] > 0
    assert "sample_class_accuracy" in metrics and "bits_per_dim" not in metrics
    status, _, error = command("evaluate", "--run", run, "num_importance_samples=16")
    assert status == 0 and "samples=1000 also measures their coverage" in error
    status, output, _ = command("sample", "--run", run, "--label", 1, "--temperature", 0.5)
    assert status == 0, output
    status, _, _ = command("report", run, "--out", tmp_path / "report.html")
    assert status == 0 and "frechet" in (tmp_path / "report.html").read_text()
    status, _, error = command("export", run, tmp_path / "gan.safetensors")
    assert status == 0, error
    exported = flowgen.load(tmp_path / "gan.safetensors")
    images, _ = exported.sample(3, label=1, generator=torch.Generator().manual_seed(0))
    again, _ = flowgen.load(run).sample(3, label=1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(images, again)


def test_runs_and_models_list_a_gan_without_likelihood(run, command, elsewhere):
    (elsewhere / "outputs").symlink_to(run.parent)
    line = next(line for line in command("models")[1].splitlines() if line.startswith("gan "))
    assert "none" in line
    status, output, error = command("runs")
    assert status == 0 and "frechet" in output and "none" in output, error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "IMAGE"], "has no likelihood of images"),
        (["interpolate", "IMAGE", "IMAGE"], "cannot find the latents of an image"),
        (["edit", "IMAGE", "--attribute", "0"], "cannot find the latents of an image"),
        (["complete", "IMAGE", "--known", "left"], "fills in missing pixels"),
        (["complete", "IMAGE", "--known", "left", "--log-prob"], "fills in missing pixels"),
        (["compress", "IMAGE", "--out", "file"], "compresses images"),
        (["evaluate", "compress=true"], "compress"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_that_need_a_likelihood_or_latents_refuse(run, command, arguments, message):
    image = next((run.parent / "images").rglob("*.png"))
    words = [image if word == "IMAGE" else word for word in arguments]
    status, _, error = command(*words, "--run", run)
    assert status == 1 and message in error and len(error.splitlines()) == 1, error


def test_points_of_the_plane_are_plotted_without_latents(command, tmp_path):
    data = ["data=toy", "data.num_points=200", "trainer.eval_images=16"]
    assert command("train", *SMALL, *data, *TRAINER, f"output_dir={tmp_path / 'run'}")[0] == 0
    status, _, error = command("sample", "--run", tmp_path / "run", "--count", 50)
    assert status == 0, error
