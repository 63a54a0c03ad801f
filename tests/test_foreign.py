"""Files from strangers: errors are plain, no code of them runs, no link leads outside."""

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL, save_image
from PIL import Image

from flowgen.config.instantiate import instantiate
from flowgen.data.mnist import MNIST
from flowgen.training.checkpoint import read_checkpoint
from flowgen.training.run_dir import Run
from flowgen.utils.errors import UserError

FOREIGN_ROWS = [
    b'{"step": 7, "split": "train", "loss": \xff}',
    b"[1, 2]",
    b"7",
    b"{}",
    b'{"step": 7}',
    b'{"split": "test"}',
    b'{"step": -1, "split": "test"}',
    b'{"step": true, "split": "test"}',
    b'{"step": 1e3, "split": "test"}',
    b'{"step": 1' + 400 * b"0" + b', "split": "test"}',
    b'{"step": 1' + 5000 * b"0" + b', "split": "test"}',
    b'{"step": 7, "split": 3}',
    b'{"step": 7, "split": "test", "bits_per_dim": "low"}',
    b'{"step": 7, "split": "test", "bits_per_dim": 3, "bits_per_dim_error": []}',
    b'{"step": 7, "split": "validation", "bits_per_dim": Infinity}',
    b'{"step": 7, "split": "validation", "bits_per_dim": -1e308}',
    b'{"step": 7, "split": "train", "loss": NaN}',
    b'{"step": 7, "split": "train", "loss": true}',
    b'{"step": 7, "split": "train", "seconds": "long", "images_per_second": 3}',
    b'{"step": 7, "split": "train", "more": {"a": 1}}',
    b"[" * 100_000,
    b'{"step": 7, "split": "tr',
]


def assert_plain(error: str, *texts: object) -> None:
    """Check that the output has one error line with these texts and is not an internal error."""
    assert error.count("flowgen: ") == 1, error
    assert "--debug" not in error, error
    assert all(str(text) in error for text in texts), error


def test_rows_that_no_training_writes_are_skipped_and_counted(tiny_run, command):
    metrics = Run(tiny_run).metrics
    rows = Run(tiny_run).read_metrics()
    metrics.write_bytes(metrics.read_bytes() + b"\n".join(FOREIGN_ROWS) + b"\n")
    assert Run(tiny_run).read_metrics() == rows
    status, _, error = command("report", tiny_run)
    assert status == 0, error
    assert f"{len(FOREIGN_ROWS)} of {len(FOREIGN_ROWS) + len(rows)} lines" in error
    assert "--debug" not in error
    assert command("resume", tiny_run, "trainer.steps=7")[0] == 0
    rows = Run(tiny_run).read_metrics()
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4, 5, 6, 7]


def test_run_folder_with_other_content_is_used_without_it(tiny_run, command):
    run = Run(tiny_run)
    run.log.write_bytes(b"\xff environment: \xfe\n")
    run.evaluation.write_text("[" * 100_000)
    assert command("report", tiny_run)[0] == 0
    assert command("sample", "--run", tiny_run)[0] == 0


NAMES = (
    "config.yaml",
    "metrics.jsonl",
    "evaluation.json",
    "train.log",
    "sample.png",
    "checkpoints/last.pt",
    "checkpoints/last.pt.part",
    "samples",
)


def modification_times(path: Path) -> list[tuple[str, int]]:
    return sorted((file.name, file.stat().st_mtime_ns) for file in (path, *path.rglob("*")))


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_run_folder_reads_and_writes_nothing_outside_itself(tiny_run, command, tmp_path, kind):
    backup = tmp_path / "backup"
    for name in NAMES:
        path = tiny_run / name
        secret = tmp_path / f"secret of {name.replace('/', ' ')}"
        if path.is_dir():
            shutil.copytree(path, secret)
        else:
            secret.write_text("secret")
        before = modification_times(secret)
        if path.exists():
            path.rename(backup)
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(secret)
        for arguments in (
            ["resume", tiny_run, "trainer.steps=7"],
            ["sample", "--run", tiny_run],
            ["report", tiny_run],
        ):
            status, _, error = command(*arguments)
            assert status == 1, (name, error)
            assert_plain(error, path)
        assert modification_times(secret) == before
        path.unlink()
        if backup.exists():
            backup.rename(path)


