"""`make reproduce-thesis` at its smallest scale: every figure is there, and what is finished is not run again."""

import base64
import io
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
import machines
import parts
import pytest
import torch
from conftest import save_image
from original_images import original_images
from PIL import Image
from test_architecture import compose_config, shape_of
from test_report import Page

from flowgen.config.compose import group_options
from flowgen.config.instantiate import build_model, with_image_shape
from flowgen.data.image_folder import split_names
from flowgen.data.preprocess import open_source

SCRIPT = Path(__file__).parents[1] / "scripts" / "thesis"
NUMBERED = {f"3.{number}" for number in range(1, 37)}


def reproduce(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def refused(tmp_path, monkeypatch) -> Callable[..., str]:
    """What it says in this process where it ends at once; before anything is trained."""

    def run(*words: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return str(ended.value.code)

    return run


def numbers(page: str) -> set[str]:
    """Of the figures, ranges spelt out: 3.10-3.14 is five."""
    found = set()
    for first, last in re.findall(r'<figure id="figure-([A-Z\d.]+)(?:-([\d.]+))?">', page):
        chapter, _, start = first.partition(".")
        end = last.partition(".")[2] or start
        found |= {f"{chapter}.{number}" for number in range(int(start), int(end) + 1)}
    return found


@pytest.mark.long
def test_every_figure_is_made_and_a_killed_reproduction_goes_on(tmp_path):
    first = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--scale", "smoke"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    folder = tmp_path / "outputs" / "thesis" / "smoke_mnist_sample"
    deadline = time.monotonic() + 600
    while not (folder / "glow_resnet" / "config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    noted = (folder / "glow_conv" / "metrics.jsonl").stat().st_mtime_ns
    again = reproduce("--scale", "smoke", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == "outputs/thesis/smoke_mnist_sample/thesis.html"
    assert "output_dir=outputs/thesis/smoke_mnist_sample/glow_resnet resume=true" in again.stdout
    assert (
        folder / "glow_conv" / "metrics.jsonl"
    ).stat().st_mtime_ns == noted and "smoke_mnist_sample/glow_conv " not in again.stdout
    text = (folder / "thesis.html").read_text()
    page = Page(text)
    assert page.open == [] and not re.search(r"https?://|<script", text)
    assert numbers(text) >= NUMBERED | {"B.1"} | {f"S.{n}" for n in range(1, 9)} | {
        f"C.{n}" for n in range(1, 7)
    } | {
        "O.1",
        "O.2",
    }
    for source in page.sources:
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).verify()
    assert text.count("<code>") > len(page.sources), "every figure names its command"
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else (folder / link).is_dir()
    assert text.count("Trained by <code>flowgen train experiment=") == len(
        list(folder.glob("*/metrics.jsonl"))
    )
    assert "model.width=8 for 512" in text and "other data than celeba_hq" in text


def test_runs_of_other_images_are_not_mixed_in(tmp_path, images, refused):
    folder = tmp_path / "outputs" / "thesis" / "small_folder" / "glow_conv"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "{data: {root: /elsewhere}, model: {}, trainer: {steps: 1, minutes: null}, seed: 0}"
    )
    said = refused("--scale", "small", "--data", "folder", "--root", str(images))
    assert "/elsewhere" in said and len(said.splitlines()) == 1


def test_originals_are_shown_before_they_are_cut_and_broken_files_are_passed_over(tmp_path):
    for number in range(40):
        save_image(tmp_path / f"{number:02}.png", (20, 10, 3))
    config = {"root": str(tmp_path), "search_dirs": [], "download_hint": ""}
    train = split_names(open_source(tmp_path))[0]
    (tmp_path / train[0]).write_bytes(b"no image")
    found = original_images(config, 3, side=40)
    assert (
        found.shape == (3, 3, 40, 40)
        and (found[:, :, :, :10] == 255).all()
        and (found[:, :, :, 30:] == 255).all()
    )
    first = torch.frombuffer(
        bytearray(Image.open(tmp_path / train[1]).tobytes()), dtype=torch.uint8
    ).view(20, 10, 3)
    assert (found[0, :, ::2, 10:30:2].permute(1, 2, 0).int() - first.int()).abs().max() < 30


def test_fid_without_its_network_is_refused_before_anything_is_trained(
    tmp_path, monkeypatch, refused
):
    monkeypatch.setenv("FID_WEIGHTS", "nowhere.pth")
    assert "FID_WEIGHTS" in refused("--scale", "smoke") and not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scale", "small"], ["CelebA-HQ", "ROOT=FOLDER", "DATA=celeba", "DATA=folder"]),
        (["--scale", "small", "--data", "folder"], ["ROOT="]),
        (["--scale", "full"], ["SCALE=small"]),
    ],
)
def test_what_is_missing_is_said_before_anything_is_trained(
    words, said, tmp_path, monkeypatch, refused
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = refused(*words)
    assert (
        len(found.splitlines()) == 1
        and all(word in found for word in said)
        and not (tmp_path / "outputs").exists()
    )


@pytest.mark.parametrize("scale", parts.SCALES)
def test_every_training_of_a_scale_composes_and_every_settings_file_is_of_use(scale):
    used = set()
    for part in {
        part.experiment: part for group in parts.GROUPS for part in parts.parts(scale, group)
    }.values():
        words = [
            word
            for word in part.command(scale, ["data=celeba"], Path("here"))[1:]
            if word.partition("=")[0] not in ("out", "resume")
        ]
        used |= {word.partition("=")[2] for word in words if word.startswith("scale=")}
        config = compose_config(*words)
        config["model"] |= {"width": 4} if "width" in config["model"] else {}
        build_model(with_image_shape(config, shape_of(config["data"]), config["data"]["bits"]))
    assert used == {
        name
        for name in group_options("scale")
        if name.startswith(f"{scale}/") and name != "small/faces"
    }


def test_no_difference_is_rarely_found_and_a_clear_one_is():
    """Two standard errors over four draws would be exceeded in 9 % of the cases."""
    random = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2000):
        one, two = torch.randn(2, 4, generator=random).tolist()
        likeness = [
            {"samples": [[{"coverage": value} for value in values]]} for values in (one, two)
        ]
        found.append(comparison._more(*likeness, "coverage", "").rpartition(": ")[2])
    assert found.count("no difference found") / 2000 == pytest.approx(
        1 - comparison.LEVEL, abs=0.015
    )
    assert found.count("found") > 10 and found.count("the opposite is found") > 10
    low, high = (
        {"samples": [[{"coverage": start + step / 100} for step in range(4)]]}
        for start in (0.2, 0.4)
    )
    assert comparison._more(low, high, "coverage", "").endswith(": found")
    assert comparison._more(high, low, "coverage", "").endswith(": the opposite is found")


def test_what_never_varies_is_no_finding():
    same = {"samples": [[{"coverage": 0.5}] * 4]}
    assert comparison._more(same, same, "coverage", "").endswith(": no difference found")


def test_the_best_machine_is_named_where_all_were_trained():
    trained = {
        "filters_100": -90.0,
        **{f"l2_1e3_{hidden}": -100.0 + hidden / 100 for hidden in (50, 100, 300)},
        "l1_1e6_100": -80.0,
    }
    said = machines.best_of_prior({name: (value, 0.1) for name, value in trained.items()})
    assert "is that of l2_1e3_300" in said and "L1 prior 300 hidden units at 1e-6: not all" in said


def test_the_reproduction_stays_short():
    assert (
        sum(len(path.read_text().splitlines()) for path in SCRIPT.iterdir() if path.is_file())
        <= 600
    )
