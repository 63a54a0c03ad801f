"""The trainer: its schedule, exact resuming, rescue, and what it leaves on disk."""

import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL

import flowgen
from flowgen.bijections import Affine, BatchNorm, estimate_statistics
from flowgen.config import build_data
from flowgen.data import Images
from flowgen.errors import FlowgenError
from flowgen.models import Glow
from flowgen.training.checkpoint import KEYS, read_checkpoint, write_checkpoint
from flowgen.training.device import choose_device
from flowgen.training.run import Run, best_figure
from flowgen.training.schedule import learning_rate_factor, warmup_steps

NORMALISED = ["model=realnvp", "model.blocks=1", "model.levels=1", *[word for word in SMALL if "steps_per_level" not in word]]
MEASURED = {"images_per_second", "seconds", "memory_gib"}


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics without what no two runs share."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit, through dicts and lists."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same_run(one: Path, other: Path) -> None:
    states = [read_checkpoint(run / "checkpoints" / "last.pt") for run in (one, other)]
    for key in ("step", "images_seen", "model", "ema", "optimizer", "random"):
        assert same(states[0][key], states[1][key]), key
    assert rows(one) == rows(other)


def spawn(*arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "flowgen", *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        path = run / "metrics.jsonl"
        if path.exists() and path.read_text().count('"train"') >= step:
            return
        time.sleep(0.01)
    raise TimeoutError


def test_schedule_rises_over_the_warm_up_and_falls_at_the_end():
    assert [learning_rate_factor(step, 0.0, 4, 0.5) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [learning_rate_factor(99, progress, 4, 0.5) for progress in (0.5, 0.75, 1.0)] == [1.0, 0.5, 0.0]
    assert learning_rate_factor(99, 0.99, 0, 0.0) == 1.0
    assert warmup_steps(7, 1000, 10) == 7 and warmup_steps("1 epoch", 1000, 10) == 100 and warmup_steps("2.5 epochs", 1000, 10) == 250
    with pytest.raises(FlowgenError, match="1 epoch"):
        warmup_steps("soon", 1000, 10)


def test_a_run_leaves_what_the_design_names(tiny_run):
    for name in ("config.yaml", "metrics.jsonl", "train.log", "tensorboard", "curves.png", "samples/step_00000006.png"):
        assert (tiny_run / name).exists(), name
    assert {path.name for path in (tiny_run / "checkpoints").iterdir()} == {"last.pt", "best.pt"}
    state = read_checkpoint(tiny_run / "checkpoints" / "last.pt")
    assert state.keys() >= KEYS and state["step"] == 6 and state["images_seen"] == 24
    train = [row for row in rows(tiny_run) if row["split"] == "train"]
    assert [row["step"] for row in train] == [1, 2, 3, 4, 5, 6]
    assert all(row["bits_per_dim"] == row["loss"] and {"lr", "grad_norm"} <= row.keys() for row in train)
    assert [row["step"] for row in rows(tiny_run) if row["split"] == "validation"] == [6]


def test_choices_are_made_on_validation_images_and_the_test_split_is_judged_once(images, tmp_path, command, monkeypatch):
    seen: list[str] = []
    batches = Images.batches
    monkeypatch.setattr(Images, "batches", lambda data, split, *rest: [seen.append(split), batches(data, split, *rest)][1])
    words = [*SMALL, f"data.root={images}", "trainer.evaluate_every=2", f"out={tmp_path / 'run'}"]
    assert command("train", *words, "trainer.steps=6")[0] == 0
    assert [row["step"] for row in rows(tmp_path / "run") if row["split"] == "validation"] == [2, 4, 6]
    assert [row["step"] for row in rows(tmp_path / "run") if row["split"] == "test"] == [6] and seen.count("test") == 1
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["metrics"]["best"] == min(row["bits_per_dim"] for row in rows(tmp_path / "run") if row["split"] == "validation")


def test_a_run_is_known_by_its_test_figure_once_it_has_ended(tmp_path):
    validation = [{"step": step, "split": "validation", "bits_per_dim": bits} for step, bits in ((1, 3.0), (2, 1.0), (3, 2.0))]
    test = {"step": 3, "split": "test", "bits_per_dim": 2.5, "bits_per_dim_error": 0.25}
    assert best_figure(validation) == "validation bits_per_dim 1.000"
    assert best_figure([*validation, test]) == "test bits_per_dim 2.500 ± 0.250"
    assert best_figure([*validation, test, {"step": 4, "split": "validation", "bits_per_dim": 4.0}]) == "validation bits_per_dim 1.000"
    assert best_figure([test | {"step": 1, "bits_per_dim": 1.5}, test]) == "test bits_per_dim 2.500 ± 0.250"


def test_load_gives_the_averaged_model_in_evaluation_mode(tiny_run):
    model = flowgen.load(tiny_run)
    state = read_checkpoint(tiny_run / "checkpoints" / "last.pt")
    assert isinstance(model, Glow) and not model.training
    averages = {name.removeprefix("module."): value for name, value in state["ema"].items() if name != "n_averaged"}
    assert same(dict(model.state_dict()), averages) and not same(dict(model.state_dict()), dict(state["model"]))


@pytest.mark.parametrize("ema", [0.99, 0])
def test_batch_statistics_are_those_of_the_weights_that_are_judged(images, tmp_path, command, ema):
    """What was judged, what the checkpoint holds and what fresh training batches say agree; the last batches' statistics do not."""
    words = [*NORMALISED, f"data.root={images}", "trainer.steps=30", "trainer.lr=1e-2", f"trainer.ema={ema}"]
    run = tmp_path / "run"
    status, _, error = command("train", *words, "trainer.warmup=0", "trainer.decay=0", "trainer.evaluate_every=30", f"out={run}")
    assert status == 0, error
    config = read_checkpoint(Run(run).last)["config"]
    data, model = build_data(config), flowgen.load(run)
    judged = rows(run)[-1]["bits_per_dim"]
    assert judged == pytest.approx(model.evaluate(data.batches("test", 4, 8))["bits_per_dim"], rel=1e-6)

    def deviations() -> list[torch.Tensor]:
        return [value.clone() for name, value in model.named_buffers() if name.endswith("var")]

    kept = deviations()
    estimate_statistics(model, (data.draw(4 * number, 4, 1) for number in range(200)))
    fresh = deviations()
    model.load_state_dict(read_checkpoint(Run(run).last)["model"])
    apart = [sum((one - other).abs().sum() for one, other in zip(fresh, others, strict=True)) for others in (kept, deviations())]
    assert apart[0] < apart[1] / 2


@pytest.mark.parametrize(("model", "kill_at"), [(SMALL, 0), (SMALL, 3), (SMALL, 11), (NORMALISED, 11)])
def test_killed_and_resumed_equals_never_stopped(images, tmp_path, command, model, kill_at):
    words = [*model, f"data.root={images}", "data.flip=true", "trainer.steps=14", "trainer.save_every=5", "trainer.evaluate_every=4"]
    assert command("train", *words, f"out={tmp_path / 'whole'}")[0] == 0
    killed = tmp_path / "killed"
    process = spawn("train", *words, f"out={killed}")
    wait_for_step(killed, kill_at) if kill_at else wait_for_file(killed / "config.yaml")
    process.send_signal(signal.SIGKILL)
    process.wait()
    status, _, error = command("resume", killed)
    assert status == 0 or "has ended" in error, error  # it may have been too quick to be killed
    assert_same_run(tmp_path / "whole", killed)


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_stopped_by_sigterm_saves_and_says_how_to_resume(images, tmp_path, command):
    words = [*SMALL, f"data.root={images}", "trainer.steps=4000", "trainer.evaluate_every=100000", "trainer.sample_every=100000"]
    stopped = tmp_path / "stopped"
    process = spawn("train", *words, f"out={stopped}")
    wait_for_step(stopped, 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and f"flowgen resume {stopped}" in output
    step = read_checkpoint(stopped / "checkpoints" / "last.pt")["step"]
    assert 5 <= step < 4000
    end = ["trainer.decay=0", f"trainer.steps={step + 3}"]
    assert command("resume", stopped, *end)[0] == 0
    assert rows(stopped)[-1]["step"] == step + 3


def test_an_ended_run_asks_for_more_steps(tiny_run, command):
    status, _, error = command("resume", tiny_run)
    assert status == 1 and "trainer.steps=12" in error
    assert command("resume", tiny_run, "trainer.steps=8")[0] == 0
    assert rows(tiny_run)[-1]["step"] == 8


def test_a_damaged_last_checkpoint_is_passed_over(images, tmp_path, command):
    words = [*SMALL, f"data.root={images}", "trainer.steps=6", "trainer.keep_every=4"]
    assert command("train", *words, f"out={tmp_path / 'run'}")[0] == 0
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    whole = read_checkpoint(last)
    last.write_bytes(last.read_bytes()[:1000])
    assert command("resume", tmp_path / "run")[0] == 0
    assert same(read_checkpoint(last)["model"], whole["model"])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_training_goes_like_the_eager_one(images, tmp_path, command):
    words = [*SMALL, "model.levels=1", "model.steps_per_level=1", f"data.root={images}", "trainer.batch_size=32", "trainer.steps=3"]
    for compiled in (True, False):
        assert command("train", *words, f"trainer.compile={compiled}", f"out={tmp_path / str(compiled)}")[0] == 0
    losses = [[row["loss"] for row in rows(tmp_path / name) if row["split"] == "train"] for name in ("True", "False")]
    assert losses[0] == pytest.approx(losses[1], abs=0.03)  # the compiler draws other noise
    states = [read_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["model"] for name in ("True", "False")]
    assert states[0].keys() == states[1].keys()


def test_accumulated_gradients_are_those_of_the_whole_batch(images, tmp_path, command):
    words = [*SMALL, f"data.root={images}", "trainer.steps=1", "trainer.warmup=0", "trainer.decay=0", "trainer.ema=0"]
    for parts in (1, 2):
        assert command("train", *words, f"trainer.accumulate={parts}", f"out={tmp_path / str(parts)}")[0] == 0
    one, two = (rows(tmp_path / str(parts))[0]["grad_norm"] for parts in (1, 2))
    assert one == pytest.approx(two, rel=0.2)  # the noise within the bins differs, nothing else does


def test_float32_convolutions_stay_float32_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    choose_device("cpu")
    assert not torch.backends.cudnn.allow_tf32


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> list[int]:
    """Make the loss of these training steps, counted from 1, not finite."""
    count, forward = [0], Glow.forward

    def bad_at_times(self: Glow, levels: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        count[0] += self.training
        return forward(self, levels, labels) * (math.nan if count[0] in calls and self.training else 1.0)

    monkeypatch.setattr(Glow, "forward", bad_at_times)
    return count


def test_a_bad_step_is_skipped_and_counted(images, tmp_path, command, monkeypatch):
    poison(monkeypatch, {3, 5})
    assert command("train", *SMALL, f"data.root={images}", "trainer.steps=6", f"out={tmp_path / 'run'}")[0] == 0
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["metrics"]["skipped"] == 2 and state["metrics"]["rewinds"] == 0 and state["optimizer"]["state"][0]["step"] == 4
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert rows(tmp_path / "run")[2]["loss"] is None


def test_a_bad_step_that_spoils_running_statistics_goes_back(images, tmp_path, command, monkeypatch):
    forward, calls = BatchNorm.forward, [0]

    def overflow(self, x, condition=None):
        calls[0] += torch.is_grad_enabled()
        return forward(self, x / 0 if torch.is_grad_enabled() and calls[0] == 40 else x, condition)

    monkeypatch.setattr(BatchNorm, "forward", overflow)
    words = ["model=maf", "model.width=16", *[word for word in SMALL if not word.startswith("model.")], f"data.root={images}"]
    status, _, error = command("train", *words, "trainer.steps=12", "trainer.evaluate_every=12", f"out={tmp_path / 'run'}")
    assert status == 0 and "back to step" in error
    last = [row for row in rows(tmp_path / "run") if row["split"] == "test"][-1]
    assert last["bits_per_dim"] is not None


def test_the_parameter_whose_gradient_is_bad_is_named(images, tmp_path, command, monkeypatch):
    backward = torch.Tensor.backward

    def spoil(self):
        backward(self)
        [*model.parameters()][-1].grad.fill_(math.nan)

    model = Glow.__new__(Glow)
    forward = Glow.forward

    def remember(self, *arguments):
        nonlocal model
        model = self if self.training else model
        return forward(self, *arguments)

    monkeypatch.setattr(Glow, "forward", remember)
    monkeypatch.setattr(torch.Tensor, "backward", spoil)
    status, _, error = command("train", *SMALL, f"data.root={images}", "trainer.steps=90", f"out={tmp_path / 'run'}")
    last = [name for name, _ in model.named_parameters()][-1]
    assert status == 1 and f"the gradient of {last}" in error


def test_several_bad_steps_go_back_with_half_the_learning_rate(images, tmp_path, command, monkeypatch):
    poison(monkeypatch, set(range(4, 9)))
    words = [*SMALL, f"data.root={images}", "trainer.steps=12", "trainer.save_every=2", "trainer.warmup=0", "trainer.decay=0"]
    status, _, error = command("train", *words, f"out={tmp_path / 'run'}")
    assert status == 0 and "back to step 2" in error
    steps = [row for row in rows(tmp_path / "run") if row["split"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["lr"] for row in steps] == [1e-3] * 2 + [5e-4] * 10


def test_hopeless_training_names_the_culprit_and_stops(images, tmp_path, command, monkeypatch):
    transform = Affine.forward
    monkeypatch.setattr(Affine, "forward", lambda self, a, p: transform(self, a / (len(a) != 4), p))  # training batches alone
    status, _, error = command("train", *SMALL, f"data.root={images}", "trainer.steps=90", f"out={tmp_path / 'run'}")
    assert status == 1 and "bijection.bijections.1.bijections.2 (Coupling)" in error and "trainer.lr below" in error
    assert "Traceback" not in error


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    state = dict.fromkeys(KEYS, 1) | {"config": {}, "model": {"weight": torch.rand(1000)}}
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    write_checkpoint(state, path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(FlowgenError, match="could not save") as error:
            write_checkpoint(state | {"model": {"weight": torch.rand(100_000)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "flowgen resume" in str(error.value)
    assert same(read_checkpoint(path), state) and [file.name for file in path.parent.iterdir()] == ["last.pt"]


def test_a_kill_between_the_names_of_a_checkpoint_loses_no_best(tmp_path, monkeypatch):
    run, state = Run(tmp_path), dict.fromkeys(KEYS, 1) | {"config": {}}
    run.save(state | {"step": 1}, best=True)
    replace = Path.replace

    def killed(self, target):
        if target == run.last:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save(state | {"step": 2}, best=True)
    assert read_checkpoint(run.best)["step"] == 2 and read_checkpoint(run.last)["step"] == 1


def test_a_run_that_ends_on_a_bad_step_is_saved(images, tmp_path, command, monkeypatch):
    poison(monkeypatch, {5, 6})
    assert command("train", *SMALL, f"data.root={images}", "trainer.steps=6", f"out={tmp_path / 'run'}")[0] == 0
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["step"] == 6 and state["metrics"]["failed"] == 2 and read_checkpoint(Run(tmp_path / "run").best)["step"] == 6


def test_a_second_return_goes_further_back(tmp_path):
    run, state = Run(tmp_path), dict.fromkeys(KEYS, 1) | {"config": {}}
    for step in (4, 8):
        run.save(state | {"step": step}, keep=True)
    assert run.last_good()["step"] == 8 and run.last_good(before=8)["step"] == 4 and run.last_good(before=4)["step"] == 8


def test_a_run_is_trained_by_one_process_alone(tiny_run, command):
    from flowgen.commands.train import _sole_trainer_of

    with _sole_trainer_of(Run(tiny_run)):
        status, _, error = command("resume", tiny_run, "trainer.steps=9")
    assert status == 1 and "another process" in error


def test_resume_from_a_named_checkpoint_file(images, tmp_path, command):
    words = [*SMALL, f"data.root={images}", "trainer.steps=8", "trainer.keep_every=4"]
    assert command("train", *words, f"out={tmp_path / 'run'}")[0] == 0
    whole = read_checkpoint(Run(tmp_path / "run").last)
    assert command("resume", Run(tmp_path / "run").numbered(4))[0] == 0
    assert same(read_checkpoint(Run(tmp_path / "run").last)["model"], whole["model"])


def test_a_failing_resume_leaves_the_configuration_alone(tiny_run, command):
    before = (tiny_run / "config.yaml").read_text()
    assert command("resume", tiny_run, "trainer.steps=9", "model.width=6")[0] == 1
    assert (tiny_run / "config.yaml").read_text() == before


def test_a_named_checkpoint_does_not_change_with_the_last(tmp_path):
    run = Run(tmp_path)
    state = dict.fromkeys(KEYS, 1) | {"config": {}, "step": 5}
    run.save(state, best=True, keep=True)
    run.save(state | {"step": 6})
    assert read_checkpoint(run.best)["step"] == read_checkpoint(run.numbered(5))["step"] == 5
    assert read_checkpoint(run.last)["step"] == 6


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_pickle_that_is_no_checkpoint_does_not_run(tmp_path, command):
    path = tmp_path / "bomb.pt"
    path.write_bytes(pickle.dumps(Bomb()))
    torch.save(Bomb(), tmp_path / "bomb2.pt")
    for name in ("bomb.pt", "bomb2.pt"):
        status, _, error = command("sample", "--run", tmp_path / name)
        assert status == 1 and error.count("\n") == 1 and "no checkpoint of flowgen" in error
    assert not Path("exploded").exists()


@pytest.mark.parametrize("target", ["os.system", "flowgen.cli.main", "flowgen.config.importlib.import_module", "flowgen.nothing.Here"])
def test_a_checkpoint_cannot_call_anything_but_classes_of_flowgen(tiny_run, command, target):
    path = tiny_run / "checkpoints" / "last.pt"
    state = read_checkpoint(path)
    state["config"]["model"] = {"_target_": target, "command": "touch exploded"}
    write_checkpoint(state, path)
    status, _, error = command("sample", "--run", path)
    assert status == 1 and "model._target_" in error and not Path("exploded").exists()
