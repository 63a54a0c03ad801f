"""Warnings about impossible likelihoods and about test images in the training set."""

import logging
import math
import shutil

import pytest
import torch
from conftest import SMALL

from flowgen.data.dataset import ImageDataset
from flowgen.data.splits import Split
from flowgen.data.toy2d import Toy2D
from flowgen.models.flows.flow import Flow
from flowgen.training import sanity_checks
from flowgen.training.sanity_checks import entropy, find_duplicates, warn_test_leakage
from flowgen.utils.metrics import BITS_PER_DIM, LOG_LIKELIHOOD, MetricValue, beats_entropy_bound


def test_entropy_is_that_of_the_frequencies():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 2, 2)
    assert entropy([images[:3], images[3:]]) == math.log2(6)
    assert math.isclose(entropy([images[[0, 0, 0, 1]]]), 0.75 * math.log2(4 / 3) + 0.25 * 2)
    assert entropy([images[:1]]) == 0


def test_no_distribution_has_a_likelihood_below_the_entropy():
    """The best model of four images, two of them equal, attains their entropy exactly."""
    images = torch.tensor([0, 0, 1, 2], dtype=torch.uint8).view(4, 1, 1, 1)
    best = -torch.tensor([0.5, 0.5, 0.25, 0.25]).log2().mean().item()
    nats = -best * math.log(2)
    bits = entropy([images])

    def is_impossible(*value):
        return beats_entropy_bound(MetricValue(*value), bits, 1)

    assert not is_impossible(BITS_PER_DIM, best)
    assert is_impossible(BITS_PER_DIM, best - 0.01)
    assert not is_impossible(BITS_PER_DIM, best - 0.01, 0.01)
    assert not is_impossible(LOG_LIKELIHOOD, nats)
    assert is_impossible(LOG_LIKELIHOOD, nats + 0.01)
    assert not is_impossible(LOG_LIKELIHOOD, math.nan)


def test_a_flow_with_a_wrong_log_determinant_causes_a_warning(tiny_run, command, monkeypatch):
    warning = "below the entropy bound, which is impossible"
    assert warning not in command("evaluate", "--run", tiny_run)[2]
    bits = Flow.bits_per_dim
    monkeypatch.setattr(Flow, "bits_per_dim", lambda self, score: bits(self, score) - 8)
    assert warning in command("evaluate", "--run", tiny_run)[2]
    assert warning in command("resume", tiny_run, "trainer.steps=8")[2]


def test_test_images_in_the_training_set_are_counted(images, command, tmp_path):
    argv = ["train", *SMALL, f"data.root={images}", "trainer.steps=1"]
    error = command(*argv, f"output_dir={tmp_path / 'one'}")[2]
    assert "test images are training images" not in error
    for path in sorted(images.iterdir()):
        shutil.copy(path, path.with_name(f"copy_{path.name}"))
    error = command(*argv, f"output_dir={tmp_path / 'two'}")[2]
    assert "test images are training images too, pixel for pixel (indices 0" in error
    error = command("evaluate", "--run", tmp_path / "two")[2]
    assert "test images are training images too" in error


def test_large_data_sets_are_not_searched(monkeypatch):
    monkeypatch.setattr(sanity_checks, "MAX_TRAIN_BYTES", 100)
    monkeypatch.setattr(
        sanity_checks, "find_duplicates", lambda *arguments: pytest.fail("the set is searched")
    )
    warn_test_leakage(Toy2D(name="moons", num_points=4000, bits=3, random_flip=False))


def test_duplicates_agree_in_every_pixel():
    train = torch.randint(256, (500, 3, 40, 40), dtype=torch.uint8)
    other = train[7].clone()
    other[0, 0, 1] += 1  # a pixel that the digest skips
    test = torch.stack((train[3], other, 255 - train[4], train[499], train[3]))
    assert find_duplicates(train, test) == [0, 3, 4]


RANDOM_BINARIZATION = [{"bits": 1, "binarization": kind} for kind in ("static", "dynamic")]


@pytest.mark.parametrize(
    ("options", "changed_bits"),
    [
        *[(options, 0) for options in RANDOM_BINARIZATION],
        ({"bits": 1, "binarization": "threshold"}, 127),
        ({"bits": 5}, 7),
        ({"bits": 8}, 0),
    ],
)
def test_copies_are_found_before_binarization_and_at_the_bits_of_the_model(
    options, changed_bits, caplog, monkeypatch
):
    """The copies differ from the training images in bits that the model does not see."""
    monkeypatch.setattr(logging.getLogger("flowgen"), "propagate", True)
    train = torch.randint(256, (100, 1, 8, 8), dtype=torch.uint8)
    test = torch.cat((train[50:70] ^ changed_bits, 255 - train[:5]))
    warn_test_leakage(ImageDataset(Split(train), Split(train[:1]), Split(test), **options))
    assert "20 of 25 test images are training images too" in caplog.text


@pytest.mark.parametrize("options", [*RANDOM_BINARIZATION, {"bits": 8}])
def test_images_of_other_gray_values_are_no_copies(options, caplog, monkeypatch):
    """The images differ in their lowest bits, and are equal if they are cut off at 128."""
    monkeypatch.setattr(logging.getLogger("flowgen"), "propagate", True)
    train = torch.randint(256, (100, 1, 8, 8), dtype=torch.uint8)
    split = Split(train[:20] ^ 7)
    warn_test_leakage(ImageDataset(Split(train), split, split, **options))
    assert caplog.text == ""


def test_points_of_toy_data_may_coincide():
    data = Toy2D(name="moons", num_points=4000, bits=3, random_flip=False)
    assert find_duplicates(data.train.images, data.test.images) == []


def test_one_copy_is_found_among_sixty_thousand_images():
    train = torch.randint(256, (60_000, 1, 28, 28), dtype=torch.uint8)
    test = torch.randint(256, (10_000, 1, 28, 28), dtype=torch.uint8)
    test[5] = train[59_999]
    assert find_duplicates(train, test) == [5]
