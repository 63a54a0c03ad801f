"""Class-conditional flows."""

import math

import pytest
import torch
from conftest import SMALL, fit
from test_models import build_model, glow, random_images

from flowgen.data.dataset import ImageDataset
from flowgen.data.mnist import MNISTSample
from flowgen.data.splits import Split
from flowgen.models.base import sample_images
from flowgen.models.flows.flow import Flow

LABELED = [
    "data=mnist_sample",
    *[override for override in SMALL if not override.startswith("data")],
    "model.num_classes=10",
    "trainer.steps=2",
]


def stripes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of three classes: horizontal stripes, vertical stripes and no stripes."""
    labels = torch.arange(count) % 3
    ramp = torch.arange(8) % 2 * 12
    patterns = torch.stack((ramp[:, None].expand(8, 8), ramp.expand(8, 8), torch.full((8, 8), 6)))
    images = patterns[labels][:, None] + 4 + torch.randint(0, 8, (count, 3, 8, 8))
    return images.to(torch.uint8), labels


@pytest.fixture(scope="module", params=[True, False], ids=["networks", "base"])
def trained(request) -> Flow:
    torch.manual_seed(0)
    model = build_model(
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


@pytest.mark.parametrize("condition_networks", [True, False])
def test_the_density_is_the_mean_over_the_classes(condition_networks):
    model = glow(num_classes=3, condition_networks=condition_networks).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    x = torch.rand(5, 3, 8, 8, dtype=torch.double)
    by_class = torch.stack([model.log_density(x, torch.full((5,), label)) for label in range(3)])
    assert torch.allclose(model.log_density(x), by_class.logsumexp(0) - math.log(3), atol=1e-9)
    one_hot = torch.eye(3, dtype=torch.double)[[1] * 5]
    z, log_det = model.bijection(x, one_hot if condition_networks else None)
    expected = torch.distributions.Normal(model.means[1], 1.0).log_prob(z).sum(1) + log_det
    assert torch.allclose(by_class[1], expected, atol=1e-9)


@torch.no_grad()
def test_the_class_is_part_of_the_latent_if_it_conditions_the_networks():
    model = glow(num_classes=3)
    model.initialize(*stripes(64))
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    images, _ = stripes(6)
    latent = model.encode(images)
    assert latent.shape == (6, 3 * 8 * 8 + 3) and torch.equal(model.decode(latent), images)
    assert torch.equal(latent[:, -3:].argmax(1), model.classify(images).argmax(1))
    other_class = torch.cat((latent[:, :-3], latent[:, -3:].roll(1, 1)), 1)
    assert not torch.equal(model.decode(other_class), images)


def test_labels_belong_to_their_images():
    data = MNISTSample(bits=8, random_flip=False)
    images, labels = data.train_batch(3990, 20, seed=3)
    indices = [
        next(i for i in range(len(data.train)) if torch.equal(data.train.images[i], image))
        for image in images
    ]
    assert torch.equal(labels, data.train.labels[indices].long()) and labels.dtype == torch.long
    unlabeled = ImageDataset(*[Split(data.train.images)] * 3, bits=8, random_flip=False)
    assert unlabeled.train_batch(0, 4, 0)[1] is None


def test_a_trained_flow_classifies_images_and_samples_the_requested_class(trained):
    images, labels = stripes(300)
    assert (trained.classify(images).argmax(1) == labels).float().mean() > 0.97
    for label in range(3):
        samples, _ = trained.sample(50, 0.7, torch.Generator().manual_seed(0), label=label)
        mean = samples.float().mean((0, 1))
        columns = mean.mean(0).std()  # large for vertical stripes
        rows = mean.mean(1).std()  # large for horizontal stripes
        assert [rows > 3 * columns, columns > 3 * rows, max(columns, rows) < 1.5][label]


def test_bits_per_dim_need_no_labels_and_exceed_the_entropy():
    model = glow(num_classes=3)
    model.initialize(random_images(5, 256), torch.arange(256) % 3)
    fit(model, lambda _: (random_images(5, 30), torch.arange(30) % 3), steps=20, lr=1e-3)
    metrics = model.evaluate([random_images(5, 256)]).row()
    assert metrics["bits_per_dim"] > 5 - 3 * metrics["bits_per_dim_error"]


def test_samples_at_temperature_zero_decode_the_class_mean(trained):
    samples, log_prob = trained.sample(2, 0.0, label=2)
    latent = torch.cat((trained.means[2:3], torch.eye(3)[2:]), 1)
    expected = trained.decode(latent[:, : 192 + 3 * trained.condition_networks])
    assert torch.equal(samples[:1], expected) and torch.equal(samples[0], samples[1])
    assert torch.isfinite(log_prob).all()


def test_samples_cycle_through_the_classes_across_batches(monkeypatch):
    """At temperature 0, a sample is the mean of its class."""
    model = glow(num_classes=3).eval()
    model.initialize(*stripes(30))
    whole, _ = sample_images(model, 8, 0.0, seed=0)
    monkeypatch.setattr("flowgen.models.base.SAMPLE_BATCH_SIZE", 4)
    in_batches, _ = sample_images(model, 8, 0.0, seed=0)
    assert torch.equal(in_batches, whole) and torch.equal(whole, whole[torch.arange(8) % 3])
    assert not torch.equal(whole[0], whole[1])


def test_sample_draws_a_class_by_its_label(command, tmp_path):
    status, _, error = command("train", *LABELED, f"output_dir={tmp_path / 'run'}")
    assert status == 0, error
    assert command("sample", "--run", tmp_path / "run", "--label", 3, "--count", 4)[0] == 0
    status, _, error = command("sample", "--run", tmp_path / "run", "--label", 10)
    assert status == 1 and "from 0 to 9" in error and len(error.splitlines()) == 1


def test_a_flow_without_classes_says_how_to_train_one(tiny_run, command):
    status, _, error = command("sample", "--run", tiny_run, "--label", 3)
    assert status == 1 and "model.num_classes" in error and len(error.splitlines()) == 1
    status, _, error = command("sample", "--label", 3)
    assert status == 1 and "flowgen train model.num_classes=10 data=mnist" in error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_classes=5", "set it to 10"),
        ("model.num_classes=12", "set it to 10"),
        ("model.num_classes=0", "whole number"),
    ],
)
def test_classes_that_do_not_match_the_labels_are_rejected(command, override, message, tmp_path):
    status, _, error = command("train", *LABELED, override, f"output_dir={tmp_path / 'run'}")
    assert status == 1 and message in error


def test_classes_need_labels(command, images, tmp_path):
    overrides = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=2",
        "model.num_classes=3",
        f"output_dir={tmp_path / 'run'}",
    ]
    status, _, error = command("train", *overrides)
    assert status == 1 and "needs labels" in error
