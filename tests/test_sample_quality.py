"""Sample quality, interpolation and statistics against known values."""

import math
import sys
import types

import pytest
import torch
from test_models import initialized, random_images

from flowgen.data.dataset import ImageDataset
from flowgen.data.mnist import MNISTSample
from flowgen.data.splits import Split
from flowgen.evaluation import interpolation, sample_quality, stats
from flowgen.evaluation.interpolation import interpolate_pairs, slerp, step_sizes, unevenness
from flowgen.evaluation.sample_quality import measure_sample_quality
from flowgen.utils.errors import UserError
from flowgen.utils.frechet import frechet_distance


def test_the_frechet_distance_of_two_gaussians_is_the_closed_form():
    """Independent components: |m - m'|^2 + sum (s - s')^2."""
    first_std, second_std = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.5, 1.0, 0.5])
    first = first_std * torch.randn(200_000, 3)
    second = 1.0 + second_std * torch.randn(200_000, 3)
    expected = 3.0 + (first_std - second_std).square().sum().item()
    quality = measure_sample_quality(first[:2000], second[:2000])
    assert quality["frechet"] == pytest.approx(expected, rel=0.15)
    first, second = first.double(), second.double()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=0.01)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_coverage_falls_for_missing_modes_and_for_blank_samples():
    def two_modes():
        return torch.cat((torch.randn(300, 2), 20 + torch.randn(300, 2)))

    real, one_mode = two_modes(), torch.randn(600, 2)
    assert measure_sample_quality(two_modes(), real)["coverage"] > 0.9
    quality = measure_sample_quality(one_mode, real)
    assert quality["coverage"] == pytest.approx(0.5, abs=0.05)
    assert quality["spread"] < 0.5
    # Outliers, whose neighborhoods contain nearly everything.
    with_outliers = torch.cat((torch.randn(590, 64), 10 * torch.randn(10, 64)))
    real = with_outliers / torch.arange(1, 65)
    assert measure_sample_quality(torch.zeros(600, 64), real)["coverage"] < 0.3


def test_the_first_component_is_the_pixel_that_varies_most():
    images = torch.rand(500, 1, 4, 4) * torch.tensor([10.0] + 15 * [0.01]).view(1, 4, 4)
    before = torch.random.get_rng_state()
    coordinates = sample_quality.PrincipalComponents(images)(images)
    expected = images[:, 0, 0, 0].std().item()
    assert coordinates[:, 0].std().item() == pytest.approx(expected, rel=0.01)
    assert torch.equal(torch.random.get_rng_state(), before), "the global random state must stay"


def test_a_paired_difference_cancels_variation_that_the_images_share():
    images = torch.randn(400).mul(10).tolist()
    shifts = torch.randn(400).mul(0.1).tolist()
    shifted = [image + 1 + shift for image, shift in zip(images, shifts, strict=True)]
    difference = stats.paired_difference(shifted, images)
    assert difference.value == pytest.approx(1, abs=0.03)
    assert difference.error == pytest.approx(0.1 / 20, rel=0.15)
    assert difference.count == 400


def test_means_have_a_standard_error_of_two_digits():
    mean = stats.mean([1.0, 2.0, 3.0])
    assert (mean.value, mean.error) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert stats.mean([5.0]) == stats.Mean(5.0, 0.0, 1)
    assert str(stats.Mean(1.23456, 0.0123, 9)) == "1.235 ± 0.012"
    assert str(stats.Mean(12.0, 3.4, 9)) == "12.0 ± 3.4"
    assert str(stats.mean([5.0])) == "5.000", "one value has no known error"
    assert str(stats.mean([1.0, math.inf])) == "inf"


def test_interpolation_through_pixels_is_even_and_both_paths_meet_at_the_ends():
    model = initialized("glow")
    first, second = random_images(5, 6) // 2, random_images(5, 6) // 2
    latent, pixels = interpolate_pairs(model, first, second, torch.linspace(0, 1, 5))
    assert latent.shape == pixels.shape == (5, *first.shape)
    for path in (latent, pixels):
        assert torch.equal(path[0].float(), first.float())
        assert torch.equal(path[-1].float(), second.float())
    assert unevenness(pixels, 5) == pytest.approx(torch.ones(6), abs=1e-3)
    assert unevenness(latent, 5).min() > 1
    assert step_sizes(latent, 5).shape == (4, 6)


