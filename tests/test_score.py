"""Out-of-distribution scores, their calibration, and `flowgen score`."""

import csv
import io
import logging
import math
import os
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SMALL, save_image
from PIL import Image
from test_cli import assert_error
from test_models import FLOWS, glow, initialized, random_images

import flowgen
from flowgen import cli
from flowgen.bijections.reshape import FactorOut
from flowgen.commands import score as score_module
from flowgen.commands.score import Scorer
from flowgen.config.instantiate import build_data
from flowgen.data.preprocess import ImageStream, read_image
from flowgen.evaluation import latent_directions
from flowgen.evaluation.ood import OODDetector, auroc, log_kernel_density, png_complexity
from flowgen.models.flows.flow import Flow
from flowgen.models.rbm import sampling
from flowgen.utils.errors import UserError

TERMS = [name for name in FLOWS if name != "iaf"]  # models with terms of the log-density
RBM = [
    "model=rbm",
    "data=folder",
    "data.size=8",
    "model.hidden=4",
    "trainer.steps=3",
    "trainer.minutes=null",
]


def made_up_statistics(count: int, **changes: float) -> dict[str, torch.Tensor]:
    """Return statistics of a made-up flow: independent normals with standard deviation 10."""
    means = {
        "log_prob": -500.0,
        "log_base": -1000.0,
        "log_det": 500.0,
        "last_level": -100.0,
        "complexity": 900.0,
    }
    return {name: mean + 10 * torch.randn(count) for name, mean in (means | changes).items()}


