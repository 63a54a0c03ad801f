"""Whether `make faults`, of which `.ci/run` holds a small share, sees what is at fault."""

import os
import subprocess
import sys
from pathlib import Path

import faults
import foreign
import pytest
import torch
from kills import Result
from mutations import spoil
from points import drawn
from trainings import TRAININGS, same
from zygote import Outcome

from flowgen.config.compose import group_options

SCRIPTS = Path(__file__).parents[1] / "scripts" / "faults"


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (Outcome(0, "done", "", 1.0), ""),
        (Outcome(1, "", "a warning\nflowgen: x does not exist: name another\n", 1.0), ""),
        (Outcome(None, "", "", 60.0), "hung"),
        (Outcome(1, "", "Traceback (most recent call last):\nflowgen: x", 1.0), "a traceback"),
        (
            Outcome(
                1, "", "flowgen: KeyError: x (this is a bug in flowgen: --debug shows the traceback)", 1.0
            ),
            "a fault of flowgen",
        ),
        (Outcome(1, "", "", 1.0), "without one plain sentence"),
        (Outcome(1, "", "flowgen: one\nflowgen: two", 1.0), "without one plain sentence"),
        (Outcome(-11, "", "", 1.0), "status -11"),
    ],
)
def test_only_two_ends_are_good(outcome, fault):
    assert fault in outcome.fault and bool(fault) == bool(outcome.fault)


def test_every_model_is_trained_and_killed():
    named = {
        word.removeprefix("model=")
        for words in TRAININGS.values()
        for word in words
        if word.startswith("model=")
    }
    assert named == set(group_options("model"))


def test_what_is_written_elsewhere_is_seen(tmp_path):
    code = "import os, foreign; os.chdir('here'); foreign.confined(foreign.Path.cwd())(); open('x', 'w'); os.mkdir('y'); open('../z', 'w')"
    (tmp_path / "here").mkdir()
    environment = os.environ | {"PYTHONPATH": f"{SCRIPTS}:{SCRIPTS.parents[1]}"}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=True,
    )
    assert ended.stderr == f"{foreign.ELSEWHERE} '../z'\n"


def test_an_empty_file_can_be_spoilt(tmp_path):
    for seed in range(20):
        (tmp_path / "lock").write_bytes(b"")
        assert spoil(tmp_path / "lock", drawn(seed))


def test_the_same_is_the_same_bit_by_bit():
    one = {"model": {"weight": torch.tensor([1.0, float("nan")])}, "rows": [{"loss": 1.0}]}
    assert same(
        one, {"model": {"weight": torch.tensor([1.0, float("nan")])}, "rows": [{"loss": 1.0}]}
    )
    assert not same(one, {"model": {"weight": torch.tensor([1.0, 1.0])}, "rows": [{"loss": 1.0}]})
    assert not same(
        one,
        {
            "model": {"weight": torch.tensor([1.0, float("nan")])},
            "rows": [{"loss": 1.0}, {"loss": 1.0}],
        },
    )
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_the_table_counts_what_is_at_fault(tmp_path):
    for seed, result in (
        (3, Result("kill", "glow", 2, "")),
        (1, Result("kill", "maf", 1, "rows")),
        (1, Result("disk", "\udcff", 1, "")),
    ):
        faults.keep(seed, result, tmp_path / "results")
    rows = faults.table(faults.kept(tmp_path / "results")).splitlines()
    assert rows[2:] == ["| kill | 1, 3 | 2 | 3 | 1 |", "| disk | 1 | 1 | 1 | 0 |"]
