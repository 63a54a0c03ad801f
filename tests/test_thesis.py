"""`make reproduce-thesis` with its smallest preset: all figures, and no training twice."""

import base64
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import comparison
import flow_report
import glow_figures
import jobs
import numpy
import pytest
import rbm_figures
import torch
from conftest import save_image
from original_images import original_images
from PIL import Image
from test_architecture import image_shape
from test_models import glow
from test_report import Page

from flowgen.config.compose import compose_config
from flowgen.config.instantiate import build_data, build_model, with_image_shape
from flowgen.config.settings import group_options
from flowgen.data.image_folder import split_names
from flowgen.data.mnist import MNISTSample
from flowgen.data.preprocess import open_source
from flowgen.evaluation.interpolation import interpolate_pairs
from flowgen.utils import rendering

SCRIPT = Path(__file__).parents[1] / "scripts" / "reproduce" / "thesis"
FIGURES = {
    *(f"3.{number}" for number in range(1, 37)),
    *(f"S.{number}" for number in range(1, 9)),
    *(f"C.{number}" for number in range(1, 7)),
    *("B.1", "O.1", "O.2"),
}


@pytest.fixture
def error_of(tmp_path, monkeypatch) -> Callable[..., str]:
    """Run the script in this process with arguments that it must refuse. Return its message."""

    def run(*args: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *args])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return str(caught.value.code)

    return run


def figure_numbers(page: str) -> set[str]:
    """Return the numbers of the figures. A range such as 3.10-3.14 counts as five numbers."""
    numbers = set()
    for first, last in re.findall(r'<figure id="figure-([A-Z\d.]+)(?:-([\d.]+))?">', page):
        chapter, _, start = first.partition(".")
        end = last.partition(".")[2] or start
        numbers |= {f"{chapter}.{number}" for number in range(int(start), int(end) + 1)}
    return numbers


@pytest.mark.slow
def test_a_killed_reproduction_continues_and_makes_every_figure(tmp_path):
    argv = [sys.executable, str(SCRIPT), "--preset", "smoke"]
    killed = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
    folder = tmp_path / "outputs" / "thesis" / "smoke_mnist_sample"
    deadline = time.monotonic() + 600
    while not (folder / "glow_resnet" / "config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    metrics = folder / "glow_conv" / "metrics.jsonl"
    modified = metrics.stat().st_mtime_ns
    result = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "outputs/thesis/smoke_mnist_sample/thesis.html"
    resumed = "output_dir=outputs/thesis/smoke_mnist_sample/glow_resnet resume=true"
    assert resumed in result.stdout
    assert metrics.stat().st_mtime_ns == modified
    assert "smoke_mnist_sample/glow_conv " not in result.stdout
    check_page(folder, (folder / "thesis.html").read_text())


def check_page(folder: Path, text: str) -> None:
    page = Page(text)
    assert page.open == []
    assert not re.search(r"https?://|<script", text)
    assert figure_numbers(text) >= FIGURES
    for source in page.sources:
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).verify()
    assert text.count("<code>") > len(page.sources), "every figure names its command"
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else (folder / link).is_dir()
    num_runs = text.count("Trained by <code>flowgen train experiment=")
    assert num_runs == len(list(folder.glob("*/metrics.jsonl")))
    assert "model.width=8 for 512" in text
    assert "other data than celeba_hq" in text


def test_runs_of_other_images_are_refused(tmp_path, images, error_of):
    folder = tmp_path / "outputs" / "thesis" / "small_folder" / "glow_conv"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "{data: {root: /elsewhere}, model: {}, trainer: {steps: 1, minutes: null}, seed: 0}"
    )
    error = error_of("--preset", "small", "--data", "folder", "--root", str(images))
    assert "/elsewhere" in error
    assert len(error.splitlines()) == 1