def read_csv(path: str | Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


def test_auroc_of_two_gaussians_is_the_closed_form():
    """AUROC = Phi(d / sqrt 2) for unit Gaussians at distance d."""
    for distance in (0.0, 1.0, 2.5):
        result = auroc(torch.randn(2000).double(), distance + torch.randn(2000).double())
        expected = 0.5 * (1 + math.erf(distance / 2))
        assert abs(result.value - expected) < 4 * result.error
        assert 0 < result.error < 0.02
    assert auroc(torch.zeros(50), torch.zeros(50)).value == 0.5
    one_tie_in_four_pairs = auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
    assert one_tie_in_four_pairs.value == 0.875


def test_auroc_error_is_the_spread_over_new_samples():
    results = [
        auroc(torch.randn(300), 1 + torch.randn(300), resamples=100, seed=seed)
        for seed in range(100)
    ]
    spread = torch.tensor([result.value for result in results]).std().item()
    assert results[0].error == pytest.approx(spread, rel=0.3)


def test_p_values_have_the_promised_false_positive_rate():
    detector = OODDetector(made_up_statistics(4000))
    scores = detector.scores(made_up_statistics(4000))
    for name, p_values in detector.p_values(scores).items():
        for rate in (0.01, 0.05, 0.1):
            error = math.sqrt(rate * (1 - rate) * (1 / 4000 + 1 / 2000))
            assert abs((p_values <= rate).double().mean().item() - rate) < 4 * error, name
    small = OODDetector(made_up_statistics(18))  # 9 images calibrate the p-values
    p_values = small.p_values(small.scores(made_up_statistics(500)))
    assert min(values.min().item() for values in p_values.values()) == pytest.approx(1 / 10)


@pytest.mark.parametrize(
    ("changes", "undetected", "detected"),
    [
        (
            {"log_prob": -300.0, "complexity": 300.0},
            ["likelihood"],
            ["complexity", "typicality", "combined", "density_of_states"],
        ),
        (
            {"log_prob": -700.0, "complexity": 1500.0},
            ["complexity"],
            ["likelihood", "typicality", "combined", "density_of_states"],
        ),
        ({"last_level": -200.0}, ["likelihood", "complexity"], ["last_level", "density_of_states"]),
    ],
)
def test_each_score_detects_what_it_is_designed_for(changes, undetected, detected):
    detector = OODDetector(made_up_statistics(1000))
    inliers = detector.scores(made_up_statistics(200))
    outliers = detector.scores(made_up_statistics(200, **changes))
    aurocs = {name: auroc(inliers[name], outliers[name]).value for name in inliers}
    assert all(aurocs[name] > 0.99 for name in detected), aurocs
    assert all(aurocs[name] < 0.6 for name in undetected), aurocs


def test_the_choices_of_the_commands_are_those_of_the_code():
    """The command line imports no torch, so it repeats the names."""
    assert set(cli.SAMPLERS) == set(sampling.SAMPLERS)
    assert set(cli.DIRECTIONS) == set(latent_directions.METHODS)
    statistics = made_up_statistics(8)
    statistics["last_level"] = statistics["log_prob"]
    assert set(cli.OOD_SCORES) == set(OODDetector(statistics).scores(statistics))


def test_calibration_needs_four_images():
    with pytest.raises(UserError, match="at least 4 validation images"):
        OODDetector(made_up_statistics(3))
    scores = OODDetector(made_up_statistics(4)).scores(made_up_statistics(2))
    assert all(values.isfinite().all() for values in scores.values())


def test_percentile_is_the_share_of_more_likely_images():
    detector = OODDetector(made_up_statistics(10) | {"log_prob": torch.arange(10.0)})
    log_prob = torch.tensor([-1.0, 0.0, 4.5, 9.0, 10.0, math.nan, -math.inf])
    scores = detector.scores(made_up_statistics(7) | {"log_prob": log_prob})
    assert detector.percentile(scores).tolist() == [100, 90, 50, 0, 0, 100, 100]


@pytest.mark.parametrize("overflow", [math.nan, -math.inf])
def test_validation_images_without_finite_likelihood_count_as_most_anomalous(
    overflow, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("flowgen"), "propagate", True)
    statistics = made_up_statistics(40)
    statistics["log_prob"][0] = overflow  # fits the scores
    statistics["log_prob"][1] = overflow  # calibrates the p-values
    detector = OODDetector(statistics)
    assert "2 of 40 validation images have scores beyond the range of float32" in caplog.text
    anomaly = made_up_statistics(1, log_prob=-900.0)
    scores = detector.scores(anomaly)
    p_values = detector.p_values(scores)
    for name in ("likelihood", "complexity", "combined", "typicality", "density_of_states"):
        assert p_values[name].item() == pytest.approx(2 / 21), name
    assert detector.percentile(scores).item() == 95
    with pytest.raises(UserError, match="nearly all"):
        OODDetector(statistics | {"log_prob": torch.full((40,), overflow)})


def test_kernel_density_of_gaussian_samples_is_gaussian():
    values = torch.linspace(-2, 2, 5).double()
    expected = -0.5 * values.square() - 0.5 * math.log(2 * math.pi)
    density = log_kernel_density(values, torch.randn(20_000).double())
    assert density == pytest.approx(expected, abs=0.3)


def test_complexity_is_small_for_simple_images():
    ramp = torch.arange(0, 224, 8, dtype=torch.uint8)
    flat = torch.zeros(28, 28)
    slope = (ramp[:, None] + ramp).float()
    random = torch.randint(0, 256, (28, 28)).float()
    images = torch.stack((flat, slope, slope.T.roll(1), random)).to(torch.uint8)[:, None]
    bits_per_pixel = png_complexity(images) / 784
    assert bits_per_pixel[0] < 0.2
    assert bits_per_pixel[1] < 0.6
    assert bits_per_pixel[2] < 0.8
    assert 8 <= bits_per_pixel[3] < 8.2
    row = torch.sin(torch.arange(28.0) / 5)
    column = torch.cos(torch.arange(28.0) / 4)
    surface = (128 + 100 * row[:, None] * column).to(torch.uint8)
    assert png_complexity(surface[None, None]) < 8 * len(png_bytes(surface))


def png_bytes(image: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.numpy()).save(file, "PNG", optimize=True)
    return file.getvalue()


@pytest.mark.parametrize("name", TERMS)
def test_statistics_of_a_flow_add_up_to_its_log_probability(name):
    model = initialized(name)
    images = random_images(5, 4)
    assert isinstance(model, Flow)
    statistics = model.statistics(images, torch.Generator().manual_seed(0))
    log_prob = model.score(images, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(statistics["log_prob"], log_prob, rtol=1e-4)
    x, _ = model._dequantize(images, torch.Generator().manual_seed(0))
    log_density = model.log_density(x)
    assert torch.allclose(statistics["log_base"] + statistics["log_det"], log_density, rtol=1e-4)
    splits = [module for module in model.bijection.modules() if isinstance(module, FactorOut)]
    if not splits:
        assert torch.allclose(statistics["last_level"], log_density, rtol=1e-4)
        return
    inputs = []
    splits[-1].inner.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model.log_density(x)
    z, log_det = splits[-1].inner(inputs[0])
    assert z.shape[1] < model.dimensions
    last_level = torch.distributions.Normal(0, 1).log_prob(z).sum(1) + log_det
    assert torch.allclose(statistics["last_level"], last_level, rtol=1e-4)


@pytest.mark.parametrize("condition_networks", [True, False])
def test_statistics_of_a_class_conditional_flow_are_posterior_means(condition_networks):
    model = FLOWS["glow"](bits=5, num_classes=3, condition_networks=condition_networks)
    images = random_images(5, 4)
    model.initialize(random_images(5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    statistics = model.statistics(images, torch.Generator().manual_seed(0))
    log_prob = model.score(images, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(statistics["log_prob"], log_prob, rtol=1e-5)
    x, _ = model._dequantize(images, torch.Generator().manual_seed(0))
    of_classes = model.class_log_density(x)
    expected = (of_classes.softmax(1) * of_classes).sum(1)
    assert torch.allclose(statistics["log_base"] + statistics["log_det"], expected, rtol=1e-5)


def test_image_stream_reads_files_folders_and_zips_and_counts_broken_images(
    tmp_path, images, caplog
):
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.write(images / "000.png", "a.png")
        archive.writestr("b.png", "not an image")
    paths = [images / "001.png", images, tmp_path / "some.zip"]
    stream = ImageStream(paths, size=8, channels=3, crop=None, bits=5)
    batches = list(stream.batches(16))
    assert len(stream) == 43
    assert [len(names) for names, _ in batches] == [16, 16, 10]
    first = batches[0][1]
    assert first.shape == (16, 3, 8, 8)
    assert first.max() < 32
    assert torch.equal(first[0], first[2])
    assert batches[2][0][-1].endswith("some.zip/a.png")
    assert "1 of 43 images skipped: b.png" in caplog.text
    for path in (tmp_path / "nowhere", tmp_path / "nowhere.zip"):
        with pytest.raises(UserError, match="does not exist"):
            ImageStream([path], size=8, channels=3, crop=None, bits=5)


def test_score_lists_the_most_anomalous_first_and_writes_all(tiny_run, images, command, tmp_path):
    torch.manual_seed(1)
    pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(images / "noise.png")
    stale = f"validation_{16 * 'a'}_{8 * '1'}.pt"
    for name in ("validation_mine.pt", stale):
        (tiny_run / name).touch()
    table = tmp_path / "all.csv"
    picture = tmp_path / "score.png"
    arguments = ["score", images, images / "noise.png", "--run", tiny_run]
    arguments += ["--csv", table, "--out", picture]
    status, output, error = command(*arguments)
    assert status == 0, error
    lines = output.splitlines()
    assert "most anomalous by combined first" in lines[0]
    assert "noise.png" in lines[1]
    assert "and 22 more" in output
    assert len(lines) == 1 + 20 + 1 + 1 + 2
    smallest = float(lines[22].removeprefix("smallest possible p-value: ").split(",")[0])
    rows = read_csv(table)
    assert len(rows) == 42
    p_values = [float(row["combined_p"]) for row in rows]
    assert min(p_values) == pytest.approx(smallest, abs=1e-4)
    columns = {"bits_per_dim", "percentile", "combined", "combined_p", "last_level_p"}
    assert columns <= rows[0].keys()
    worst = max(rows, key=lambda row: float(row["bits_per_dim"]))
    assert worst["image"].endswith("noise.png")
    assert float(worst["percentile"]) == 100
    first_picture = picture.read_bytes()
    assert command(*arguments)[1] == output, "the second time with cached statistics"
    assert picture.read_bytes() == first_picture
    assert len(list(tiny_run.glob("validation_*.pt"))) == 2
    assert (tiny_run / "validation_mine.pt").exists(), "only cached files are deleted"


def test_scores_of_unreadable_images_do_not_replace_a_table(tiny_run, command, tmp_path):
    table = tmp_path / "all.csv"
    table.write_text("mine")
    folder = tmp_path / "unreadable"
    folder.mkdir()
    (folder / "text.png").write_text("not an image")
    status, _, error = command("score", folder, "--run", tiny_run, "--csv", table)
    assert status == 1
    assert "no image could be read" in error
    assert table.read_text() == "mine"


def test_score_prints_the_bits_per_dim_of_the_model(tiny_run, images, command, tmp_path):
    table = tmp_path / "all.csv"
    assert command("score", images / "000.png", "--run", tiny_run, "--csv", table)[0] == 0
    model = flowgen.load(tiny_run)
    pixels = read_image(images / "000.png", 8, 3, None, 5)
    log_prob = model.score(pixels, generator=torch.Generator().manual_seed(0)).item()
    expected = -log_prob / (192 * math.log(2))
    assert float(read_csv(table)[0]["bits_per_dim"]) == pytest.approx(expected, rel=1e-4)


def test_ood_comparison_has_both_directions_if_there_is_a_model_of_the_other_data(
    tiny_run, command, tmp_path
):
    def auroc_rows(output: str) -> dict[str, list[str]]:
        return {line.split()[0]: line.split() for line in output.splitlines() if "±" in line}

    other = tmp_path / "others"
    other.mkdir()
    for number in range(80):
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(other / f"{number}.png")
    arguments = ["score", "--run", tiny_run, "--ood", "data=folder"]
    arguments += ["--ood", f"data.root={os.path.relpath(other)}"]
    status, output, error = command(*arguments)
    assert status == 0, error
    assert "train one" in error
    likelihood = auroc_rows(output)["likelihood"]
    assert float(likelihood[1]) > 0.9
    assert len(likelihood) == 4
    run = "outputs/model.width=8"  # the name of a run of a sweep
    training = [*SMALL, f"data.root={other}", "trainer.steps=2", f"output_dir={run}"]
    assert command("train", *training)[0] == 0
    both = command(*arguments)[1]
    assert len(auroc_rows(both)["likelihood"]) == 7
    assert command("score", "--run", tiny_run, "--ood", run)[1] == both
    noisy = [*training[:-1], "model.gaussianize=false", "model.dequantization=gaussian:0.05"]
    status, _, error = command("train", *noisy, "output_dir=outputs/noisy")  # has no likelihood
    assert status == 0, error
    assert command(*arguments)[1] == both


TOY = {
    "_target_": "flowgen.data.toy2d.Toy2D",
    "name": "moons",
    "num_points": 8,
    "bits": 8,
    "random_flip": False,
}


def scorer_of(model: Flow) -> Scorer:
    detector = OODDetector(made_up_statistics(4))
    return Scorer(model, {"data": TOY}, build_data({"data": TOY}), Path(), detector)


def test_data_of_another_shape_fails_before_any_image_is_scored(monkeypatch):
    checkpoint = {"config": {"data": TOY}}
    monkeypatch.setattr(score_module.runs, "find_checkpoint", lambda name: (None, checkpoint))
    monkeypatch.setattr(score_module, "load_scorer", lambda *args: scorer_of(glow()))
    monkeypatch.setattr(score_module, "compare_ood", lambda *args: pytest.fail("scored"))
    scorer = scorer_of(glow(image_shape=(2, 1, 1), bits=8))
    with pytest.raises(UserError, match="do not fit"):
        list(score_module.ood_comparison(scorer, ["run"], 8, 0, "cpu"))


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        ([], "nothing to score", 2),
        (["nowhere.png"], "does not exist", 1),
        (["nowhere"], "does not exist: choose images", 1),
        (["text.png"], "is not an image", 1),
        (["empty"], "contains no images: choose images", 1),
        (["a.png", "--score", "beauty"], "beauty", 2),
        (["a.png", "--csv", "nowhere/all.csv"], "does not exist: create it", 1),
        (["a.png", "--out", "page.html"], "is not the path of", 2),
        (["a.png", "--count", "1"], "--count", 2),
        (["--ood", "data=cats"], "there is no data=cats: choose one of", 1),
        (["--ood", "data=folder"], "data.root", 1),
        (["--ood", "data=folder", "--ood", "data.colour=3"], "data.colour", 1),
        (["--ood", "data=mnist"], "torchvision", 1),
        (["--ood", "nowhere"], "flowgen runs", 1),
        (["--ood", "a", "--ood", "b"], "accepts one run", 1),
    ],
)
def test_score_errors_are_one_line(
    tiny_run, command, elsewhere, monkeypatch, arguments, message, status
):
    def fail_download(name, folder):
        raise UserError("torchvision could not download it: get it")

    save_image(elsewhere / "a.png")
    (elsewhere / "text.png").write_text("not an image")
    (elsewhere / "empty").mkdir()
    monkeypatch.setattr("flowgen.data.download.download", fail_download)
    assert_error(command("score", *arguments, "--run", tiny_run), message, status)


def test_an_rbm_scores_binarized_images_in_nats(command, images):
    training = [*RBM, f"data.root={images}", "output_dir=outputs/rbm"]
    assert command("train", *training)[0] == 0
    status, _, error = command("score", images, "--csv", "all.csv")
    assert status == 0, error
    rows = read_csv("all.csv")
    assert len(rows) == 40
    assert "bits_per_dim" not in rows[0]
    assert "last_level" not in rows[0]
    assert math.isfinite(float(rows[0]["combined"]))
    assert_error(
        command("score", images, "--score", "last_level"),
        "choose one of likelihood, complexity, combined, typicality",
    )


def test_image_stream_binarizes_at_random_with_the_brightness_as_probability(images):
    sampled = ImageStream([images], size=8, channels=1, crop=None, bits=1, binarization="dynamic")
    exact = ImageStream([images], size=8, channels=1, crop=None, bits=8)
    ((_, bits),) = sampled.batches(40)
    ((_, pixels),) = exact.batches(40)
    expected = pixels.float().mean().item() / 255
    assert bits.float().mean().item() == pytest.approx(expected, abs=0.05)


def test_calibration_is_repeated_after_log_z_is_estimated(command, images):
    def scores() -> list[dict[str, str]]:
        assert command("score", images, "--csv", "all.csv")[0] == 0
        return read_csv("all.csv")

    training = [*RBM, f"data.root={images}", "output_dir=outputs/rbm"]
    assert command("train", *training)[0] == 0
    before = scores()
    assert command("evaluate")[0] == 0
    after = scores()
    assert "unnormalized_log_probability" in before[0]
    assert "log_probability" in after[0]
    for name in ("percentile", "likelihood_p"):
        assert [row[name] for row in after] == [row[name] for row in before]
