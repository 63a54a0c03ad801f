"""CPU threads: their number on a busy machine, their spinning, and their number in a run."""

import logging
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import SMALL

from flowgen.training import threads
from flowgen.training.checkpoint import read_checkpoint
from flowgen.training.threads import CpuTimes, cpu_quota, free_cores, use_threads
from flowgen.utils import memory
from flowgen.utils.errors import UserError


@pytest.fixture
def eight_cores(monkeypatch):
    """A machine with eight cores; the list records the numbers of threads that torch is set to."""
    numbers = []
    monkeypatch.setattr(threads, "_default_threads", lambda: 8)
    monkeypatch.setattr(threads, "cpu_quota", lambda: float("inf"))
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    for name in threads.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return numbers


@pytest.mark.parametrize(
    ("free", "expected"), [(8.0, 8), (7.7, 8), (7.5, 7), (1.02, 1), (0.1, 1), (11.9, 8)]
)
def test_there_are_as_many_threads_as_free_cores(eight_cores, monkeypatch, free, expected):
    monkeypatch.setattr(threads, "free_cores", lambda: free)
    assert use_threads("auto") == expected
    assert eight_cores == [expected]


def test_the_number_of_the_user_is_obeyed(eight_cores, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("flowgen"), "propagate", True)
    monkeypatch.setattr(threads, "free_cores", lambda: 1.0)
    assert use_threads(6) == 6
    assert "auto" in caplog.text
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert use_threads("auto") == 8
    for invalid in ("many", 0, 1.5, True):
        with pytest.raises(UserError, match="whole number"):
            use_threads(invalid)


def test_a_container_gets_no_more_threads_than_its_cpu_quota(eight_cores, monkeypatch):
    monkeypatch.setattr(threads, "free_cores", lambda: 8.0)
    monkeypatch.setattr(threads, "cpu_quota", lambda: 2.5)
    assert use_threads("auto") == 2


def test_cores_busy_with_this_process_count_as_free(monkeypatch):
    # In two seconds half a core was idle, and one was busy with this process.
    times = [CpuTimes(100.0, 500.0, 1.0), CpuTimes(102.0, 501.0, 3.0)]
    monkeypatch.setattr(threads, "_last_times", times[:1])
    monkeypatch.setattr(threads, "cpu_times", lambda: times[1])
    assert free_cores() == 1.5


def test_the_idle_time_of_this_machine_is_plausible():
    uptime = time.time() - psutil.boot_time()
    assert 0 <= threads._idle_seconds() <= os.cpu_count() * (uptime + 1)


@pytest.mark.parametrize("missing", ["cpu_times", "Process"])
def test_all_cores_count_as_idle_if_the_system_does_not_tell(monkeypatch, missing):
    def fail(**kwargs):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, missing, fail)
    before = threads._idle_seconds()
    time.sleep(0.05)
    assert threads._idle_seconds() - before >= 0.05 * os.cpu_count()


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
def test_quotas_of_both_versions_of_control_groups(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "CGROUP_LIST", tmp_path / "list")
    (tmp_path / "list").write_text("0::/a/b\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cpu_quota() == cores


@pytest.mark.parametrize(
    ("variables", "spin_count"),
    [
        ({}, threads.SPIN_COUNT),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ],
)
def test_the_command_limits_spinning_before_it_imports_torch(variables, spin_count):
    code = (
        "import os, sys; from flowgen import cli; cli.main(); "
        "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if "OMP" not in name}
    output = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.splitlines()[-1] == f"{spin_count} False"


def test_a_run_keeps_its_number_of_threads(images, tmp_path, command, monkeypatch):
    free = [3.0]
    monkeypatch.setattr(threads, "_default_threads", lambda: 4)
    monkeypatch.setattr(threads, "cpu_quota", lambda: float("inf"))
    monkeypatch.setattr(threads, "free_cores", lambda: free[0])

    def set_num_threads(number):
        monkeypatch.setattr(torch, "get_num_threads", lambda: number)

    monkeypatch.setattr(torch, "set_num_threads", set_num_threads)
    for name in threads.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "run"
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=2", f"output_dir={run}"]
    assert command("train", *overrides)[0] == 0
    free[0] = 1.0
    assert command("resume", run, "trainer.steps=4")[0] == 0
    assert read_checkpoint(run / "checkpoints" / "last.pt")["config"]["trainer"]["num_threads"] == 3
    assert "num_threads: 3" in (run / "config.yaml").read_text()
    assert torch.get_num_threads() == 3
    assert (run / "train.log").read_text().count("3 threads on") == 2
    assert command("resume", run, "trainer.steps=6", "trainer.num_threads=auto")[0] == 0
    assert "num_threads: 1" in (run / "config.yaml").read_text()
    assert command("sample", "--run", run, "--count", "2")[0] == 0
    assert torch.get_num_threads() == 1
