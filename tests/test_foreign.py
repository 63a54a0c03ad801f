"""Files from elsewhere: what no flowgen wrote gets a plain sentence, or is left out and counted; nothing of it runs, none leads outside."""

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


def test_rows_that_no_training_writes_are_left_out_and_counted(tiny_run, command):
    metrics = Run(tiny_run).metrics
    good = Run(tiny_run).read_metrics()
    metrics.write_bytes(metrics.read_bytes() + b"\n".join(FOREIGN_ROWS) + b"\n")
    assert Run(tiny_run).read_metrics() == good
    status, _, error = command("report", tiny_run)
    assert (
        status == 0
        and f"{len(FOREIGN_ROWS)} of {len(FOREIGN_ROWS) + len(good)} lines" in error
        and "fault" not in error
    )
    assert command("resume", tiny_run, "trainer.steps=7")[0] == 0
    assert [row["step"] for row in Run(tiny_run).read_metrics() if row["split"] == "train"] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    ]


def test_a_run_folder_of_other_things_is_reported_without_them(tiny_run, command):
    run = Run(tiny_run)
    run.log.write_bytes(b"\xff environment: \xfe\n")
    run.evaluation.write_text("[" * 100_000)
    assert command("report", tiny_run)[0] == 0 and command("sample", "--run", tiny_run)[0] == 0


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


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_run_folder_reads_and_writes_nothing_outside_itself(tiny_run, command, tmp_path, kind):
    def state_of(path: Path) -> list[tuple[str, int]]:
        return sorted((each.name, each.stat().st_mtime_ns) for each in (path, *path.rglob("*")))

    for name in NAMES:
        path, secret, aside = (
            tiny_run / name,
            tmp_path / f"secret of {name.replace('/', ' ')}",
            tmp_path / "aside",
        )
        shutil.copytree(path, secret) if path.is_dir() else secret.write_text("secret")
        before = state_of(secret)
        if path.exists():
            path.rename(aside)
        os.mkfifo(path) if kind == "pipe" else path.symlink_to(secret)
        for words in (
            ["resume", tiny_run, "trainer.steps=7"],
            ["sample", "--run", tiny_run],
            ["report", tiny_run],
        ):
            status, _, error = command(*words)
            assert (
                status == 1
                and error.count("flowgen: ") == 1
                and str(path) in error
                and "fault" not in error
            ), (name, error)
        assert state_of(secret) == before
        path.unlink()
        if aside.exists():
            aside.rename(path)


def test_a_file_outside_a_run_leaves_its_folder_alone(tiny_run, command, tmp_path, elsewhere):
    """A stranger's folder is no run: what a command makes of a model there has a place of its own."""
    place, secret = tmp_path / "mine", save_image(tmp_path / "secret.png")
    place.mkdir()
    assert command("export", tiny_run, place / "one.safetensors")[0] == 0
    shutil.copy(Run(tiny_run).last, place / "other.pt")
    (place / "holiday.png").symlink_to(secret)
    for name in ("validation_mine.pt", "evaluation.json", "sample.png", "score.png", "train.log"):
        (place / name).write_text("mine")
    before = {path: path.read_bytes() for path in place.iterdir()}
    for file in ("one.safetensors", "other.pt"):
        status, output, error = command("sample", "--run", place / file, "--count", 2)
        assert status == 0 and output.strip() == f"outputs/files/{Path(file).stem}/sample.png", (
            error
        )
    assert command("resume", place / "other.pt", "trainer.steps=7")[0] == 0
    assert Run(elsewhere / "outputs" / "files" / "other").read_metrics()[-1]["step"] == 7
    status, _, error = command("resume", place / "other.pt", "trainer.steps=8")
    assert (
        status == 1
        and "outputs/files/other holds a run already" in error
        and len(error.splitlines()) == 1
    )
    assert {path: path.read_bytes() for path in place.iterdir()} == before


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


def test_counters_and_moments_of_no_training_get_one_line(tiny_run, command):
    path = Run(tiny_run).last
    for part in PARTS:
        state = read_checkpoint(path)
        moments = state["optimizer"]["state"][0]
        if part == "moments":
            del moments["exp_avg"]
        elif part == "shapes":
            moments["exp_avg"] = moments["exp_avg"][:0]
        elif part == "words":
            moments["exp_avg"] = "large"
        elif part == "first format":
            state = {key: value for key, value in state.items() if key != "format"} | {
                "model": {3: state["model"]}
            }
        torch.save(state | part if isinstance(part, dict) else state, path.with_name("other.pt"))
        status, _, error = command("resume", path.with_name("other.pt"), "trainer.steps=8")
        assert (
            status == 1
            and error.count("flowgen: ") == 1
            and "checkpoint" in error
            and "fault" not in error
        ), (part, error)


