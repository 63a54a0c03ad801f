"""Several processes train as one does: their shares, their sums, and what they leave."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from test_house import compose_config
from test_training import rows, spawn, wait_for_step
from together import judge, work
from torch import distributed as dist

from flowgen.training.checkpoint import read_checkpoint
from flowgen.training.distributed import ProcessGroup, join
from flowgen.training.run_dir import Run
from flowgen.utils import distributed as shares
from flowgen.utils.distributed import Rank, split
from flowgen.utils.errors import UserError

TINY = [word for word in SMALL if not word.startswith("model.")]
MODELS = {  # by descent: Adam makes steps of the rounding errors that are the gradient of a bias before a batch normalisation
    "glow": [
        *SMALL,
        "model.dequantization=variational",
        "data.random_flip=true",
        "trainer.grad_accum_steps=2",
        "trainer.batch_size=8",
    ],
    "realnvp": [
        *TINY,
        "model=realnvp",
        "model.width=4",
        "model.num_blocks=1",
        "model.levels=1",
        "trainer.optimizer=sgd",
    ],
    "nice": [*TINY, "model=nice", "model.width=8"],
    "tarflow": [
        *TINY,
        "model=tarflow",
        "model.width=8",
        "model.num_layers=[1,1]",
        "model.dropout=0.2",
        "trainer.optimizer=sgd",
    ],
    "maf": [*TINY, "model=maf", "model.width=16", "trainer.optimizer=sgd"],
}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def config_of(name: str, images: Path, steps: int) -> dict:
    ends = [
        f"trainer.steps={steps}",
        "trainer.warmdown_ratio=0",
        "trainer.warmup=0",
        "trainer.precision=float32",
        "trainer.eval_every=10",
    ]
    return compose_config(*MODELS[name], f"data.root={images}", *ends)


def together(processes: int, jobs: list, path: Path) -> str:
    path.write_text(json.dumps(jobs))
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    done = subprocess.run(
        [*words, str(Path(__file__).with_name("together.py")), str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def apart(one: Path, other: Path) -> float:
    states = [read_checkpoint(Run(run).last) for run in (one, other)]
    pairs = [
        (states[0][part][name], states[1][part][name])
        for part in ("model", "ema")
        for name in states[0][part]
    ]
    assert states[0]["step"] == states[1]["step"] and all(
        mine.dtype == theirs.dtype for mine, theirs in pairs
    )
    return max((mine.double() - theirs.double()).abs().max().item() for mine, theirs in pairs)


@pytest.mark.long
def test_two_processes_train_as_one_does_and_judge_to_the_same_bit(images, tmp_path, double):
    jobs = {
        count: [
            (
                str(tmp_path / str(count) / name),
                config_of(name, images, 20 if name == "glow" else 5),
            )
            for name in MODELS
        ]
        for count in (1, 2)
    }
    work(jobs[1], tmp_path / "one.judged")
    said = together(2, jobs[2], tmp_path / "two.json")
    for name in MODELS:
        assert apart(tmp_path / "1" / name, tmp_path / "2" / name) < 1e-12, name
        both = [rows(tmp_path / count / name) for count in ("1", "2")]
        assert [row.keys() for row in both[0]] == [row.keys() for row in both[1]]
    assert (
        "rank 1 writes" in said and f"rank 1 writes {tmp_path / '2'}" not in said
    )  # but the cache's lock
    assert judge(ProcessGroup(), Path(jobs[2][0][0])) == (tmp_path / "two.judged").read_text()


@pytest.mark.long
def test_a_run_is_resumed_by_any_number_of_processes(images, tmp_path, double):
    work([(str(tmp_path / "whole"), config_of("glow", images, 15))], tmp_path / "whole.judged")
    changed, config = tmp_path / "changed", config_of("glow", images, 15)

    def until(steps: int) -> list:
        """The run's own configuration ends earlier: what a checkpoint holds is where the next part goes on from."""
        state = read_checkpoint(Run(changed).last) if Run(changed).last.exists() else None
        if state is None:
            return [(str(changed), config | {"trainer": config["trainer"] | {"steps": steps}})]
        state["config"]["trainer"]["steps"] = steps
        torch.save(state, Run(changed).last)
        return [(str(changed), None)]

    together(2, until(5), tmp_path / "a.json")
    work(until(10), tmp_path / "b.judged")
    together(4, until(15), tmp_path / "c.json")
    assert apart(tmp_path / "whole", changed) < 1e-12