def test_step_sizes_and_unevenness_of_known_paths():
    uneven = torch.tensor([0, 1, 4]).view(3, 1, 1, 1, 1).expand(3, 2, 1, 4, 4)
    assert unevenness(uneven, 5) == pytest.approx(torch.full((2,), 1.5))
    assert unevenness(torch.ones(3, 2, 1, 4, 4), 5).tolist() == [1, 1]
    black_to_white = torch.stack((torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 31)))
    assert step_sizes(black_to_white, 5) == pytest.approx(torch.ones(1, 2))


def test_interpolation_follows_the_given_curve():
    model = initialized("glow")
    images = random_images(5, 2) // 2
    first, second = images[:1], images[1:]
    fractions = torch.tensor([0.25, 0.5])
    latents = slerp(model.encode(first), model.encode(second), fractions[:, None])
    expected = model.decode(latents)
    on_circle, _ = interpolate_pairs(model, first, second, fractions, slerp)
    on_line, _ = interpolate_pairs(model, first, second, fractions)
    assert torch.equal(on_circle[:, 0], expected)
    assert not torch.equal(on_line[:, 0], expected)


def test_lerp_and_slerp_are_exact_at_the_ends():
    start, end = torch.randn(5, 7), torch.randn(5, 7)
    for curve in (interpolation.lerp, interpolation.slerp):
        assert torch.equal(curve(start, end, torch.zeros(5, 1)), start)
        assert torch.equal(curve(start, end, torch.ones(5, 1)), end)
        assert torch.equal(curve(0 * start, end, torch.full((5, 1), 0.5)), end / 2)


def test_jackknife_errors_of_means_are_standard_errors_and_variances_of_sets_add():
    first, second = torch.randn(2000), 3 * torch.randn(500)

    def statistics(x, y):
        return {"mean": x.mean().item(), "difference": (x.mean() - y.mean()).item()}

    errors = stats.jackknife_errors(statistics, first, second, groups=100)
    assert errors["mean"] == pytest.approx(1 / math.sqrt(2000), rel=0.3)
    assert errors["difference"] == pytest.approx(math.sqrt(1 / 2000 + 9 / 500), rel=0.3)


def test_the_jackknife_knows_how_much_sample_quality_varies_between_draws():
    def draw():
        scale = torch.logspace(0, -1, 16)
        return 0.8 * scale * torch.randn(300, 16), scale * torch.randn(300, 16)

    draws = [measure_sample_quality(*draw()) for _ in range(40)]
    errors = stats.jackknife_errors(measure_sample_quality, *draw())
    for name, upper in (("frechet", 2), ("spread", 2), ("coverage", 5)):
        true_error = torch.tensor([quality[name] for quality in draws]).std().item()
        assert true_error / 2 < errors[name] < upper * true_error, name


class Noise(ImageDataset):
    """Independent pixels between 64 and 191, and two classes: dark and bright images."""

    def __init__(self, num_test=200, num_train=2000, labels=False):
        def split(count):
            images = torch.randint(64, 128, (count, 1, 8, 8), dtype=torch.uint8)
            is_bright = torch.arange(count) % 2
            images += (64 * is_bright * labels).view(-1, 1, 1, 1).to(torch.uint8)
            return Split(images, is_bright if labels else None)

        super().__init__(split(num_train), split(200), split(num_test))


def test_sample_quality_of_test_images_is_perfect_and_that_of_shifted_images_is_known():
    data = Noise()
    quality = sample_quality.SampleQuality(data, 200)
    perfect = quality.evaluate(quality.test)
    assert perfect["sample_frechet"].value == pytest.approx(0, abs=1e-6)
    assert perfect["sample_coverage"].value == 1
    assert perfect["sample_spread"].value == 1
    assert perfect["sample_spread"].error > 0
    assert perfect["training_frechet"].value > 0.02, "finite sets differ"
    assert perfect.facts["sample_count"] == 200
    assert list(perfect.measured)[:2] == ["sample_frechet", "training_frechet"]
    assert len(perfect.measured) == 6, "no classifier without labels"
    # All 64 components of 8x8 pixels: the squared distance in pixels.
    shifted = quality.evaluate(quality.test + 51)
    assert shifted["sample_frechet"].value == pytest.approx(64 * 0.2**2, rel=1e-4)
    assert shifted["sample_spread"].value == pytest.approx(1, abs=1e-4)
    assert shifted["training_frechet"] == perfect["training_frechet"]


