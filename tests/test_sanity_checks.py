"""Figures that cannot be wrong silently: likelihoods below the data's entropy, test images that were trained on."""

import math
import shutil
import time

import torch
from conftest import SMALL

from flowgen.data.toy2d import Toy2D
from flowgen.models.flows.flow import Flow
from flowgen.training import sanity_checks as doubts
from flowgen.training.sanity_checks import entropy, find_duplicates
from flowgen.utils.metrics import BITS_PER_DIM, LOG_LIKELIHOOD, MetricValue, beats_entropy_bound


def test_entropy_is_that_of_the_frequencies():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 2, 2)
    assert entropy([images[:3], images[3:]]) == math.log2(6)
    assert math.isclose(entropy([images[[0, 0, 0, 1]]]), 0.75 * math.log2(4 / 3) + 0.25 * 2)
    assert entropy([images[:1]]) == 0


def test_no_distribution_has_a_likelihood_below_the_entropy():
    """The best distribution of four images, of which one occurs twice, has just their entropy; a better figure is none."""
    images = torch.tensor([0, 0, 1, 2], dtype=torch.uint8).view(4, 1, 1, 1)
    best = -torch.tensor([0.5, 0.5, 0.25, 0.25]).log2().mean().item()
    bits = entropy([images])
    assert not beats_entropy_bound(
        MetricValue(BITS_PER_DIM, best), bits, 1
    ) and beats_entropy_bound(MetricValue(BITS_PER_DIM, best - 0.01), bits, 1)
    assert not beats_entropy_bound(MetricValue(BITS_PER_DIM, best - 0.01, 0.01), bits, 1)
    nats = -best * math.log(2)
    assert not beats_entropy_bound(
        MetricValue(LOG_LIKELIHOOD, nats), bits, 1
    ) and beats_entropy_bound(MetricValue(LOG_LIKELIHOOD, nats + 0.01), bits, 1)
    assert not beats_entropy_bound(MetricValue(LOG_LIKELIHOOD, math.nan), bits, 1)


def test_a_flow_that_counts_its_volume_wrongly_is_named(tiny_run, command, monkeypatch):
    assert "cannot be" not in command("evaluate", "--run", tiny_run)[2]
    bits = Flow._bits_per_dim
    monkeypatch.setattr(Flow, "_bits_per_dim", lambda self, score: bits(self, score) - 8)
    assert "no model is below" in command("evaluate", "--run", tiny_run)[2]
    assert "no model is below" in command("resume", tiny_run, "trainer.steps=8")[2]


def test_test_images_that_were_trained_on_are_named_and_counted(images, command, tmp_path):
    words = ["train", *SMALL, f"data.root={images}", "trainer.steps=1"]
    assert (
        "test images are training images"
        not in command(*words, f"output_dir={tmp_path / 'one'}")[2]
    )
    for path in sorted(images.iterdir()):
        shutil.copy(path, path.with_name(f"copy_{path.name}"))
    error = command(*words, f"output_dir={tmp_path / 'two'}")[2]
    assert "test images are training images too, pixel for pixel (numbers 0" in error
    assert (
        "test images are training images too" in command("evaluate", "--run", tmp_path / "two")[2]
    )


def test_sets_that_take_minutes_to_read_are_not_read_for_it(monkeypatch):
    monkeypatch.setattr(doubts, "MAX_ABS_VALUE", 100)
    monkeypatch.setattr(doubts, "shared", None)
    doubts.warn_test_leakage(Toy2D(name="moons", num_points=4000, bits=3, random_flip=False))


def test_shared_images_are_found_pixel_for_pixel():
    train = torch.randint(256, (500, 3, 40, 40), dtype=torch.uint8)
    other = train[7].clone()
    other[0, 0, 1] += 1  # a pixel that the digest does not look at
    test = torch.stack((train[3], other, 255 - train[4], train[499], train[3]))
    assert find_duplicates(train, test) == [0, 3, 4]


def test_points_of_the_plane_may_agree():
    data = Toy2D(name="moons", num_points=4000, bits=3, random_flip=False)
    assert find_duplicates(data.train.images, data.test.images) == []


def test_sixty_thousand_images_are_compared_in_a_second():
    train, test = (
        torch.randint(256, (60_000, 1, 28, 28), dtype=torch.uint8),
        torch.randint(256, (10_000, 1, 28, 28), dtype=torch.uint8),
    )
    test[5] = train[59_999]
    began = time.process_time()
    assert find_duplicates(train, test) == [5]
    assert time.process_time() - began < 2  # 0.2 s on an idle core