def ranks(launcher: int) -> dict[int, int]:
    """The process of every rank that a launcher has started."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(word[5:]): int(child) for word in environment if word.startswith(b"RANK=")}
    return found


@pytest.mark.long
def test_a_run_that_loses_a_process_says_how_to_go_on_and_does(images, tmp_path, command):
    """First the process that writes, then another, then an interrupt, then one process alone."""
    run = tmp_path / "run"
    words = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=4000",
        "trainer.warmdown_ratio=0",
        "trainer.save_every=2",
    ]
    quiet = ["trainer.eval_every=10000", "trainer.sample_every=10000"]
    process, step = (
        spawn("train", *words, *quiet, "trainer.num_processes=2", f"output_dir={run}"),
        0,
    )
    for rank in (0, 1):
        wait_for_step(
            run, step + random.randrange(3, 20)
        )  # up to two rows lie beyond the checkpoint already
        os.kill(ranks(process.pid)[rank], signal.SIGKILL)
        said, _ = process.communicate()
        errors = [
            line for line in said.splitlines() if line.startswith("flowgen: ") or "Error" in line
        ]
        assert process.returncode == 1, said
        assert errors == [
            f"flowgen: one of the 2 processes has died: go on with `flowgen resume {run}`"
        ], said
        step = read_checkpoint(Run(run).last)["step"]
        process = spawn("resume", run)
    wait_for_step(run, step + 3)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert (
        process.returncode == 130
        and said.count("stopped by SIGINT and saved") == 1
        and "Error" not in said
    ), said
    stopped = read_checkpoint(Run(run).last)["step"]
    assert stopped >= step + 3
    status, _, error = command(
        "resume", run, "trainer.num_processes=null", f"trainer.steps={stopped + 1}"
    )
    assert status == 0 and rows(run)[-1]["step"] == stopped + 1, error


def test_a_share_is_as_many_rows_of_every_part():
    rows = [Rank(rank, 2).rows(12, 3).tolist() for rank in range(2)]
    assert rows == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
    whole = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    for rank in range(3):
        torch.manual_seed(0)
        with split(Rank(rank, 3)):
            assert torch.equal(
                shares.draw(torch.rand, torch.Size((2, 2))), whole[2 * rank : 2 * rank + 2]
            )
            generator = torch.Generator().manual_seed(0)
            assert torch.equal(shares.draw(torch.rand, torch.Size((2, 2)), generator), whole[:2])


def test_a_batch_that_cannot_be_shared_names_the_next_that_can():
    ProcessGroup(1, 2).check_divides(8, 4)
    with pytest.raises(UserError, match="batch_size=12"):
        ProcessGroup(1, 3).check_divides(16, 2)


def test_more_processes_than_gpus_train_on_the_cpu(monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(
        dist,
        "rendezvous",
        lambda *way, **how: iter([(dist.HashStore(), int(os.environ["RANK"]), 2)]),
    )
    monkeypatch.setattr(dist, "init_process_group", lambda *way, **how: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with join() as team:
            team.check_device(torch.device("cpu"))
            if rank == "0":
                team.check_device(torch.device("cuda"))
    assert chosen == [0]
    with pytest.raises(
        UserError, match=r"process 2 of this machine finds 1 GPU: .* trainer\.device=cpu"
    ):
        team.check_device(torch.device("cuda"))


def test_what_several_processes_cannot_do_is_said_at_once(images, tmp_path, command, monkeypatch):
    assert (
        "devices must be a whole number"
        in command("train", *SMALL, f"data.root={images}", "trainer.num_processes=two")[2]
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert (
        "without torchrun"
        in command("train", "-m", *SMALL, f"data.root={images}", "model.width=8,16")[2]
    )