def test_readable_samples_and_their_classes_are_counted_on_the_images_that_are_compared(
    monkeypatch,
):
    monkeypatch.setattr(sample_quality, "MIN_CLASSIFIER_STEPS", 100)
    data = Noise(num_test=300, labels=True)
    quality = sample_quality.SampleQuality(data, 200)
    before = torch.random.get_rng_state()
    classes = (quality.test.float().mean((1, 2, 3)) > 128).long()
    metrics = quality.evaluate(quality.test, 1 - classes)
    assert torch.equal(torch.random.get_rng_state(), before), "the global random state must stay"
    assert metrics["classifier_accuracy"].value > 0.99
    assert metrics["sample_readable"].value == metrics["test_readable"].value > 0.9
    assert metrics["sample_class_accuracy"].value < 0.01


def test_data_with_too_few_images_for_the_samples_is_refused():
    for data, message in (
        (Noise(num_test=150), "this data has 150 and 2000: choose at most 150"),
        (Noise(num_train=300), "this data has 200 and 300: choose at most 150"),
    ):
        with pytest.raises(UserError, match=message):
            sample_quality.SampleQuality(data, 160)
        sample_quality.SampleQuality(data, 150)


@pytest.fixture
def fidelity(monkeypatch):
    """A stand-in for torch-fidelity: its network accepts a file with the key `network`."""

    def create_feature_extractor(name, layers, *, feature_extractor_weights_path, **_):
        if "network" not in torch.load(feature_extractor_weights_path, weights_only=False):
            raise KeyError("Unexpected key(s) in state_dict")

    def calculate_metrics(*, input1, input2, feature_extractor_weights_path, **_):
        first, second = (torch.stack(list(images)).float() for images in (input1, input2))
        assert first.shape[1] == second.shape[1] == 3
        difference = (first.mean() - second.mean()).abs().item()
        return {"frechet_inception_distance": difference, "precision": 0.5, "recall": 0.25}

    package = types.ModuleType("torch_fidelity")
    package.calculate_metrics = calculate_metrics
    package.utils = types.ModuleType("torch_fidelity.utils")
    package.utils.create_feature_extractor = create_feature_extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.utils", package.utils)


def test_fid_without_its_package_or_with_another_file_is_refused(monkeypatch, tmp_path, fidelity):
    variable = sample_quality.FID_WEIGHTS_VARIABLE
    path = tmp_path / "weights.pth"
    monkeypatch.delenv(variable, raising=False)
    assert sample_quality.find_fid_weights() is None
    monkeypatch.setenv(variable, str(path))
    with pytest.raises(UserError, match="is not a file: set it to weights-inception"):
        sample_quality.find_fid_weights()
    for content in (b"", b"not a pickle"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="does not contain the weights of torch-fidelity"):
            sample_quality.find_fid_weights()
    torch.save({"model": {}}, path)  # a checkpoint of something else
    with pytest.raises(UserError, match="does not contain the weights of torch-fidelity"):
        sample_quality.find_fid_weights()
    torch.save({"network": torch.nn.Linear(1, 1)}, path)  # a pickle that could run code
    with pytest.raises(UserError, match="does not contain the weights of torch-fidelity"):
        sample_quality.find_fid_weights()
    torch.save({"network": {}}, path)
    assert sample_quality.find_fid_weights() == path
    monkeypatch.setitem(sys.modules, "torch_fidelity.utils", None)
    with pytest.raises(UserError, match="cannot be imported"):
        sample_quality.find_fid_weights()


def test_fid_compares_rgb_images_of_8_bits(monkeypatch, tmp_path, fidelity):
    monkeypatch.setattr(sample_quality, "MAX_CLASSIFIER_STEPS", 5)
    data = MNISTSample(bits=1, random_flip=False)
    quality = sample_quality.SampleQuality(data, 100, tmp_path / "weights.pth")
    white = quality.evaluate(torch.ones_like(quality.test))
    expected = 255 * (1 - quality.test.float().mean().item())
    assert white["sample_fid"].value == pytest.approx(expected, rel=1e-4)
    assert white["sample_precision"].value == 0.5
    assert white["training_recall"].value == 0.25
    assert white["training_fid"].value < 10
    assert white["sample_fid"].error is None


def test_the_classifier_reports_the_share_of_confident_predictions():
    classifier = sample_quality.Classifier((1, 8, 8), bits=5, num_classes=3).eval()
    images = random_images(5, 20, channels=1)
    label, confidence = classifier.predict(images)
    assert label.shape == confidence.shape == (20,)
    assert torch.equal(classifier(images).argmax(1), label)
    classifier.layers[-1].bias.data[1] = 100.0
    assert classifier.share_readable(images) == 1.0
    classifier.layers[-1].weight.data.zero_()
    classifier.layers[-1].bias.data.zero_()
    assert classifier.share_readable(images) == 0.0
