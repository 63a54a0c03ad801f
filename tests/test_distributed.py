"""Training in several processes: the same weights and metrics as one process."""

import copy
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
from distributed_worker import evaluate, run_jobs
from test_training import rows, spawn, wait_for_step
from torch import distributed as dist
from torch import nn

from flowgen.bijections.linear import BatchNorm
from flowgen.bijections.networks import Dropout, RandomSource
from flowgen.config.compose import compose_config
from flowgen.training.checkpoint import read_checkpoint
from flowgen.training.distributed import (
    ShardedRandomSource,
    SyncBatchNorm,
    SyncBatchNorm2d,
    WorkerGroup,
    join,
    shard_batches,
)
from flowgen.training.run_dir import Run
from flowgen.utils.errors import UserError

TINY = [override for override in SMALL if not override.startswith("model.")]
# With SGD if the model has biases before a batch norm: their gradients are rounding errors, which
# Adam scales up to whole steps.
MODELS = {
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
    "flow_gan": [*SMALL, "model=flow_gan", "model.discriminator_width=4", "trainer.optimizer=sgd"],
    "gan": [
        *TINY,
        "model=gan",
        "model.loss=wgan_gp",
        "model.width=4",
        "model.discriminator_width=4",
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
    "diffusion": [*TINY, "model=diffusion", "model.width=4", "trainer.optimizer=sgd"],
    "maf": [*TINY, "model=maf", "model.width=16", "trainer.optimizer=sgd"],
    "pixelcnn": [*TINY, "model=pixelcnn", "model.width=4", "model.num_layers=1"],
    "pixelcnn mixture": [
        *TINY,
        "model=pixelcnn",
        "model.width=4",
        "model.num_layers=1",
        "model.num_components=2",
    ],
    "vae": [
        *TINY,
        "model=vae",
        "model.width=4",
        "model.posterior=planar",
        "model.free_bits=0.1",
        "model.warmup_images=50",
    ],
    "vqvae": [
        *TINY,
        "model=vqvae",
        "model.width=8",
        "model.quantizer=vq",
        "trainer.optimizer=sgd",
    ],
    "reverse_kl": [
        *(override for override in TINY if not override.startswith("data")),
        "data=energy",
        "data.num_points=100",
        "model=reverse_kl",
        "model.width=4",
        "model.anneal_samples=20",
        "trainer.optimizer=sgd",
    ],
    "recomputed": [
        *TINY,
        "model=realnvp",
        "model.width=4",
        "model.num_blocks=1",
        "model.levels=1",
        "trainer.optimizer=sgd",
        "trainer.activation_memory=checkpoint",
    ],
}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_config(name: str, images: Path, steps: int) -> dict:
    settings = [
        f"trainer.steps={steps}",
        "trainer.warmdown_ratio=0",
        "trainer.warmup=0",
        "trainer.precision=float32",
        "trainer.eval_every=10",
    ]
    if "data=energy" not in MODELS[name]:
        settings.append(f"data.root={images}")
    return compose_config([*MODELS[name], *settings]).config


def run_in_processes(num_processes: int, jobs: list, path: Path) -> str:
    """Run jobs of distributed_worker.py in several processes and return their standard error."""
    path.write_text(json.dumps(jobs))
    script = Path(__file__).with_name("distributed_worker.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    argv = [*launcher, f"--nproc-per-node={num_processes}", str(script), str(path)]
    result = subprocess.run(argv, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


def largest_difference(first: Path, second: Path) -> float:
    """Return the largest difference of weights between two runs."""
    states = [read_checkpoint(Run(run).last) for run in (first, second)]
    pairs = [
        (states[0][part][name], states[1][part][name])
        for part in ("model", "ema")
        for name in states[0][part]
    ]
    assert states[0]["step"] == states[1]["step"]
    assert all(left.dtype == right.dtype for left, right in pairs)
    return max((left.double() - right.double()).abs().max().item() for left, right in pairs)


@pytest.mark.long
def test_two_processes_train_like_one_and_evaluate_to_the_same_bit(images, tmp_path, double):
    jobs = {
        count: [
            (
                str(tmp_path / str(count) / name),
                make_config(name, images, 20 if name == "glow" else 5),
            )
            for name in MODELS
        ]
        for count in (1, 2)
    }
    run_jobs(jobs[1], tmp_path / "one.metrics")
    stderr = run_in_processes(2, jobs[2], tmp_path / "two.json")
    for name in MODELS:
        difference = largest_difference(tmp_path / "1" / name, tmp_path / "2" / name)
        assert difference < 1e-12, name
        metrics = [rows(tmp_path / count / name) for count in ("1", "2")]
        assert [row.keys() for row in metrics[0]] == [row.keys() for row in metrics[1]]
    # Process 1 writes the lock of the image cache, but nothing of a run.
    assert "rank 1 writes" in stderr
    assert f"rank 1 writes {tmp_path / '2'}" not in stderr
    expected = evaluate(WorkerGroup(), Path(jobs[2][0][0]))
    assert expected == (tmp_path / "two.metrics").read_text()


@pytest.mark.slow
def test_a_run_can_be_resumed_by_any_number_of_processes(images, tmp_path, double):
    config = make_config("glow", images, 15)
    run_jobs([(str(tmp_path / "whole"), config)], tmp_path / "whole.metrics")
    changed = tmp_path / "changed"

    def until(steps: int) -> list:
        """Return a job that ends after `steps`; a checkpoint's configuration says when to end."""
        if not Run(changed).last.exists():
            return [(str(changed), config | {"trainer": config["trainer"] | {"steps": steps}})]
        state = read_checkpoint(Run(changed).last)
        state["config"]["trainer"]["steps"] = steps
        torch.save(state, Run(changed).last)
        return [(str(changed), None)]

    run_in_processes(2, until(5), tmp_path / "a.json")
    run_jobs(until(10), tmp_path / "b.metrics")
    run_in_processes(4, until(15), tmp_path / "c.json")
    assert largest_difference(tmp_path / "whole", changed) < 1e-12


def process_of_rank(launcher: int) -> dict[int, int]:
    """Return the process of every rank that a launcher has started."""
    processes = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        for variable in environment:
            if variable.startswith(b"RANK="):
                processes[int(variable[5:])] = int(child)
    return processes


@pytest.mark.slow
def test_a_run_that_loses_a_process_tells_how_to_resume(images, tmp_path, command):
    """Kill the main process, then a worker, then interrupt, then resume with one process."""
    run = tmp_path / "run"
    overrides = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=4000",
        "trainer.warmdown_ratio=0",
        "trainer.save_every=2",
        "trainer.eval_every=10000",
        "trainer.sample_every=10000",
        "trainer.num_processes=2",
    ]
    process = spawn("train", *overrides, f"output_dir={run}")
    step = 0
    random_numbers = random.Random(0)
    for rank in (0, 1):
        # Up to two rows of metrics may be later than the checkpoint already.
        wait_for_step(run, step + random_numbers.randrange(3, 20))
        os.kill(process_of_rank(process.pid)[rank], signal.SIGKILL)
        output, _ = process.communicate()
        errors = [
            line for line in output.splitlines() if line.startswith("flowgen: ") or "Error" in line
        ]
        assert process.returncode == 1, output
        assert len(errors) == 1, output
        assert errors[0].startswith("flowgen: one of the 2 processes has died: "), output
        assert f"`flowgen resume {run}`" in errors[0], output
        step = read_checkpoint(Run(run).last)["step"]
        process = spawn("resume", run)
    wait_for_step(run, step + 3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    assert output.count("stopped by SIGINT and saved") == 1, output
    assert "Error" not in output, output
    stopped = read_checkpoint(Run(run).last)["step"]
    assert stopped >= step + 3
    alone = ["trainer.num_processes=null", f"trainer.steps={stopped + 1}"]
    status, _, error = command("resume", run, *alone)
    assert status == 0, error
    assert rows(run)[-1]["step"] == stopped + 1, error


def test_every_process_gets_equally_many_rows_of_each_micro_batch():
    shares = [WorkerGroup(rank, 2).batch_indices(12, 3).tolist() for rank in range(2)]
    assert shares == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


def test_processes_share_the_memory_of_their_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert WorkerGroup(0, 4).num_machines == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert WorkerGroup(0, 4).num_machines == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert WorkerGroup(0, 4).num_machines == 1


def test_a_sharded_random_source_returns_its_rows_of_the_whole_batch():
    whole = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    for rank in range(3):
        source = ShardedRandomSource(rank, 3)
        torch.manual_seed(0)
        assert torch.equal(source(torch.rand, (2, 2)), whole[2 * rank : 2 * rank + 2])
        generator = torch.Generator().manual_seed(0)
        assert torch.equal(source(torch.rand, (2, 2), generator), whole[:2])
        source.eval()
        torch.manual_seed(0)
        assert torch.equal(source(torch.rand, (2, 2)), whole[:2])


def test_shard_batches_replaces_sources_and_batch_norms_but_no_tensors():
    model = nn.Sequential(Dropout(0.5), nn.Sequential(nn.BatchNorm2d(3), BatchNorm(3)))
    copied = copy.deepcopy(model)
    names = list(model.state_dict())
    tensors = [*model.parameters(), *model.buffers()]
    shard_batches(model, 1, 2)
    assert list(model.state_dict()) == names
    assert all(
        before is after
        for before, after in zip(tensors, [*model.parameters(), *model.buffers()], strict=True)
    )
    classes = [type(module) for module in model.modules()]
    assert {ShardedRandomSource, SyncBatchNorm, SyncBatchNorm2d} <= set(classes)
    assert RandomSource not in classes
    assert RandomSource in [type(module) for module in copied.modules()]
    assert all(module.training for module in model.modules())


def test_a_batch_that_cannot_be_split_names_the_next_size_that_can():
    WorkerGroup(1, 2).check_divides(8, 4)
    with pytest.raises(UserError, match="batch_size=12"):
        WorkerGroup(1, 3).check_divides(16, 2)


def test_more_processes_than_gpus_can_train_on_the_cpu(monkeypatch):
    devices: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(
        dist,
        "rendezvous",
        lambda *args, **kwargs: iter([(dist.HashStore(), int(os.environ["RANK"]), 2)]),
    )
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with join() as group:
            group.check_device(torch.device("cpu"))
            if rank == "0":
                group.check_device(torch.device("cuda"))
    assert devices == [0]
    message = r"process 2 of this machine finds 1 GPU: .* trainer\.device=cpu"
    with pytest.raises(UserError, match=message):
        group.check_device(torch.device("cuda"))


def test_impossible_uses_of_several_processes_are_refused(images, command, monkeypatch):
    overrides = [*SMALL, f"data.root={images}"]
    error = command("train", *overrides, "trainer.num_processes=two")[2]
    assert "num_processes must be a whole number" in error
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "without torchrun" in command("train", "-m", *overrides, "model.width=8,16")[2]
