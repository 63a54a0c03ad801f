"""Shared fixtures: tiny data sets and runs, and a short training loop.

Each test process uses one thread, unless OMP_NUM_THREADS is set.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image

from flowgen import cli
from flowgen.bijections.linear import update_bn
from flowgen.config.compose import read_config, save_config
from flowgen.models.base import GenerativeModel
from flowgen.training.checkpoint import FORMAT, write_checkpoint
from flowgen.training.device import autocast_dtype
from flowgen.training.optim import learning_rate_factor

if TYPE_CHECKING:
    from flowgen.serving.session import ModelSession

torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores it in background jobs, and commands under test would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
BN_UPDATE_BATCHES = 40  # as in the trainer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "long" not in item.keywords)


SMALL = [
    "data=folder",
    "data.size=8",
    "model.steps_per_level=2",
    "model.width=8",
    "trainer.minutes=null",
    "trainer.batch_size=4",
    "trainer.init_images=16",
    "trainer.eval_images=8",
    "trainer.log_every=1",
    "trainer.lr=1e-3",
]

RBM = [
    "model=rbm",
    "data=folder",
    "data.size=8",
    "model.hidden=4",
    "trainer.steps=3",
    "trainer.minutes=null",
]

CHECKPOINT = {  # the smallest valid checkpoint
    "format": FORMAT,
    "config": {"model": {}, "data": {}, "trainer": {"sample_temperature": 1.0}, "seed": 0},
    "step": 1,
    "images_seen": 1,
    "model": {},
    "ema": None,
    "optimizer": {},
    "progress": {"best": 0.0, "seconds": 0.0},
    "nan_recovery": {},
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run every test in a new folder, with an empty cache and no data folder."""
    folder = tmp_path_factory.mktemp("work")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FLOWGEN_CACHE", str(folder / "cache"))
    monkeypatch.setenv("FLOWGEN_DATA", str(folder / "data"))
    return folder


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def fit(
    model: GenerativeModel, batch: Callable[[int], tuple], steps: int, lr: float, decay: float = 0.0
) -> None:
    """Train an initialized model on batch(0), batch(1), ... as the trainer does.

    It uses the same precision, and updates the batch statistics at the end.
    """
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    dtype = autocast_dtype("auto", torch.device("cpu"))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * learning_rate_factor(step, step / steps, 0, decay)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(*batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 50.0)
        optimizer.step()
    update_bn(model, (batch(steps + index) for index in range(BN_UPDATE_BATCHES)))
    model.eval()


@contextmanager
def started(*words: object) -> Iterator[subprocess.Popen[str]]:
    """Run `flowgen WORDS` in another process, and kill it at the end."""
    command = [sys.executable, "-m", "flowgen", *map(str, words)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # otherwise the end of the block waits for it


def save_image(path: Path, shape: tuple[int, ...] = (8, 8, 3)) -> Path:
    """Save a smooth random image, which a model can learn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    slope = torch.linspace(0, 1, shape[0]).view(-1, *[1] * (len(shape) - 1)) * torch.rand(shape[2:])
    pixels = (torch.rand(1) + slope).expand(shape) / 2
    noisy = (255 * pixels + 8 * torch.rand(shape)).clamp(0, 255).to(torch.uint8)
    Image.fromarray(noisy.numpy()).save(path)
    return path


def save_images(folder: Path) -> Path:
    """Save 40 small color images."""
    torch.manual_seed(0)
    for index in range(40):
        save_image(folder / f"{index:03d}.png")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return save_images(tmp_path / "images")


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs `flowgen ARGUMENTS` in this process.

    It returns exit status, standard output and standard error.
    """

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flowgen", *map(str, arguments)])
        status: object = 0
        try:
            cli.main()
        except SystemExit as error:
            status = error.code
        output = capsys.readouterr()
        assert isinstance(status, int)
        return status, output.out, output.err

    return run


def trained(folder: Path, **runs: list[str]) -> Path:
    """Train runs with these names and overrides in a folder, and return the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWGEN_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        for name, overrides in runs.items():
            cli.main(["train", *overrides, f"output_dir={folder / name}"])
    return folder


@pytest.fixture(scope="session")
def six_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("six_steps")
    return (
        trained(
            folder, run=[*SMALL, f"data.root={save_images(folder / 'images')}", "trainer.steps=6"]
        )
        / "run"
    )


@pytest.fixture
def tiny_run(six_steps: Path, images: Path, tmp_path: Path) -> Path:
    """Return a copy of the run of a Glow that was trained for six steps."""
    run = Path(shutil.copytree(six_steps, tmp_path / "run"))
    config = read_config(run / "config.yaml")
    config["data"]["root"] = str(images)
    save_config(config, run / "config.yaml")
    for path in run.glob("checkpoints/*.pt"):
        write_checkpoint(torch.load(path, weights_only=True) | {"config": config}, path)
    return run


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with color images of two classes and the runs `glow` and `rbm`."""
    folder = tmp_path_factory.mktemp("runs")
    for index in range(40):
        save_image(folder / "images" / "ab"[index % 2] / f"{index:03d}.png")
    root = f"data.root={folder / 'images'}"
    return trained(
        folder, glow=[*SMALL, root, "model.num_classes=2", "trainer.steps=6"], rbm=[*RBM, root]
    )


@pytest.fixture(scope="module")
def glow(two_runs: Path) -> "ModelSession":
    from flowgen.serving.session import ModelSession

    return ModelSession(str(two_runs / "glow"), "cpu")


@pytest.fixture(scope="module")
def rbm(two_runs: Path) -> "ModelSession":
    from flowgen.serving.session import ModelSession

    return ModelSession(str(two_runs / "rbm"), "cpu")
