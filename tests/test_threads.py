"""Threads: how many a busy machine gets, how they wait, and that a run keeps their number."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL

from flowgen.training import threads
from flowgen.training.checkpoint import read_checkpoint
from flowgen.training.threads import Reading, free_cores, quota, use_threads
from flowgen.utils.errors import UserError


@pytest.fixture
def eight_cores(monkeypatch):
    """A machine of eight cores, and what is asked of torch on it."""
    payload = []
    monkeypatch.setattr(threads, "_all_threads", lambda: 8)
    monkeypatch.setattr(threads, "quota", lambda: float("inf"))
    monkeypatch.setattr(torch, "set_num_threads", payload.append)
    for name in threads.CHOSEN:
        monkeypatch.delenv(name, raising=False)
    return payload


@pytest.mark.parametrize(
    ("free", "chosen"), [(8.0, 8), (7.7, 8), (7.5, 7), (1.02, 1), (0.1, 1), (11.9, 8)]
)
def test_threads_are_as_many_as_cores_are_free(eight_cores, monkeypatch, free, chosen):
    monkeypatch.setattr(threads, "free_cores", lambda: free)
    assert use_threads("auto") == chosen and eight_cores == [chosen]


def test_threads_that_the_user_chose_are_obeyed(eight_cores, monkeypatch, caplog):
    logging.getLogger("flowgen").propagate = True
    monkeypatch.setattr(threads, "free_cores", lambda: 1.0)
    assert use_threads(6) == 6 and "auto" in caplog.text
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert use_threads("auto") == 8
    for wrong in ("many", 0, 1.5, True):
        with pytest.raises(UserError, match="whole number"):
            use_threads(wrong)


def test_a_bounded_container_gets_no_more_threads_than_time(eight_cores, monkeypatch):
    monkeypatch.setattr(threads, "free_cores", lambda: 8.0)
    monkeypatch.setattr(threads, "quota", lambda: 2.5)
    assert use_threads("auto") == 2


def test_what_other_processes_do_is_not_free_and_what_this_one_does_is(monkeypatch):
    readings = [
        Reading(100.0, 500.0, 1.0),
        Reading(102.0, 501.0, 3.0),
    ]  # two seconds: half a core idle, one busy with ourselves
    monkeypatch.setattr(threads, "_readings", readings[:1])
    monkeypatch.setattr(threads, "read_clocks", lambda: readings[1])
    assert free_cores() == 1.5


def test_a_look_at_this_machine_sees_its_cores():
    idle, cores = threads._idle_seconds(), os.cpu_count()
    assert 0 <= idle <= cores * float(Path("/proc/uptime").read_text().split()[0]) + 1


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, float("inf")),
        ({"cpu.max": "max 100000"}, float("inf")),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, 2.5),
        ({"cpu.max": "20000 100000"}, 1.0),
        ({"cpu/a/b/cpu.cfs_quota_us": "300000", "cpu/a/b/cpu.cfs_period_us": "100000"}, 3.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
    ],
)
def test_quotas_of_either_version_of_control_groups(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(threads, "CGROUPS", tmp_path)
    monkeypatch.setattr(threads, "of_process", lambda: ["a/b"])
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert quota() == cores


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, threads.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_the_command_bounds_spinning_before_it_loads_torch(given, spins):
    code = "import os, sys; from flowgen import cli; cli.main(); print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if "OMP" not in name} | given
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert told.splitlines()[-1] == f"{spins} False"


def test_a_run_keeps_its_threads(images, tmp_path, command, monkeypatch):
    free = [3.0]
    monkeypatch.setattr(threads, "_all_threads", lambda: 4)
    monkeypatch.setattr(threads, "free_cores", lambda: free[0])
    monkeypatch.setattr(
        torch,
        "set_num_threads",
        lambda number: monkeypatch.setattr(torch, "get_num_threads", lambda: number),
    )
    for name in threads.CHOSEN:
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "run"
    assert (
        command("train", *SMALL, f"data.root={images}", "trainer.steps=2", f"output_dir={run}")[0]
        == 0
    )
    free[0] = 1.0
    assert command("resume", run, "trainer.steps=4")[0] == 0
    assert read_checkpoint(run / "checkpoints" / "last.pt")["config"]["trainer"]["num_threads"] == 3
    assert "threads: 3" in (run / "config.yaml").read_text() and torch.get_num_threads() == 3
    assert (run / "train.log").read_text().count("3 threads on") == 2
    assert command("resume", run, "trainer.steps=6", "trainer.num_threads=auto")[0] == 0
    assert "threads: 1" in (run / "config.yaml").read_text()
    assert command("sample", "--run", run, "--count", "2")[0] == 0 and torch.get_num_threads() == 1