WORDS = (
    ("model.width=${nope}", "model.width"),
    ("model.width=${oc.env:FLOWGEN_NOTHING}", "model.width"),
    ("model.width=${model.width}", "model.width"),
    ("model.width=${", "model.width"),
    ("model.width=${nope:3}", "model.width"),
    ("data.root=${nope}", "data.root"),
)


def test_references_that_lead_nowhere_get_one_line(images, tiny_run, command, tmp_path):
    train = [
        "train",
        *SMALL,
        f"data.root={images}",
        "trainer.steps=1",
        f"output_dir={tmp_path / 'other'}",
    ]
    for word, said in WORDS:
        for words in (
            [*train, word],
            ["resume", tiny_run, word],
            ["evaluate", "--run", tiny_run, word],
        ):
            status, _, error = command(*words)
            assert (
                status == 1
                and error.count("flowgen: ") == 1
                and said in error
                and "fault" not in error
            ), (words, error)


def test_what_libraries_think_of_a_file_stays_untold(tiny_run, command, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 4000
    )  # beyond which Pillow warns, and beyond twice as many refuses
    picture = save_image(tmp_path / "bomb.png", (70, 70, 3))
    broken = tmp_path / "exif.jpg"
    Image.open(picture).save(broken, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x63\x01\x12")
    status, _, error = command("interpolate", picture, picture, "--run", tiny_run)
    assert status == 0 and error == "", error
    status, _, error = command("score", broken, picture, "--run", tiny_run)
    assert status == 0 and error == "", error
    status, _, error = command(
        "interpolate", save_image(tmp_path / "huge.png", (100, 100, 3)), picture, "--run", tiny_run
    )
    assert status == 1 and len(error.splitlines()) == 1
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    status, _, error = command("sample", "--run", tmp_path / "old.pt")
    assert status == 1 and len(error.splitlines()) == 1


def test_a_report_shows_scripts_and_runs_none(tiny_run, command):
    run, script = Run(tiny_run), "<script>alert(1)</script>"
    config = run.config.read_text().replace(
        "flowgen.models.flows.glow.Glow", f"flowgen.models.{script}"
    )
    run.config.write_text(config + f"'{script}': '{script}'\n")
    run.log.write_text(f"environment: {script}\n")
    run.metrics.write_text(
        json.dumps({"step": 1, "split": script, "bits_per_dim": 3.0})
        + "\n"
        + run.metrics.read_text()
    )
    other = tiny_run.with_name('x"><img src=x onerror=alert(1)>')
    tiny_run.rename(other)
    assert command("report", other, "--out", "page.html")[0] == 0
    page = Path("page.html").read_text()
    assert (
        "&lt;script&gt;" in page
        and "<script" not in page
        and "<img src=x" not in page
        and "javascript:" not in page
    )


def test_names_from_elsewhere_leave_the_terminal_alone(tiny_run, command):
    state = read_checkpoint(Run(tiny_run).last)
    state["config"]["model"]["_target_"] = "os.\x1b[31msystem"
    torch.save(state, tiny_run / "odd.pt")
    assert "\x1b" not in command("sample", "--run", tiny_run / "odd.pt")[2]
    Path("outputs").mkdir()
    tiny_run.rename(Path("outputs") / "a\x1b[2J")
    status, output, _ = command("runs")
    assert status == 0 and "\x1b" not in output and "a\\x1b[2J" in output


@pytest.mark.parametrize("names", [["../elsewhere"], ["/tmp/elsewhere"], [""], [3]])
def test_a_configuration_names_no_folder_outside_the_data_folder(tmp_path, names):
    with pytest.raises(UserError, match="inside the data folder"):
        MNIST(name="MNIST", root=None, search_dirs=names, size=28, bits=8, random_flip=False)


def test_what_a_configuration_refers_to_is_not_looked_up(tiny_run, command, monkeypatch):
    monkeypatch.setenv("FLOWGEN_SECRET", "the secret")
    state = read_checkpoint(Run(tiny_run).last)
    state["config"]["data"] |= {"root": "nowhere", "download_hint": "${oc.env:FLOWGEN_SECRET}"}
    torch.save(state, Run(tiny_run).last)
    for words in (["evaluate", "--run", tiny_run], ["resume", tiny_run, "trainer.steps=8"]):
        status, _, error = command(*words)
        assert status == 1 and "${oc.env:FLOWGEN_SECRET}" in error and "the secret" not in error
    config = Run(tiny_run).config
    config.write_text(config.read_text() + "more: ${oc.env:FLOWGEN_SECRET}\n")
    assert command("report", tiny_run)[0] == 0
    assert "the secret" not in (tiny_run / "report.html").read_text()