def test_lock_does_not_follow_links(tiny_run, command, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    lock = tiny_run / ".lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(secret)
    status, _, error = command("resume", tiny_run, "trainer.steps=7")
    assert status == 1
    assert_plain(error, ".lock")
    assert secret.read_text() == "secret"


def test_files_outside_a_run_leave_their_folder_unchanged(tiny_run, command, tmp_path, elsewhere):
    """Commands write what they make of a model file to a folder under outputs/."""
    folder = tmp_path / "mine"
    folder.mkdir()
    assert command("export", tiny_run, folder / "one.safetensors")[0] == 0
    shutil.copy(Run(tiny_run).last, folder / "other.pt")
    (folder / "holiday.png").symlink_to(save_image(tmp_path / "secret.png"))
    for name in ("validation_mine.pt", "evaluation.json", "sample.png", "score.png", "train.log"):
        (folder / name).write_text("mine")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for file in ("one.safetensors", "other.pt"):
        status, output, error = command("sample", "--run", folder / file, "--count", 2)
        assert status == 0, error
        assert output.strip() == f"outputs/files/{Path(file).stem}/sample.png"
    assert command("resume", folder / "other.pt", "trainer.steps=7")[0] == 0
    assert Run(elsewhere / "outputs" / "files" / "other").read_metrics()[-1]["step"] == 7
    status, _, error = command("resume", folder / "other.pt", "trainer.steps=8")
    assert status == 1
    assert_plain(error, "outputs/files/other holds a run already")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


PARTS = (
    {"images_seen": -1},
    {"step": True},
    {"nan_recovery": {"failed": "often"}},
    {"nan_recovery": {"nonsense": 1}},
    {"nan_recovery": None},
    {"progress": {"best": math.nan, "seconds": 1.0}},
    {"progress": {"best": 1.0, "seconds": -1.0}},
    {"progress": {"best": 1.0, "seconds": math.inf}},
    {"progress": {"best": 1.0}},
    {"optimizer": {}},
    {"optimizer": {"state": {0: {"exp_avg": 1}}, "param_groups": []}},
    "moments",
    "shapes",
    "words",
    "first format",
)


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_checkpoints_with_values_that_no_training_writes(tiny_run, command, part):
    path = Run(tiny_run).last
    state = read_checkpoint(path)
    moments = state["optimizer"]["state"][0]
    if part == "moments":
        del moments["exp_avg"]
    elif part == "shapes":
        moments["exp_avg"] = moments["exp_avg"][:0]
    elif part == "words":
        moments["exp_avg"] = "large"
    elif part == "first format":
        del state["format"]
        state["model"] = {3: state["model"]}
    torch.save(state | part if isinstance(part, dict) else state, path.with_name("other.pt"))
    status, _, error = command("resume", path.with_name("other.pt"), "trainer.steps=8")
    assert status == 1
    assert_plain(error, "checkpoint")


REFERENCES = (
    ("model.width=${nope}", "model.width"),
    ("model.width=${oc.env:FLOWGEN_NOTHING}", "model.width"),
    ("model.width=${model.width}", "model.width"),
    ("model.width=${", "model.width"),
    ("model.width=${nope:3}", "model.width"),
    ("data.root=${nope}", "data.root"),
)


@pytest.mark.parametrize(("override", "text"), REFERENCES)
def test_references_to_unknown_values_get_one_line(
    images, tiny_run, command, tmp_path, override, text
):
    run = f"output_dir={tmp_path / 'other'}"
    for arguments in (
        ["train", *SMALL, f"data.root={images}", "trainer.steps=1", run, override],
        ["resume", tiny_run, override],
        ["evaluate", "--run", tiny_run, override],
    ):
        status, _, error = command(*arguments)
        assert status == 1, error
        assert_plain(error, text)


def test_warnings_of_libraries_about_a_file_are_not_shown(tiny_run, command, tmp_path, monkeypatch):
    # Pillow warns of larger images, and refuses images of more than twice the size.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    picture = save_image(tmp_path / "bomb.png", (70, 70, 3))
    broken = tmp_path / "exif.jpg"
    Image.open(picture).save(broken, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x63\x01\x12")
    for arguments in (["interpolate", picture, picture], ["score", broken, picture]):
        status, _, error = command(*arguments, "--run", tiny_run)
        assert status == 0, error
        assert error == ""
    huge = save_image(tmp_path / "huge.png", (100, 100, 3))
    status, _, error = command("interpolate", huge, picture, "--run", tiny_run)
    assert status == 1
    assert len(error.splitlines()) == 1
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    status, _, error = command("sample", "--run", tmp_path / "old.pt")
    assert status == 1
    assert len(error.splitlines()) == 1


def test_report_escapes_scripts(tiny_run, command):
    run = Run(tiny_run)
    script = "<script>alert(1)</script>"
    target = "flowgen.models.flows.glow.Glow"
    config = run.config.read_text().replace(target, f"flowgen.models.{script}")
    run.config.write_text(config + f"'{script}': '{script}'\n")
    run.log.write_text(f"environment: {script}\n")
    row = json.dumps({"step": 1, "split": script, "bits_per_dim": 3.0})
    run.metrics.write_text(f"{row}\n{run.metrics.read_text()}")
    other = tiny_run.with_name('x"><img src=x onerror=alert(1)>')
    tiny_run.rename(other)
    assert command("report", other, "--out", "page.html")[0] == 0
    page = Path("page.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "javascript:" not in page


def test_control_characters_are_escaped_on_the_terminal(tiny_run, command):
    state = read_checkpoint(Run(tiny_run).last)
    state["config"]["model"]["_target_"] = "os.\x1b[31msystem"
    torch.save(state, tiny_run / "odd.pt")
    assert "\x1b" not in command("sample", "--run", tiny_run / "odd.pt")[2]
    Path("outputs").mkdir()
    tiny_run.rename(Path("outputs") / "a\x1b[2J")
    status, output, _ = command("runs")
    assert status == 0
    assert "\x1b" not in output
    assert "a\\x1b[2J" in output


@pytest.mark.parametrize("names", [["../elsewhere"], ["/tmp/elsewhere"], [""], [3]])
def test_search_dirs_must_be_inside_the_data_folder(names):
    with pytest.raises(UserError, match="inside the data"):
        MNIST(name="MNIST", root=None, search_dirs=names, size=28, bits=8, random_flip=False)


TARGET = {"_target_": "flowgen.models.flows.glow.Glow", "image_shape": [1, 8, 8], "bits": 5}
TARGETS = [
    ({"_target_": "os.system"}, "not part of flowgen"),
    ({"_target_": "flowgen.utils.processes.launch"}, "not a class of flowgen.models"),
    ({"_target_": "flowgen.data.mnist.MNIST"}, "not a class of flowgen.models"),
    ({"_target_": "flowgen.models.base.check_whole"}, "not a class of flowgen.models"),
    ({"_target_": "flowgen.models.base.nothing"}, "does not exist"),
    ({"levels": {"_target_": "os.getcwd"}}, "not part of flowgen"),
    ({"levels": [{"_target_": "os.getcwd"}]}, "not part of flowgen"),
    ({"levels": {"deep": [{"_target_": "os.getcwd"}]}}, "not part of flowgen"),
    ({"_partial_": True}, "not a setting"),
    ({"_args_": [1]}, "not a setting"),
    ({"_recursive_": False}, "not a setting"),
    ({"_convert_": "none"}, "not a setting"),
    ({"network": "${oc.env:HOME}"}, "write its value"),
    ({"network": "???"}, "write its value"),
    ({"levls": 1}, "levls is not a setting, did you mean levels.: see conf/model/glow.yaml"),
]


@pytest.mark.parametrize(("change", "message"), TARGETS)
def test_only_classes_of_the_allowed_packages_are_built(change, message):
    with pytest.raises(UserError, match=message):
        instantiate("model", TARGET | change)


def test_references_in_a_configuration_are_not_resolved(tiny_run, command, monkeypatch):
    monkeypatch.setenv("FLOWGEN_SECRET", "the secret")
    state = read_checkpoint(Run(tiny_run).last)
    state["config"]["data"] |= {"root": "nowhere", "download_hint": "${oc.env:FLOWGEN_SECRET}"}
    torch.save(state, Run(tiny_run).last)
    for arguments in (["evaluate", "--run", tiny_run], ["resume", tiny_run, "trainer.steps=8"]):
        status, _, error = command(*arguments)
        assert status == 1
        assert "${oc.env:FLOWGEN_SECRET}" in error
        assert "the secret" not in error
    config = Run(tiny_run).config
    config.write_text(config.read_text() + "more: ${oc.env:FLOWGEN_SECRET}\n")
    assert command("report", tiny_run)[0] == 0
    assert "the secret" not in (tiny_run / "report.html").read_text()
