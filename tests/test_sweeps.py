"""How trainings start: overrides, the trainer of the machine, sweeps, going on with what is there."""

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
from flowgen.commands import train as resume
from flowgen.config import compose as resolvers
from flowgen.config.compose import override, quote_overrides, read_config, save_config
from flowgen.config.runs import find_checkpoint
from flowgen.models.flows.flow import Flow
from flowgen.models.flows.glow import Glow
from flowgen.models.flows.realnvp import RealNVP
from flowgen.models.rbm.rbm import RBM
from flowgen.training import run_dir as run_module
from flowgen.training.checkpoint import read_checkpoint
from flowgen.training.logger import Logger
from flowgen.utils.errors import UserError

RUN = {"trainer": {"steps": 5, "lr": 0.1, "keep_at": []}, "data": {"root": None}, "seed": 0}


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("trainer.steps=null", None),
        ("trainer.lr=1e-3", 1e-3),
        ("trainer.checkpoint_steps=[1,2]", [1, 2]),
        ("trainer.steps='1 epoch'", "1 epoch"),
    ],
)
def test_resume_reads_values_as_train_does(word, value):
    key = word.partition("=")[0].partition(".")[2]
    assert override(RUN, [word])["trainer"] == RUN["trainer"] | {key: value}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trainer.stepz=3", "did you mean trainer.steps?"),
        ("trainer=gpu", "one by one"),
        ("trainer.steps=1,2", "sweep with `flowgen train -m`"),
        ("trainer.checkpoint_steps=[1", "close its brackets"),
        ("trainer.lr", "write KEY=VALUE"),
    ],
)
def test_words_that_resume_cannot_follow_are_said_plainly(word, said):
    with pytest.raises(UserError, match=said.replace("?", "[?]")):
        override(RUN, [word])


def test_folders_may_have_any_name(monkeypatch):
    monkeypatch.setenv("HOME", "/home/jürgen")
    for typed, meant in {
        "~/x": "/home/jürgen/x",
        "/a=(b)/it's": "/a=(b)/it's",
        "/plain": "/plain",
    }.items():
        assert override(RUN, [f"data.root={typed}"])["data"]["root"] == meant
    assert quote_overrides(["--cfg", "job", "output_dir=/plain", "trainer.warmup=1 epoch"]) == [
        "--cfg",
        "job",
        "output_dir=/plain",
        "trainer.warmup=1 epoch",
    ]


def runs_in(sweep: Path) -> list[str]:
    return sorted(path.parent.name for path in sweep.glob("*/config.yaml"))


def assert_same_end(one: Path, other: Path) -> None:
    """Two runs that ended at the same step with the same bits."""
    resolve_stop_criterion, other_end = (
        read_checkpoint(run / "checkpoints" / "last.pt") for run in (one, other)
    )
    assert resolve_stop_criterion["step"] == other_end["step"]
    for part in ("model", "ema"):
        assert resolve_stop_criterion[part].keys() == other_end[part].keys()
        assert all(
            torch.equal(value, other_end[part][name])
            for name, value in resolve_stop_criterion[part].items()
        ), part


def forget_the_end(run: Path) -> None:
    """As if the run had been killed after its numbered checkpoint."""
    (run / "checkpoints" / "last.pt").unlink()
    (run / "checkpoints" / "best.pt").unlink()


