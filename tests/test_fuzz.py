"""The fuzzers of `make faults` detect faults. `.ci/run` runs a small part of them."""

import os
import subprocess
import sys
from pathlib import Path

import fuzz_files
import pytest
import run as fuzz
import torch
from forkserver import Outcome
from kill_points import make_rng
from kills import Result
from mutations import mutate
from training_runs import TRAINING_RUNS, same

from flowgen.config.settings import group_options

FUZZ = Path(__file__).parent / "fuzz"


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (Outcome(0, "finished", "", 1.0), ""),
        (Outcome(1, "", "a warning\nflowgen: x does not exist\n", 1.0), ""),
        (Outcome(None, "", "", 60.0), "hung"),
        (Outcome(1, "", "Traceback (most recent call last):\nflowgen: x", 1.0), "a traceback"),
        (
            Outcome(1, "", "flowgen: KeyError: x (this is a bug in flowgen: --debug ...)", 1.0),
            "a bug in flowgen",
        ),
        (Outcome(1, "", "", 1.0), "without one plain sentence"),
        (Outcome(1, "", "flowgen: one\nflowgen: two", 1.0), "without one plain sentence"),
        (Outcome(-11, "", "", 1.0), "status -11"),
    ],
)
def test_only_success_and_one_plain_sentence_are_right(outcome, fault):
    assert fault in outcome.fault
    assert bool(fault) == bool(outcome.fault)


def test_an_internal_error_is_a_fault():
    from flowgen.utils.console import user_message

    assert Outcome(1, "", f"flowgen: {user_message(KeyError('x'))}", 1.0).fault


@pytest.mark.parametrize("name", group_options("model"))
def test_every_model_is_trained_and_killed(name):
    assert any(f"model={name}" in overrides for overrides in TRAINING_RUNS.values()), (
        f"add {name} to TRAINING_RUNS in tests/fuzz/training_runs.py"
    )


def test_writes_outside_of_the_folder_are_reported(tmp_path):
    code = (
        "import os, fuzz_files; os.chdir('inside'); fuzz_files.confine(fuzz_files.Path.cwd())(); "
        "open('x', 'w'); os.mkdir('y'); open('../z', 'w')"
    )
    (tmp_path / "inside").mkdir()
    environment = os.environ | {"PYTHONPATH": f"{FUZZ}:{FUZZ.parents[1]}"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=True,
    )
    assert result.stderr == f"{fuzz_files.OUTSIDE} '../z'\n"


def test_empty_files_can_be_mutated(tmp_path):
    path = tmp_path / "lock"
    for seed in range(20):
        path.write_bytes(b"")
        assert mutate(path, make_rng(seed))


def test_same_compares_bit_by_bit():
    nan = float("nan")

    def state(*weights: float, num_rows: int = 1) -> dict:
        return {"model": {"weight": torch.tensor(weights)}, "rows": [{"loss": 1.0}] * num_rows}

    assert same(state(1.0, nan), state(1.0, nan))
    assert not same(state(1.0, nan), state(1.0, 1.0))
    assert not same(state(1.0, nan), state(1.0, nan, num_rows=2))
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_table_counts_runs_hits_and_faults(tmp_path):
    path = tmp_path / "results"
    fuzz.save_result(3, Result("kill", "glow", 2, ""), path)
    fuzz.save_result(1, Result("kill", "maf", 1, "metrics"), path)
    fuzz.save_result(1, Result("disk", "\udcff", 1, ""), path)
    rows = fuzz.table(fuzz.load_results(path)).splitlines()
    assert rows[2:] == ["| kill | 1, 3 | 2 | 3 | 1 |", "| disk | 1 | 1 | 1 | 0 |"]
