"""`make reproduce-thesis` at its smallest scale: every figure is there, and what is finished is not run again."""

import base64
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from test_report import Page

SCRIPT = Path(__file__).parents[1] / "scripts" / "thesis"
NUMBERED = {f"3.{number}" for number in range(1, 37)}


def reproduce(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], cwd=folder, capture_output=True, text=True, check=False)


def numbers(page: str) -> set[str]:
    """Of the figures, ranges spelt out: 3.10-3.14 is five."""
    found = set()
    for first, last in re.findall(r'<figure id="figure-([A-Z\d.]+)(?:-([\d.]+))?">', page):
        chapter, _, start = first.partition(".")
        end = last.partition(".")[2] or start
        found |= {f"{chapter}.{number}" for number in range(int(start), int(end) + 1)}
    return found


def test_every_figure_is_made_and_a_killed_reproduction_goes_on(tmp_path):
    first = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--scale", "smoke"], cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True
    )
    folder = tmp_path / "outputs" / "thesis" / "smoke_mnist_sample"
    deadline = time.monotonic() + 120
    while not (folder / "glow_resnet" / "config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    noted = (folder / "glow_conv" / "done").stat().st_mtime_ns
    again = reproduce("--scale", "smoke", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == "outputs/thesis/smoke_mnist_sample/thesis.html"
    assert "$ flowgen resume outputs/thesis/smoke_mnist_sample/glow_resnet" in again.stdout
    assert (folder / "glow_conv" / "done").stat().st_mtime_ns == noted and "glow_conv " not in again.stdout
    text = (folder / "thesis.html").read_text()
    page = Page(text)
    assert page.open == [] and not re.search(r"https?://|<script", text)
    assert numbers(text) >= NUMBERED | {"B.1"} | {f"S.{n}" for n in range(1, 9)} | {f"C.{n}" for n in range(1, 7)} | {
        "O.1",
        "O.2",
    }
    for source in page.sources:
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).verify()
    assert text.count("<code>") > len(page.sources), "every figure names its command"
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else (folder / link).is_dir()
    assert text.count("Trained by <code>flowgen train experiment=") == len(list(folder.glob("*/done")))
    assert "model.width=8 for 512" in text and "other data than celeba_hq" in text


def test_runs_of_other_images_are_not_mixed_in(tmp_path, images):
    folder = tmp_path / "outputs" / "thesis" / "small_folder" / "glow_conv"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{data: {root: /elsewhere}, model: {}, trainer: {steps: 1, minutes: null}}")
    ended = reproduce("--scale", "small", "--data", "folder", "--root", str(images), folder=tmp_path)
    assert ended.returncode == 1 and "/elsewhere" in ended.stderr and len(ended.stderr.splitlines()) == 1


def test_fid_without_its_network_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("FID_WEIGHTS", "nowhere.pth")
    ended = reproduce("--scale", "smoke", folder=tmp_path)
    assert ended.returncode == 1 and "FID_WEIGHTS" in ended.stderr and not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scale", "small"], ["CelebA-HQ", "ROOT=FOLDER", "DATA=celeba", "DATA=folder"]),
        (["--scale", "small", "--data", "folder"], ["ROOT="]),
        (["--scale", "full"], ["SCALE=small"]),
    ],
)
def test_what_is_missing_is_said_before_anything_is_trained(words, said, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ended = reproduce(*words, folder=tmp_path)
    assert ended.returncode == 1 and len(ended.stderr.splitlines()) == 1 and all(word in ended.stderr for word in said)
    assert not (tmp_path / "outputs").exists()
