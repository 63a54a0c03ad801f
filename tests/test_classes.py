"""Flows that learn one distribution for each class."""

import math

import pytest
import torch
from conftest import SMALL, fit
from test_models import glow, load_from_checkpoint, noise

from flowgen.commands.sample import sample_images
from flowgen.data.dataset import ImageDataset, Split
from flowgen.data.mnist import MNISTSample
from flowgen.models.flows.flow import Flow

LABELLED = [
    "data=mnist_sample",
    *[word for word in SMALL if not word.startswith("data")],
    "model.num_classes=10",
    "trainer.steps=2",
]


def stripes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of three classes: rows, columns and neither."""
    labels = torch.arange(count) % 3
    ramp = torch.arange(8) % 2 * 12
    patterns = torch.stack((ramp[:, None].expand(8, 8), ramp.expand(8, 8), torch.full((8, 8), 6)))
    images = patterns[labels][:, None] + 4 + torch.randint(0, 8, (count, 3, 8, 8))
    return images.to(torch.uint8), labels


@pytest.fixture(scope="module", params=[True, False], ids=["networks", "base"])
def trained(request) -> Flow:
    torch.manual_seed(0)
    model = load_from_checkpoint(
        "glow",
        num_classes=3,
        condition_networks=request.param,
        steps_per_level=2,
        width=16,
        levels=1,
    )
    model.initialize(*stripes(300))
    fit(model, lambda _: stripes(48), steps=150, lr=3e-3)
    return model


@pytest.mark.parametrize("networks", [True, False])
def test_the_density_is_the_mean_over_the_classes(networks):
    model = glow(num_classes=3, condition_networks=networks).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    x = torch.rand(5, 3, 8, 8, dtype=torch.double)
    of_class = torch.stack([model.log_density(x, torch.full((5,), label)) for label in range(3)])
    assert torch.allclose(model.log_density(x), of_class.logsumexp(0) - math.log(3), atol=1e-9)
    z, log_det = model.bijection(x, torch.eye(3, dtype=torch.double)[[1] * 5] if networks else None)
    expected = torch.distributions.Normal(model.means[1], 1.0).log_prob(z).sum(1) + log_det
    assert torch.allclose(of_class[1], expected, atol=1e-9)


@torch.no_grad()
def test_the_class_is_a_latent_like_the_others_where_the_networks_see_it():
    model = glow(num_classes=3)
    model.initialize(*stripes(64))
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    images, _ = stripes(6)
    latent = model.encode(images)
    assert latent.shape == (6, 3 * 8 * 8 + 3) and torch.equal(model.decode(latent), images)
    assert torch.equal(latent[:, -3:].argmax(1), model.classify(images).argmax(1))
    other = torch.cat((latent[:, :-3], latent[:, -3:].roll(1, 1)), 1)
    assert not torch.equal(model.decode(other), images)


def test_labels_go_with_their_images():
    data = MNISTSample(bits=8, random_flip=False)
    images, labels = data.draw(3990, 20, seed=3)
    place = [
        next(n for n in range(len(data.train)) if torch.equal(data.train.images[n], image))
        for image in images
    ]
    assert torch.equal(labels, data.train.labels[place].long()) and labels.dtype == torch.long
    assert (
        ImageDataset(*[Split(data.train.images)] * 3, bits=8, flip=False).draw(0, 4, 0)[1] is None
    )


def test_a_trained_flow_tells_classes_apart_and_draws_the_one_asked_for(trained):
    images, labels = stripes(300)
    assert (trained.classify(images).argmax(1) == labels).float().mean() > 0.97
    for label in range(3):
        drawn, _ = trained.sample(50, 0.7, torch.Generator().manual_seed(0), label=label)
        image = drawn.float().mean((0, 1))
        across, down = (
            image.mean(0).std(),
            image.mean(1).std(),
        )  # columns show in the first, rows in the second
        assert [down > 3 * across, across > 3 * down, max(across, down) < 1.5][label]


def test_the_figure_needs_no_labels_and_stays_above_the_entropy():
    model = glow(num_classes=3)
    model.initialize(noise(5, 256), torch.arange(256) % 3)
    fit(model, lambda _: (noise(5, 30), torch.arange(30) % 3), steps=20, lr=1e-3)
    figures = model.evaluate([noise(5, 256)]).row()
    assert figures["bits_per_dim"] > 5 - 3 * figures["bits_per_dim_error"]


def test_temperature_zero_is_the_middle_of_the_class(trained):
    drawn, worth = trained.sample(2, 0.0, label=2)
    assert torch.equal(
        drawn[:1],
        trained.decode(
            torch.cat((trained.means[2:3], torch.eye(3)[2:]), 1)[
                :, : 192 + 3 * trained.condition_networks
            ]
        ),
    ) and torch.equal(drawn[0], drawn[1])
    assert torch.isfinite(worth).all()


def test_many_samples_are_of_each_class_in_turn_from_batch_to_batch(monkeypatch):
    """At temperature 0 a sample is the middle of its class."""
    model = glow(num_classes=3).eval()
    model.initialize(*stripes(30))
    whole, _ = sample_images(model, 8, 0.0, seed=0)
    monkeypatch.setattr("flowgen.commands.sample.BATCH_SIZE", 4)
    split, _ = sample_images(model, 8, 0.0, seed=0)
    assert torch.equal(split, whole) and torch.equal(whole, whole[torch.arange(8) % 3])
    assert not torch.equal(whole[0], whole[1])


def test_sample_draws_a_class_by_its_label(command, tmp_path):
    status, _, error = command("train", *LABELLED, f"output_dir={tmp_path / 'run'}")
    assert status == 0, error
    assert command("sample", "--run", tmp_path / "run", "--label", 3, "--count", 4)[0] == 0
    status, _, error = command("sample", "--run", tmp_path / "run", "--label", 10)
    assert status == 1 and "from 0 to 9" in error and len(error.splitlines()) == 1


def test_a_flow_without_classes_says_how_to_get_one(tiny_run, command):
    status, _, error = command("sample", "--run", tiny_run, "--label", 3)
    assert status == 1 and "model.num_classes" in error and len(error.splitlines()) == 1
    status, _, error = command("sample", "--label", 3)
    assert status == 1 and "flowgen train model.num_classes=10 data=mnist" in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.num_classes=5"], "set it to 10"),
        (["model.num_classes=12"], "set it to 10"),
        (["model.num_classes=0"], "whole number"),
    ],
)
def test_classes_that_do_not_fit_the_labels_are_refused(command, words, said, tmp_path):
    status, _, error = command("train", *LABELLED, *words, f"output_dir={tmp_path / 'run'}")
    assert status == 1 and said in error


def test_classes_need_labels(command, images, tmp_path):
    words = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=2",
        "model.num_classes=3",
        f"output_dir={tmp_path / 'run'}",
    ]
    status, _, error = command("train", *words)
    assert status == 1 and "needs labels" in error
