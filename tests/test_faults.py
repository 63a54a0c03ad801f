"""The smallest share of `make faults`, of which `.ci/run` holds a larger one, and whether it sees what is at fault."""

import os
import subprocess
import sys
from pathlib import Path

import faults
import pytest
import torch
from kills import Result
from trainings import same
from zygote import Outcome

SCRIPTS = Path(__file__).parents[1] / "scripts" / "faults"


def test_a_small_share_ends_well():
    words = [sys.executable, SCRIPTS / "faults.py", "--count", "1", "--seed", "7", "--parts", "kills", "disks"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    ended = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert ended.returncode == 0 and "AT FAULT" not in ended.stdout, ended.stdout + ended.stderr
    for kind in ("kill in a write", "full disk", "SIGTERM at a moment", "clock jumps"):
        assert f"| {kind}" in ended.stdout


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (Outcome(0, "done", "", 1.0), ""),
        (Outcome(1, "", "a warning\nflowgen: x does not exist: name another\n", 1.0), ""),
        (Outcome(None, "", "", 60.0), "hung"),
        (Outcome(1, "", "Traceback (most recent call last):\nflowgen: x", 1.0), "a traceback"),
        (Outcome(1, "", "flowgen: KeyError: x (this is a fault of flowgen: --debug shows where)", 1.0), "a fault of flowgen"),
        (Outcome(1, "", "", 1.0), "without one plain sentence"),
        (Outcome(1, "", "flowgen: one\nflowgen: two", 1.0), "without one plain sentence"),
        (Outcome(-11, "", "", 1.0), "status -11"),
    ],
)
def test_only_two_ends_are_good(outcome, fault):
    assert fault in outcome.fault and bool(fault) == bool(outcome.fault)


def test_the_same_is_the_same_bit_by_bit():
    one = {"model": {"weight": torch.tensor([1.0, float("nan")])}, "rows": [{"loss": 1.0}]}
    assert same(one, {"model": {"weight": torch.tensor([1.0, float("nan")])}, "rows": [{"loss": 1.0}]})
    assert not same(one, {"model": {"weight": torch.tensor([1.0, 1.0])}, "rows": [{"loss": 1.0}]})
    assert not same(one, {"model": {"weight": torch.tensor([1.0, float("nan")])}, "rows": [{"loss": 1.0}, {"loss": 1.0}]})
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_the_table_counts_what_is_at_fault(tmp_path):
    for seed, result in ((3, Result("kill", "glow", 2, "")), (1, Result("kill", "maf", 1, "rows")), (1, Result("disk", "\udcff", 1, ""))):
        faults.keep(seed, result, tmp_path / "results")
    rows = faults.table(faults.kept(tmp_path / "results")).splitlines()
    assert rows[2:] == ["| kill | 1, 3 | 2 | 3 | 1 |", "| disk | 1 | 1 | 1 | 0 |"]
