"""No command loses files of the user, and work is not lost to a bad path."""

import csv
import shutil
import subprocess
import sys

import pytest
from conftest import SMALL, save_image
from PIL import Image

from flowgen.training.run_dir import Run
from flowgen.utils import rendering


def test_a_failed_training_leaves_the_files_that_were_there(images, tmp_path, command):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "train.log").write_text("precious")
    wrong = [*SMALL, f"data.root={images}", "trainer.steps=1", "model.width=-1"]
    assert command("train", *wrong, f"output_dir={folder}")[0] == 1
    assert [path.name for path in folder.iterdir()] == ["train.log"]
    assert (folder / "train.log").read_text() == "precious"
    assert command("train", *wrong, f"output_dir={tmp_path / 'new'}")[0] == 1
    assert not (tmp_path / "new").exists()


def test_checkpoints_of_another_program_are_not_replaced(images, tmp_path, command):
    checkpoint = tmp_path / "project" / "checkpoints" / "last.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("precious")
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=1"]
    status, _, error = command("train", *overrides, f"output_dir={tmp_path / 'project'}")
    assert status == 1 and "choose another output_dir=" in error and error.count("\n") == 1
    assert checkpoint.read_text() == "precious"


def test_corrected_settings_can_use_the_folder_of_a_failed_training(images, tmp_path, command):
    run = tmp_path / "run"
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=1", f"output_dir={run}"]
    assert command("train", *overrides, "trainer.batch_size=1000000000")[0] == 1
    assert command("train", *overrides)[0] == 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["evaluation.samples=5"], "samples must be a whole number of at least 100"),
        (["resume=maybe"], "resume must be"),
        (["evaluation.compress=no"], "compress must be"),
    ],
)
def test_a_wrong_setting_of_later_commands_is_refused_before_training(
    images, tmp_path, command, overrides, expected
):
    small = [*SMALL, f"data.root={images}", "trainer.steps=1", f"output_dir={tmp_path / 'run'}"]
    status, _, error = command("train", *small, *overrides)
    assert status == 1 and expected in error
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_stays_in_its_folder(tiny_run, command):
    status, _, error = command("resume", tiny_run, "output_dir=elsewhere", "trainer.steps=8")
    assert status == 1 and "stays in its folder" in error


@pytest.mark.parametrize("name", ["interpolate", "complete", "edit", "score"])
def test_a_picture_does_not_replace_an_input(tiny_run, command, tmp_path, name):
    photo = save_image(tmp_path / "photo.png")
    before = photo.read_bytes()
    options = {
        "interpolate": [photo],
        "complete": ["--known", "left"],
        "edit": ["--attribute", "0"],
        "score": [],
    }[name]
    status, _, error = command(name, photo, *options, "--run", tiny_run, "--out", photo)
    assert status == 1 and "is an input of this command" in error
    assert photo.read_bytes() == before


def test_a_table_replaces_no_input_and_survives_a_failure(tiny_run, command, tmp_path):
    photo = save_image(tmp_path / "photo.png")
    before = photo.read_bytes()
    assert command("score", photo, "--run", tiny_run, "--csv", photo)[0] == 1
    assert photo.read_bytes() == before
    table = tmp_path / "scores.csv"
    table.write_text("precious")
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(before[:60])
    assert command("score", damaged, "--run", tiny_run, "--csv", table)[0] == 1
    assert table.read_text() == "precious"
    assert command("score", photo, "--run", tiny_run, "--csv", table)[0] == 0
    assert len(list(csv.reader(table.open()))) == 2


def test_a_picture_that_cannot_be_written_keeps_the_previous_one(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    picture = Image.new("RGB", (8, 8))
    rendering.save_picture(picture, path)
    before = path.read_bytes()

    def fill_disk(image, file, *args, **kwargs):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_disk)
    with pytest.raises(OSError, match="No space"):
        rendering.save_picture(picture, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_evaluation_that_cannot_be_stored_is_printed(tiny_run, command, monkeypatch):
    def fail(self, checkpoint, results):
        raise OSError(30, "Read-only file system", "evaluation.json.part")

    monkeypatch.setattr(Run, "save_evaluation", fail)
    status, output, error = command("evaluate", "--run", tiny_run)
    assert status == 0 and "bits_per_dim" in output and "not stored" in error


def test_a_report_replaces_reports_only(two_runs, command, elsewhere):
    page = elsewhere / "report.html"
    page.write_text("precious")
    runs = [two_runs / "glow", two_runs / "rbm"]
    status, _, error = command("report", *runs)
    assert status == 1 and "is not a report of flowgen" in error
    assert page.read_text() == "precious"
    page.unlink()
    assert command("report", *runs)[0] == command("report", *runs)[0] == 0


@pytest.mark.parametrize("name", ["report", "resume"])
def test_an_exported_model_has_no_training_to_continue(command, elsewhere, name):
    status, _, error = command(name, "zoo/glow_mnist")
    assert status == 1 and "zoo/glow_mnist is an exported model" in error
    assert error.count("\n") == 1


def test_an_output_that_is_a_folder_is_refused_before_any_work(tiny_run, command, tmp_path):
    folder = tmp_path / "grid.png"
    folder.mkdir()
    status, _, error = command("sample", "--run", tiny_run, "--out", folder)
    assert status == 2 and "is a folder" in error


def test_a_closed_pipe_is_no_failure():
    command = [sys.executable, "-m", "flowgen", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_commands_run_without_standard_error(tiny_run, command, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    copy = shutil.copytree(tiny_run, tmp_path / "copy")
    assert command("sample", "--run", copy, "--out", tmp_path / "grid.png")[0] == 0