def test_original_images_are_random_and_not_cropped_and_broken_files_are_skipped(tmp_path):
    for index in range(40):
        save_image(tmp_path / f"{index:02}.png", (20, 10, 3))
    source = open_source(tmp_path)
    broken, *train = split_names(source)[0]
    (tmp_path / broken).write_bytes(b"not an image")
    section = {"root": str(tmp_path), "search_dirs": [], "download_hint": ""}
    section |= {"size": 8, "channels": 3}
    images, preprocessed = original_images(section, 40, side=40)
    assert images.shape == (len(train), 3, 40, 40)
    assert (images[:, :, :, :10] == 255).all()
    assert (images[:, :, :, 30:] == 255).all()
    loaded = [source.load(name, 8, 3, None) for name in train]
    order = [
        next(index for index, other in enumerate(loaded) if other.equal(image))
        for image in preprocessed
    ]
    assert sorted(order) == list(range(len(train))) != order
    first = bytearray(Image.open(tmp_path / train[order[0]]).tobytes())
    expected = torch.frombuffer(first, dtype=torch.uint8).view(20, 10, 3)
    shown = images[0, :, ::2, 10:30:2].permute(1, 2, 0)
    assert (shown.int() - expected.int()).abs().max() < 30


def test_the_data_figure_shows_random_digits(tmp_path):
    """The embedded digits are sorted by class: the first sixteen are zeros."""
    digits = build_data({"data": jobs.data_section("mnist_sample")})
    train = digits.train
    drawn = glow_figures.random_images(train.images, 16)
    labels = {int(train.labels[(train.images == image).flatten(1).all(1)]) for image in drawn}
    assert len(labels) > 5
    before, after = glow_figures.data_figures(digits, "mnist_sample", None)
    expected = numpy.asarray(rendering.image_grid(drawn, 8, 8, 128), dtype=int)
    assert (numpy.asarray(Image.open(before.path(tmp_path))) == expected).all()
    assert (abs(numpy.asarray(Image.open(after.path(tmp_path))) - expected) <= 1).all()