@pytest.mark.parametrize(
    ("here", "device", "batch_size"),
    [(True, "cuda", 128), (False, "cpu", 16)],
)
def test_the_trainer_suits_the_machine(command, monkeypatch, tmp_path, here, device, batch_size):
    monkeypatch.setattr(resolvers, "DRIVERS", (str(tmp_path),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
    output = command("train", "--cfg", "job")[1]
    assert f"  device: {device}\n" in output and f"  batch_size: {batch_size}\n" in output
    assert (
        f"trainer=auto is trainer={'gpu' if here else 'cpu'} on this machine"
        in command("train", "--help")[1]
    )
    for words in (["trainer=cpu"], ["experiment=demo"]):
        assert "  device: cpu\n" in command("train", *words, "--cfg", "job")[1]
    assert "  device: cuda\n" in command("train", "trainer=gpu", "--cfg", "job")[1]


def test_help_asks_torch_only_where_there_is_a_driver(monkeypatch, tmp_path):
    code = "import sys; from flowgen.config import resolvers; resolvers.DRIVERS = (); from flowgen.commands.train import train\n"
    code += "try: train(words=['--help'])\nfinally: print('torch' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    ).stdout
    assert output.splitlines()[-1] == "False" and "trainer=auto is trainer=cpu" in output


def test_a_run_keeps_what_auto_chose(tiny_run):
    assert read_config(tiny_run / "config.yaml")["trainer"]["device"] == (
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    assert "trainer=auto is trainer=" in (tiny_run / "train.log").read_text()


def test_a_sweep_without_a_folder_of_its_own(images, command, elsewhere):
    words = [*SMALL, f"data.root={images}", "trainer.steps=1", "model.log_scale=tanh,sigmoid", "-m"]
    assert command("train", *words)[0] == 0
    (sweep,) = (elsewhere / "outputs").glob("*/*_glow_folder")
    assert len(runs_in(sweep)) == 2


@pytest.mark.parametrize(
    ("words", "names"),
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
def test_names_of_a_sweeps_folders(command, monkeypatch, tmp_path, words, names):
    made = []
    monkeypatch.setattr(
        train,
        "_job_of_sweep",
        lambda cfg: made.append(Path(HydraConfig.get().runtime.output_dir).name),
    )
    monkeypatch.chdir(tmp_path)
    assert command("train", *[word.replace("/tmp", str(tmp_path)) for word in words], "-m") == (
        0,
        "",
        "",
    )
    assert made == names


def test_a_sweep_skips_what_has_ended_and_goes_on_with_the_rest(images, command, tmp_path):
    words = [*SMALL, f"data.root={images}", "trainer.steps=4", "trainer.checkpoint_steps=[2]", "-m"]
    assert command("train", *words, "seed=1,2", f"output_dir={tmp_path / 'whole'}")[0] == 0
    assert command("train", *words, "seed=1,2", f"output_dir={tmp_path / 'sweep'}")[0] == 0
    ended, killed = ((tmp_path / "sweep" / name) for name in runs_in(tmp_path / "sweep"))
    forget_the_end(killed)
    before = (ended / "metrics.jsonl").stat().st_mtime_ns
    status, _, error = command("train", *words, "seed=1,2,3", f"output_dir={tmp_path / 'sweep'}")
    assert (
        status == 0
        and error.count("skipped: ") == 1
        and f"skipped: {ended} has ended, at step 4" in error
    )
    assert (ended / "metrics.jsonl").stat().st_mtime_ns == before
    assert error.count("going on from step 2") == 1 and len(runs_in(tmp_path / "sweep")) == 3
    assert_same_end(killed, tmp_path / "whole" / killed.name)


def test_runs_of_several_processes_fail_and_end_in_a_sweep_as_others_do(
    images, command, tmp_path, monkeypatch
):
    """Each is left to other processes, which tell what is wrong with it and exit."""
    handed = []

    def launch(processes, words, cure):
        handed.append(words[1])
        raise SystemExit(1)

    monkeypatch.setattr(resume, "launch", launch)
    words = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=4",
        "trainer.num_processes=2",
        f"output_dir={tmp_path / 'sweep'}",
        "-m",
    ]
    with monkeypatch.context() as alone:
        alone.setattr(resume, "to_launch", lambda devices: 0)
        assert command("train", *words, "seed=1,3")[0] == 0
    status, _, error = command("train", *words, "seed=1,2")
    assert (
        status == 1
        and error.count("skipped: ") == 1
        and len(handed) == 1
        and Path(handed[0]).name.startswith("seed=2")
    )
    assert (
        f"1 of 2 runs of the sweep failed: {Path(handed[0]).name}: " in error.splitlines()[-1]
        and not Path(handed[0]).exists()
    )


def test_a_named_checkpoint_is_gone_on_with_by_several_processes_too(
    tiny_run, command, monkeypatch
):
    handed = []
    monkeypatch.setattr(
        resume, "launch", lambda processes, words, cure: handed.append((processes, words))
    )
    last = str(tiny_run / "checkpoints" / "last.pt")
    assert command("resume", last, "trainer.num_processes=2", "trainer.steps=9")[0] == 0
    assert handed == [(2, ["resume", last, "trainer.num_processes=2", "trainer.steps=9"])]


def test_a_sweep_does_not_go_on_with_another_configuration(images, command, tmp_path):
    words = [*SMALL, "trainer.steps=1", "seed=1,2", f"output_dir={tmp_path / 'sweep'}", "-m"]
    assert command("train", *words, f"data.root={images}")[0] == 0
    status, _, error = command(
        "train", *words, f"data.root={shutil.copytree(images, tmp_path / 'others')}"
    )
    assert status == 1 and "2 of 2 runs of the sweep failed" in error
    assert f"data.root={images} there and {tmp_path / 'others'} here" in error.splitlines()[-1]


def test_a_failing_job_in_another_process_fails_the_sweep(images, command, tmp_path):
    pytest.importorskip(
        "hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher is not installed"
    )
    words = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=1",
        f"output_dir={tmp_path / 'sweep'}",
        "model.width=zero,8,nil",
        "-m",
    ]
    status, _, error = command("train", *words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    last = error.splitlines()[-1]
    assert status == 1 and last.startswith("flowgen: 2 of 3 runs of the sweep failed: ")
    assert (
        "model.width=zero" in last
        and "model.width=nil" in last
        and "width must be a whole number" in last
    )
    assert len(runs_in(tmp_path / "sweep")) == 1 and len(list((tmp_path / "sweep").iterdir())) == 2


@pytest.mark.long
def test_a_job_that_is_queued_again_goes_on(images, tmp_path):
    pytest.importorskip(
        "hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed"
    )
    words = [
        *SMALL,
        f"data.root={images}",
        "trainer.minutes=0.1",
        "trainer.save_every=100000",
        "seed=range(1,2)",
        f"output_dir={tmp_path}",
        "-m",
    ]
    sweep = subprocess.Popen(
        [sys.executable, "-m", "flowgen", "train", *words, "hydra/launcher=submitit_local"]
    )
    while sweep.poll() is None and not list(tmp_path.glob("*/metrics.jsonl")):
        time.sleep(0.05)
    (controller,) = (path.name for path in (tmp_path / ".submitit").glob("[0-9]*"))
    job = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()[0]
    os.kill(int(job), signal.SIGUSR2)  # what SLURM sends before a job's time is up
    assert sweep.wait() == 0
    (run,) = (path.parent for path in tmp_path.glob("*/metrics.jsonl"))
    log = (run / "train.log").read_text()
    (gone_on,) = (
        int(line.split()[-1]) for line in log.splitlines() if "going on from step" in line
    )
    assert "stopped by SIGUSR2 and saved" in log and "done: " in log
    assert 0 < gone_on < read_checkpoint(run / "checkpoints" / "last.pt")["step"]


def test_resume_true_ends_with_the_same_bits(images, command, tmp_path):
    words = [*SMALL, f"data.root={images}", "trainer.steps=4", "trainer.checkpoint_steps=[2]"]
    assert command("train", *words, f"output_dir={tmp_path / 'whole'}")[0] == 0
    again = [*words, f"output_dir={tmp_path / 'run'}", "resume=true"]
    assert command("train", *again)[0] == 0
    forget_the_end(tmp_path / "run")
    status, _, error = command("train", *again)
    assert (
        status == 0
        and "going on from step 2" in error
        and "resume" not in read_config(tmp_path / "run" / "config.yaml")
    )
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_resume_true_says_what_stands_against_it(tiny_run, images, command):
    words = [*SMALL, f"data.root={images}", f"output_dir={tiny_run}", "resume=true"]
    before = (tiny_run / "config.yaml").read_text()
    for more, ends, said in (
        (["trainer.steps=6"], 0, "has ended, at step 6"),
        (["trainer.steps=9", "model.width=4"], 1, "model.width=8 there and 4 here"),
    ):
        status, _, error = command("train", *words, *more)
        assert status == ends and said in error and "flowgen resume" in error
    assert (tiny_run / "config.yaml").read_text() == before


def test_a_signal_of_a_launchers_is_passed_on_once_the_run_is_saved(
    images, command, tmp_path, monkeypatch
):
    def queue_again(number, frame):
        raise SystemExit(len(list(tmp_path.glob("run/checkpoints/last.pt"))) + 2)

    write = Logger.write
    monkeypatch.setattr(
        Logger, "write", lambda *rest: (os.kill(os.getpid(), signal.SIGUSR2), write(*rest))
    )
    before = signal.signal(signal.SIGUSR2, queue_again)
    words = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=9",
        "trainer.save_every=100",
        f"output_dir={tmp_path / 'run'}",
    ]
    try:
        status, _, error = command("train", *words)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert status == 3 and "stopped by SIGUSR2 and saved" in error
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 1


def test_init_starts_from_a_runs_averaged_weights(tiny_run, command, tmp_path):
    for number in range(20):
        save_image(tmp_path / "others" / f"{number}.png")
    words = [
        *SMALL,
        f"data.root={tmp_path / 'others'}",
        "trainer.steps=1",
        "trainer.lr=0",
        f"output_dir={tmp_path / 'new'}",
        "trainer.ema_decay=0.5",
    ]
    assert command("train", *words, f"init_from={os.path.relpath(tiny_run)}")[0] == 0
    assert read_config(tmp_path / "new" / "config.yaml")["init"] == str(tiny_run)
    figures = [
        json.loads(
            command("evaluate", "--run", run, "--json", f"data.root={tmp_path / 'images'}")[1]
        )
        for run in (tiny_run, tmp_path / "new")
    ]
    assert figures[0]["bits_per_dim"] == figures[1]["bits_per_dim"]


def test_init_says_what_does_not_fit(tiny_run, images, command, tmp_path):
    words = [*SMALL, f"data.root={images}", "trainer.steps=1", f"output_dir={tmp_path / 'new'}"]
    status, _, error = command("train", *words, f"init_from={tiny_run}", "model.width=4")
    assert status == 1 and "do not fit, model.width=8 there and 4 here" in error.splitlines()[-1]
    assert (
        command("train", *words, "init_from=nowhere")[2]
        .splitlines()[-1]
        .startswith("flowgen: nowhere is no run")
    )
    assert not (tmp_path / "new").exists()


def test_the_newest_run_that_fits_is_found_by_its_configuration(tiny_run, elsewhere, monkeypatch):
    runs = [
        shutil.copytree(tiny_run, elsewhere / "outputs" / name)
        for name in ("flow", "rbm", "classes")
    ]
    for age, (run, model) in enumerate(
        zip(
            runs, ({}, {"_target_": "flowgen.models.rbm.rbm.RBM"}, {"num_classes": 10}), strict=True
        )
    ):
        config = read_config(run / "config.yaml")
        save_config(config | {"model": config["model"] | model}, run / "config.yaml")
        os.utime(run / "config.yaml", (age, age))
    (runs[1] / "config.yaml").touch()
    read = []
    monkeypatch.setattr(
        run_module, "read_checkpoint", lambda path: read.append(path) or read_checkpoint(path)
    )
    assert find_checkpoint(None, wanted=Flow)[0].folder.name == "classes" and len(read) == 1
    assert find_checkpoint(None, wanted=Glow)[0].folder.name == "classes" and len(read) == 2
    with pytest.raises(UserError, match=r"no run of a RealNVP .* model=realnvp"):
        find_checkpoint(None, wanted=RealNVP)
    with pytest.raises(UserError, match="is no run of an RBM"):
        find_checkpoint(str(runs[0]), wanted=RBM)
    assert len(read) == 3
