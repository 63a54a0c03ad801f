"""Start of training: overrides, trainer=auto, sweeps, and resumed runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, save_image
from hydra.core.hydra_config import HydraConfig

from flowgen.commands import train
from flowgen.config import settings
from flowgen.config import start as start_module
from flowgen.config.compose import (
    compose_config,
    override,
    parse_overrides,
    read_config,
    save_config,
)
from flowgen.config.runs import find_checkpoint
from flowgen.models.flows.flow import Flow
from flowgen.models.flows.glow import Glow
from flowgen.models.flows.realnvp import RealNVP
from flowgen.models.rbm.rbm import RBM
from flowgen.training import run_dir
from flowgen.training.checkpoint import read_checkpoint
from flowgen.training.logger import Logger
from flowgen.utils.errors import UserError

RUN = {
    "trainer": {"steps": 5, "lr": 0.1, "checkpoint_steps": []},
    "data": {"root": None},
    "seed": 0,
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("trainer.steps=null", None),
        ("trainer.lr=1e-3", 1e-3),
        ("trainer.checkpoint_steps=[1,2]", [1, 2]),
        ("trainer.steps='1 epoch'", "1 epoch"),
    ],
)
def test_train_and_resume_read_values_alike(text, value):
    key = text.partition("=")[0].partition(".")[2]
    assert override(RUN, [text])["trainer"] == RUN["trainer"] | {key: value}
    assert compose_config([text]).config["trainer"][key] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer.stepz=3", "did you mean trainer.steps[?]"),
        ("trainer=gpu", "one by one"),
        ("trainer.steps=1,2", "sweep with `flowgen train -m`"),
        ("trainer.checkpoint_steps=[1", "close its brackets"),
        ("trainer.lr", "write KEY=VALUE"),
        ("data.root=${oc.env:HOME}", "write the value"),
    ],
)
def test_overrides_that_resume_cannot_apply(text, message):
    with pytest.raises(UserError, match=message):
        override(RUN, [text])


def test_folders_may_have_any_name(monkeypatch):
    monkeypatch.setenv("HOME", "/home/jürgen")
    for typed, path in {
        "~/x": "/home/jürgen/x",
        "/a=(b)/it's": "/a=(b)/it's",
        "/plain": "/plain",
    }.items():
        assert override(RUN, [f"data.root={typed}"])["data"]["root"] == path
    unchanged = ["output_dir=/plain", "trainer.warmup=1 epoch"]
    assert [item.input_line for item in parse_overrides(unchanged)] == unchanged


def test_references_are_resolved_when_a_run_is_composed():
    config = compose_config(["trainer.eval_every=${trainer.steps}", "trainer.steps=7"]).config
    assert config["trainer"]["eval_every"] == 7


def test_only_the_given_stop_criterion_is_kept():
    for given, other in (("steps", "minutes"), ("minutes", "steps")):
        for trainer in ("cpu", "gpu"):
            section = compose_config([f"trainer={trainer}", f"trainer.{given}=3"]).config["trainer"]
            assert section[given] == 3
            assert section[other] is None
    both = compose_config(["trainer.steps=3", "trainer.minutes=4"]).config["trainer"]
    assert (both["steps"], both["minutes"]) == (3, 4)


def runs_in(sweep: Path) -> list[str]:
    return sorted(path.parent.name for path in sweep.glob("*/config.yaml"))


def assert_same_end(first: Path, second: Path) -> None:
    """Check that two runs ended at the same step with the same bits."""
    states = [read_checkpoint(run / "checkpoints" / "last.pt") for run in (first, second)]
    assert states[0]["step"] == states[1]["step"]
    for part in ("model", "ema"):
        assert states[0][part].keys() == states[1][part].keys()
        assert all(
            torch.equal(value, states[1][part][name]) for name, value in states[0][part].items()
        ), part


def remove_end(run: Path) -> None:
    """Leave a run as if it had been killed after its numbered checkpoint."""
    (run / "checkpoints" / "last.pt").unlink()
    (run / "checkpoints" / "best.pt").unlink()


@pytest.mark.parametrize(
    ("has_gpu", "device", "batch_size"), [(True, "cuda", 128), (False, "cpu", 16)]
)
def test_auto_chooses_the_trainer_of_the_machine(
    command, monkeypatch, tmp_path, has_gpu, device, batch_size
):
    monkeypatch.setattr(settings, "GPU_DRIVERS", (str(tmp_path),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    output = command("train", "--cfg", "job")[1]
    assert f"  device: {device}\n" in output
    assert f"  batch_size: {batch_size}\n" in output
    name = "gpu" if has_gpu else "cpu"
    assert f"trainer=auto is trainer={name} on this machine" in command("train", "--help")[1]
    for overrides in (["trainer=cpu"], ["experiment=demo"]):
        assert "  device: cpu\n" in command("train", *overrides, "--cfg", "job")[1]
    assert "  device: cuda\n" in command("train", "trainer=gpu", "--cfg", "job")[1]


def test_run_stores_the_choice_of_auto(tiny_run):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert read_config(tiny_run / "config.yaml")["trainer"]["device"] == device
    assert "trainer=auto is trainer=" in (tiny_run / "train.log").read_text()


def test_sweep_has_a_default_folder(images, command, elsewhere):
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=1", "model.log_scale=tanh,sigmoid"]
    assert command("train", *overrides, "-m")[0] == 0
    (sweep,) = (elsewhere / "outputs").glob("*/*_glow_folder")
    assert len(runs_in(sweep)) == 2


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (
            ["trainer.steps=5", "seed=1,2", "output_dir=/tmp/x", "trainer.device=cpu"],
            ["seed=1,trainer.steps=5", "seed=2,trainer.steps=5"],
        ),
        (["experiment=thesis/toy,demo"], ["experiment=thesis-toy", "experiment=demo"]),
        (
            ["data=folder", "data.root=/a,/b/c"],
            ["data=folder,data.root=-a", "data=folder,data.root=-b-c"],
        ),
        (
            ["trainer.minutes=null,5", "trainer.steps=5"],
            ["trainer.minutes=null,trainer.steps=5", "trainer.minutes=5,trainer.steps=5"],
        ),
        ([f"trainer.warmup={'x' * 200}", "seed=1,2"], ["seed=1,549d4585", "seed=2,a445dc07"]),
    ],
)
def test_folders_of_a_sweep_are_named_by_its_overrides(
    command, monkeypatch, tmp_path, overrides, names
):
    folders = []

    def job(cfg):
        folders.append(Path(HydraConfig.get().runtime.output_dir).name)

    monkeypatch.setattr(train, "sweep_job", job)
    monkeypatch.chdir(tmp_path)
    arguments = [text.replace("/tmp", str(tmp_path)) for text in overrides]
    assert command("train", *arguments, "-m") == (0, "", "")
    assert folders == names


def test_sweep_skips_finished_runs_and_continues_the_others(images, command, tmp_path):
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=4", "trainer.checkpoint_steps=[2]"]
    sweep = tmp_path / "sweep"
    for folder in (tmp_path / "whole", sweep):
        arguments = [*overrides, "seed=1,2", f"output_dir={folder}", "-m"]
        assert command("train", *arguments)[0] == 0
    finished, killed = (sweep / name for name in runs_in(sweep))
    remove_end(killed)
    before = (finished / "metrics.jsonl").stat().st_mtime_ns
    status, _, error = command("train", *overrides, "seed=1,2,3", f"output_dir={sweep}", "-m")
    assert status == 0
    assert error.count("skipped: ") == 1
    assert f"skipped: {finished} has ended at step 4" in error
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == before
    assert error.count("resuming from step 2") == 1
    assert len(runs_in(sweep)) == 3
    assert_same_end(killed, tmp_path / "whole" / killed.name)


def test_runs_with_several_processes_fail_and_finish_in_a_sweep_like_others(
    images, command, tmp_path, monkeypatch
):
    """Other processes train each run; they report their errors and exit."""
    launched = []

    def launch(num_processes, arguments, hint):
        launched.append(Path(arguments[1]))
        raise SystemExit(1)

    monkeypatch.setattr(start_module, "launch", launch)
    overrides = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=4",
        "trainer.num_processes=2",
        f"output_dir={tmp_path / 'sweep'}",
        "-m",
    ]
    with monkeypatch.context() as single:
        single.setattr(start_module, "num_processes_to_launch", lambda num_processes: 0)
        assert command("train", *overrides, "seed=1,3")[0] == 0
    status, _, error = command("train", *overrides, "seed=1,2")
    assert status == 1
    assert error.count("skipped: ") == 1
    (failed,) = launched
    assert failed.name.startswith("seed=2")
    assert f"1 of 2 runs of the sweep failed: {failed.name}: " in error.splitlines()[-1]
    assert not failed.exists()


def test_several_processes_continue_a_named_checkpoint(tiny_run, command, monkeypatch):
    launched = []
    monkeypatch.setattr(
        start_module,
        "launch",
        lambda processes, arguments, hint: launched.append((processes, arguments)),
    )
    last = str(tiny_run / "checkpoints" / "last.pt")
    overrides = ["trainer.num_processes=2", "trainer.steps=9"]
    assert command("resume", last, *overrides)[0] == 0
    assert launched == [(2, ["resume", last, *overrides])]


def test_status_of_a_failed_process_is_the_exit_status(tiny_run, command, monkeypatch):
    def launch(num_processes, arguments, hint):
        raise SystemExit(status)

    monkeypatch.setattr(start_module, "launch", launch)
    for status in (1, 7, 128 + signal.SIGTERM):
        assert (
            command("resume", tiny_run, "trainer.num_processes=2", "trainer.steps=9")[0] == status
        )


def test_sweep_does_not_continue_a_run_with_other_settings(images, command, tmp_path):
    overrides = [*SMALL, "trainer.steps=1", "seed=1,2", f"output_dir={tmp_path / 'sweep'}", "-m"]
    assert command("train", *overrides, f"data.root={images}")[0] == 0
    others = shutil.copytree(images, tmp_path / "others")
    status, _, error = command("train", *overrides, f"data.root={others}")
    assert status == 1
    assert "2 of 2 runs of the sweep failed" in error
    assert (
        f"data.root is {images} in the run but {others} in this command" in error.splitlines()[-1]
    )


def test_failing_job_in_another_process_fails_the_sweep(images, command, tmp_path):
    pytest.importorskip(
        "hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher is not installed"
    )
    sweep = tmp_path / "sweep"
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=1", f"output_dir={sweep}"]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    status, _, error = command("train", *overrides, "model.width=zero,8,nil", *launcher, "-m")
    last = error.splitlines()[-1]
    assert status == 1
    assert last.startswith("flowgen: 2 of 3 runs of the sweep failed: ")
    assert "model.width=zero" in last
    assert "model.width=nil" in last
    assert "width must be a whole number" in last
    assert len(runs_in(sweep)) == 1
    assert len([path for path in sweep.iterdir() if path.is_dir()]) == 1


@pytest.mark.long
def test_job_that_is_queued_again_continues(images, tmp_path):
    pytest.importorskip(
        "hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed"
    )
    overrides = [
        *SMALL,
        f"data.root={images}",
        "trainer.minutes=0.1",
        "trainer.save_every=100000",
        "seed=range(1,2)",
        f"output_dir={tmp_path}",
        "hydra/launcher=submitit_local",
    ]
    sweep = subprocess.Popen([sys.executable, "-m", "flowgen", "train", *overrides, "-m"])
    while sweep.poll() is None and not list(tmp_path.glob("*/metrics.jsonl")):
        time.sleep(0.05)
    (controller,) = (path.name for path in (tmp_path / ".submitit").glob("[0-9]*"))
    job = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()[0]
    os.kill(int(job), signal.SIGUSR2)  # SLURM sends it before a job's time is up
    assert sweep.wait() == 0
    (run,) = (path.parent for path in tmp_path.glob("*/metrics.jsonl"))
    log = (run / "train.log").read_text()
    (resumed_step,) = (
        int(line.split()[-1]) for line in log.splitlines() if "resuming from step" in line
    )
    assert "stopped by SIGUSR2 and saved" in log
    assert "finished: " in log
    assert 0 < resumed_step < read_checkpoint(run / "checkpoints" / "last.pt")["step"]


def test_resumed_run_ends_with_the_same_bits(images, command, tmp_path):
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=4", "trainer.checkpoint_steps=[2]"]
    assert command("train", *overrides, f"output_dir={tmp_path / 'whole'}")[0] == 0
    run = tmp_path / "run"
    again = [*overrides, f"output_dir={run}", "resume=true"]
    assert command("train", *again)[0] == 0
    remove_end(run)
    status, _, error = command("train", *again)
    assert status == 0
    assert "resuming from step 2" in error
    assert "resume" not in read_config(run / "config.yaml")
    assert_same_end(run, tmp_path / "whole")


def test_resume_true_skips_finished_runs_and_refuses_other_settings(tiny_run, images, command):
    overrides = [*SMALL, f"data.root={images}", f"output_dir={tiny_run}", "resume=true"]
    before = (tiny_run / "config.yaml").read_text()
    for more, expected_status, message in (
        (["trainer.steps=6"], 0, "has ended at step 6"),
        (
            ["trainer.steps=9", "model.width=4"],
            1,
            "model.width is 8 in the run but 4 in this command",
        ),
    ):
        status, _, error = command("train", *overrides, *more)
        assert status == expected_status
        assert message in error
        assert "flowgen resume" in error
    assert (tiny_run / "config.yaml").read_text() == before


def test_resume_true_continues_runs_that_are_older_than_a_setting(tiny_run, images, command):
    config = read_config(tiny_run / "config.yaml")
    del config["evaluation"]["compress"], config["model"]["condition_networks"]
    save_config(config, tiny_run / "config.yaml")
    overrides = [*SMALL, f"data.root={images}", f"output_dir={tiny_run}", "resume=true"]
    status, _, error = command("train", *overrides, "trainer.steps=6")
    assert status == 0 and "has ended at step 6" in error
    status, _, error = command("train", *overrides, "trainer.steps=6", "evaluation.compress=true")
    assert status == 1 and "evaluation.compress is False in the run but True in this" in error


def test_signal_of_a_launcher_is_passed_on_once_the_run_is_saved(
    images, command, tmp_path, monkeypatch
):
    def queue_again(number, frame):
        raise SystemExit(len(list(tmp_path.glob("run/checkpoints/last.pt"))) + 2)

    def interrupt(*arguments):
        os.kill(os.getpid(), signal.SIGUSR2)
        write(*arguments)

    write = Logger.write
    monkeypatch.setattr(Logger, "write", interrupt)
    before = signal.signal(signal.SIGUSR2, queue_again)
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=9", "trainer.save_every=100"]
    try:
        status, _, error = command("train", *overrides, f"output_dir={tmp_path / 'run'}")
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert status == 3
    assert "stopped by SIGUSR2 and saved" in error
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 1


def test_init_from_starts_with_the_ema_weights_of_a_run(tiny_run, command, tmp_path):
    for index in range(20):
        save_image(tmp_path / "others" / f"{index}.png")
    run = tmp_path / "new"
    overrides = [
        *SMALL,
        f"data.root={tmp_path / 'others'}",
        "trainer.steps=1",
        "trainer.lr=0",
        f"output_dir={run}",
        "trainer.ema_decay=0.5",
    ]
    assert command("train", *overrides, f"init_from={os.path.relpath(tiny_run)}")[0] == 0
    assert read_config(run / "config.yaml")["init_from"] == str(tiny_run)
    root = f"data.root={tmp_path / 'images'}"
    rows = [
        json.loads(command("evaluate", "--run", name, "--json", root)[1])
        for name in (tiny_run, run)
    ]
    assert rows[0]["bits_per_dim"] == rows[1]["bits_per_dim"]


def test_init_from_names_the_settings_that_do_not_fit(tiny_run, images, command, tmp_path):
    run = tmp_path / "new"
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=1", f"output_dir={run}"]
    status, _, error = command("train", *overrides, f"init_from={tiny_run}", "model.width=4")
    assert status == 1
    assert "do not fit, model.width is 8 in the run but 4 in this command" in error.splitlines()[-1]
    error = command("train", *overrides, "init_from=nowhere")[2]
    assert error.splitlines()[-1].startswith("flowgen: nowhere is not a run")
    assert not run.exists()


def test_newest_fitting_run_is_found_by_its_configuration(tiny_run, elsewhere, monkeypatch):
    changes = {
        "flow": {},
        "rbm": {"_target_": "flowgen.models.rbm.rbm.RBM"},
        "classes": {"num_classes": 10},
    }
    runs = [shutil.copytree(tiny_run, elsewhere / "outputs" / name) for name in changes]
    for age, run in enumerate(runs):
        config = read_config(run / "config.yaml")
        config["model"] |= changes[run.name]
        save_config(config, run / "config.yaml")
        os.utime(run / "config.yaml", (age, age))
    (runs[1] / "config.yaml").touch()
    paths = []

    def recorded(path):
        paths.append(path)
        return read_checkpoint(path)

    monkeypatch.setattr(run_dir, "read_checkpoint", recorded)
    for number, capability in enumerate((Flow, Glow), 1):
        assert find_checkpoint(None, capability=capability)[0].folder.name == "classes"
        assert len(paths) == number
    with pytest.raises(UserError, match=r"no run of a RealNVP .* model=realnvp"):
        find_checkpoint(None, capability=RealNVP)
    with pytest.raises(UserError, match="is not a run of an RBM"):
        find_checkpoint(str(runs[0]), capability=RBM)
    assert len(paths) == 3
