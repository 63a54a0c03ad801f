"""The offline distances by which samples are compared, and what is said of differences, against values that are known."""

import json
import math

import pytest
import torch
from test_models import glow, noise, started

from flowgen.data.mnist import MNISTSample
from flowgen.evaluation import interpolation, sample_quality, stats
from flowgen.evaluation.interpolation import great_circle, walk
from flowgen.evaluation.sample_quality import frechet
from flowgen.utils.errors import UserError


def test_the_frechet_distance_of_two_gaussians_is_the_closed_form():
    """Independent components: |m - m'|^2 + sum (s - s')^2."""
    scale, other = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.5, 1.0, 0.5])
    one = scale * torch.randn(200_000, 3)
    two = 1.0 + other * torch.randn(200_000, 3)
    expected = 3.0 + (scale - other).square().sum().item()
    assert sample_quality.likeness(one[:2000], two[:2000]).frechet == pytest.approx(
        expected, rel=0.15
    )
    assert frechet(one.double(), two.double()) == pytest.approx(expected, rel=0.01)
    assert frechet(one.double(), one.double()) == pytest.approx(0, abs=1e-6)


def test_coverage_falls_with_missing_samples_and_with_blank_ones():
    def two_modes():
        return torch.cat((torch.randn(300, 2), 20 + torch.randn(300, 2)))

    real, one_mode = two_modes(), torch.randn(600, 2)
    found = sample_quality.likeness(one_mode, real)
    assert sample_quality.likeness(two_modes(), real).coverage > 0.9
    assert found.coverage == pytest.approx(0.5, abs=0.05) and found.spread < 0.5
    like_faces = torch.cat((torch.randn(590, 64), 10 * torch.randn(10, 64))) / torch.arange(
        1, 65
    )  # with outliers, which are near all
    assert sample_quality.likeness(torch.zeros(600, 64), like_faces).coverage < 0.3


def test_a_real_point_lies_at_distance_one_and_their_mean_at_zero():
    real = 3 + torch.randn(500, 8)
    assert sample_quality.distance_from_mean(real.mean(0), real) == pytest.approx(0, abs=1e-5)
    assert torch.tensor(
        [sample_quality.distance_from_mean(point, real) for point in real]
    ).mean().item() == pytest.approx(1, abs=1e-4)


def test_the_components_keep_what_varies_most_and_leave_the_random_state_alone():
    images = torch.rand(500, 1, 4, 4) * torch.tensor([10.0] + 15 * [0.01]).view(1, 4, 4)
    before = torch.random.get_rng_state()
    found = sample_quality.PrincipalComponents(images)(images)
    assert found[:, 0].std().item() == pytest.approx(images[:, 0, 0, 0].std().item(), rel=0.01)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_paired_difference_drops_what_the_images_have_in_common():
    images = torch.randn(400).mul(10).tolist()
    shifts = torch.randn(400).mul(0.1).tolist()
    found = stats.paired_difference(
        [image + 1 + shift for image, shift in zip(images, shifts, strict=True)], images
    )
    assert (
        found.value == pytest.approx(1, abs=0.03)
        and found.error == pytest.approx(0.1 / 20, rel=0.15)
        and found.count == 400
    )
    three = stats.mean([1.0, 2.0, 3.0])
    assert (three.value, three.error) == pytest.approx((2.0, 1 / math.sqrt(3))) and stats.mean(
        [5.0]
    ) == stats.Mean(5.0, 0.0, 1)
    assert (
        str(stats.Mean(1.23456, 0.0123, 9)) == "1.235 ± 0.012"
        and str(stats.Mean(12.0, 3.4, 9)) == "12.0 ± 3.4"
    )


def test_a_walk_through_the_pixels_is_even_and_both_ways_meet_at_the_ends():
    model = started("glow")
    first, second = noise(5, 6) // 2, noise(5, 6) // 2
    latent, pixels = walk(model, first, second, torch.linspace(0, 1, 5))
    assert latent.shape == pixels.shape == (5, *first.shape)
    for way in (latent, pixels):
        assert torch.equal(way[0].float(), first.float()) and torch.equal(
            way[-1].float(), second.float()
        )
    assert interpolation.unevenness(pixels, 5) == pytest.approx(torch.ones(6), abs=1e-3)
    assert interpolation.unevenness(latent, 5).min() > 1 and interpolation.changes(
        latent, 5
    ).shape == (4, 6)
    uneven = torch.tensor([0, 1, 4]).view(3, 1, 1, 1, 1).expand(3, 2, 1, 4, 4)
    assert interpolation.unevenness(uneven, 5) == pytest.approx(torch.full((2,), 1.5))
    assert interpolation.changes(
        torch.stack((torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 31))), 5
    ) == pytest.approx(torch.ones(1, 2))


def test_a_walk_goes_the_way_that_it_is_told():
    model = started("glow")
    ends = noise(5, 2)[:1] // 2, noise(5, 2)[1:] // 2
    shares = torch.tensor([0.25, 0.5])
    encoded = [model.encode(end) for end in ends]
    wanted = model.decode(great_circle(*encoded, shares[:, None]))
    assert torch.equal(walk(model, *ends, shares, along=great_circle)[0][:, 0], wanted)
    assert not torch.equal(walk(model, *ends, shares)[0][:, 0], wanted)


def test_fid_without_its_network_or_its_package_is_refused(monkeypatch, tmp_path):
    monkeypatch.delenv(sample_quality.WEIGHTS, raising=False)
    assert sample_quality.network() is None
    monkeypatch.setenv(sample_quality.WEIGHTS, str(tmp_path / "nowhere.pth"))
    with pytest.raises(UserError, match="no file"):
        sample_quality.network()
    (tmp_path / "nowhere.pth").touch()
    monkeypatch.setattr(sample_quality, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed"):
        sample_quality.network()
    monkeypatch.setattr(sample_quality, "find_spec", lambda name: object())
    assert sample_quality.network() == tmp_path / "nowhere.pth"


def test_a_flow_is_judged_by_samples_that_are_its_data():
    """Test images as samples: covered, as far apart as they are, at no distance; grey ones are none of that."""
    data, model = MNISTSample(bits=5, random_flip=False), glow(image_shape=(1, 28, 28), levels=2)
    test = torch.cat(list(data.batches("test", 100, 60)))
    model.initialize(test)
    found = sample_quality.flow_report(
        model, data, {0.0: [torch.full_like(test, 4)], 1.0: [test, test]}, pairs=4, steps=6
    )
    grey, same = found["samples"][0][0], found["samples"][1][0]
    assert (
        same["coverage"] == 1
        and same["spread"] == pytest.approx(1)
        and same["frechet"] == pytest.approx(0, abs=1e-3)
    )
    assert (
        grey["coverage"] < 0.75
        and grey["spread"] == 0
        and grey["frechet"] > found["training"]["frechet"]
    )
    assert found["images"] == len(found["bits"]) == 60 and found["mean_sample"] > 0
    assert sample_quality.bits_per_image(model, test).mean().item() == pytest.approx(
        found["bits"] and sum(found["bits"]) / 60
    )
    assert len(found["walk"]["unevenness"]) == 4 and [
        len(each) for each in found["walk"]["bits"]
    ] == [6, 6]
    assert found == json.loads(json.dumps(found))