def test_a_missing_fid_network_is_reported_before_any_training(tmp_path, monkeypatch, error_of):
    monkeypatch.setenv("FID_WEIGHTS", "nowhere.pth")
    assert "FID_WEIGHTS" in error_of("--preset", "smoke")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--preset", "small"], ["CelebA-HQ", "ROOT=FOLDER", "DATA=celeba", "DATA=folder"]),
        (["--preset", "small", "--data", "folder"], ["ROOT="]),
        (["--preset", "full"], ["SCALE=small", "SCALE=night"]),
    ],
)
def test_missing_data_and_gpu_are_reported_before_any_training(
    args, expected, tmp_path, monkeypatch, error_of
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = error_of(*args)
    assert len(error.splitlines()) == 1
    for text in expected:
        assert text in error
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("preset", jobs.PRESETS)
def test_every_training_composes_and_every_preset_file_is_used(preset):
    used = set()
    all_jobs = [job for group in jobs.GROUPS for job in jobs.jobs(preset, group)]
    for job in {job.experiment: job for job in all_jobs}.values():
        args = job.command(preset, ["data=celeba"], Path("run"))[1:]
        used |= {arg.partition("=")[2] for arg in args if arg.startswith("preset=")}
        overrides = [arg for arg in args if arg.partition("=")[0] not in ("output_dir", "resume")]
        config = compose_config(overrides).config
        if "width" in config["model"]:
            config["model"]["width"] = 4
        data = config["data"]
        build_model(with_image_shape(config, image_shape(data), data["bits"]))
    expected = {name for name in group_options("preset") if name.startswith(f"{preset}/")}
    assert used == expected - {"small/faces", "night/faces"}


def test_equal_experiments_rarely_differ_and_different_ones_do():
    """Two standard errors over four sets of samples would be exceeded in 9% of the cases."""
    generator = torch.Generator().manual_seed(0)

    def verdict(first: list[float], second: list[float]) -> str:
        reports = [
            {"samples": [[{"coverage": value} for value in values]]} for values in (first, second)
        ]
        return comparison._test_claim(*reports, "coverage", "").rpartition(": ")[2]

    verdicts = []
    for _ in range(2000):
        first, second = torch.randn(2, 4, generator=generator).tolist()
        verdicts.append(verdict(first, second))
    share = verdicts.count("no significant difference") / len(verdicts)
    assert share == pytest.approx(1 - comparison.SIGNIFICANCE_LEVEL, abs=0.015)
    assert verdicts.count("confirmed") > 10
    assert verdicts.count("contradicted") > 10
    low = [0.2, 0.21, 0.22, 0.23]
    high = [0.4, 0.41, 0.42, 0.43]
    assert verdict(low, high) == "confirmed"
    assert verdict(high, low) == "contradicted"
    assert verdict([0.5] * 4, [0.5] * 4) == "no significant difference"


def test_the_best_rbm_is_named_if_all_sizes_were_trained():
    likelihoods = {
        "filters_100": -90.0,
        **{f"l2_1e3_{hidden}": -100.0 + hidden / 100 for hidden in (50, 100, 300)},
        "l1_1e6_100": -80.0,
    }
    sentence = rbm_figures.compare_claims(
        {name: (value, 0.1) for name, value in likelihoods.items()}
    )
    assert "is that of l2_1e3_300" in sentence
    assert "L1 prior 300 hidden units at 1e-6: this preset does not train all" in sentence


def test_distance_from_mean_is_one_for_a_real_point_and_zero_for_the_mean():
    real = 3 + torch.randn(500, 8)
    distance = flow_report.distance_from_mean
    assert distance(real.mean(0), real) == pytest.approx(0, abs=1e-5)
    distances = torch.tensor([distance(point, real) for point in real])
    assert distances.mean().item() == pytest.approx(1, abs=1e-4)


def test_flow_report_compares_samples_with_test_images():
    """Test images as samples have the best quality; gray images have none of it."""
    data, model = MNISTSample(bits=5, random_flip=False), glow(image_shape=(1, 28, 28), levels=2)
    test = torch.cat(list(data.batches("test", 100, 60)))
    model.initialize(test)
    samples = {0.0: [torch.full_like(test, 4)], 1.0: [test, test]}
    report = flow_report.flow_report(model, data, samples, pairs=4, steps=6)
    gray, same = report["samples"][0][0], report["samples"][1][0]
    assert same["coverage"] == 1
    assert same["spread"] == pytest.approx(1)
    assert same["frechet"] == pytest.approx(0, abs=1e-3)
    assert gray["coverage"] < 0.75
    assert gray["spread"] == 0
    assert gray["frechet"] > report["training"]["frechet"]
    assert report["images"] == len(report["bits"]) == 60
    assert report["mean_sample"] > 0
    mean_bits = flow_report.bits_per_dim_of_images(model, test).mean().item()
    assert mean_bits == pytest.approx(sum(report["bits"]) / 60)
    assert len(report["walk"]["unevenness"]) == 4
    assert [len(bits) for bits in report["walk"]["bits"]] == [6, 6]
    assert report == json.loads(json.dumps(report)), "the report must be plain data"


def test_flow_report_mixes_the_classes_of_sorted_images(monkeypatch):
    """Images in the order of their classes would compare digits 0 and 1 with all digits."""
    data, model = MNISTSample(bits=5, random_flip=False), glow(image_shape=(1, 28, 28), levels=2)
    test = torch.cat(list(data.batches("test", 100, 200)))
    model.initialize(test)
    pairs = []

    def record_pairs(model, first, second, fractions):
        pairs.extend((first, second))
        return interpolate_pairs(model, first, second, fractions)

    monkeypatch.setattr(flow_report, "interpolate_pairs", record_pairs)
    report = flow_report.flow_report(model, data, {1.0: [test]}, pairs=16, steps=2)
    assert report["training"]["coverage"] > 0.85
    assert report["training"]["frechet"] < 10
    images = data.test.images.flatten(1) >> 3
    classes = [
        {int(data.test.labels[(images == image.flatten()).all(1)][0]) for image in side}
        for side in pairs
    ]
    assert min(map(len, classes)) > 4
