"""The trainer: learning rate, exact resume, choice of the best weights, and files of a run."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL

import flowgen
from flowgen.bijections.linear import update_bn
from flowgen.config.compose import compose_config, read_config
from flowgen.config.instantiate import build_data, build_model_and_data
from flowgen.data.dataset import ImageDataset
from flowgen.models.flows.glow import Glow
from flowgen.training.checkpoint import read_checkpoint
from flowgen.training.device import choose_device, peak_memory, reset_peak_memory
from flowgen.training.optim import build_optimizer, learning_rate_factor, warmup_steps
from flowgen.training.run_dir import Run, result_metric
from flowgen.training.state import TrainState
from flowgen.training.trainer import Trainer, TrainerConfig
from flowgen.training.untrusted import REQUIRED
from flowgen.utils.errors import UserError

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)
NORMALIZED = [
    "model=realnvp",
    "model.num_blocks=1",
    "model.levels=1",
    *[override for override in SMALL if "steps_per_level" not in override],
]
PERSISTENT = [  # Markov chains that continue from step to step
    "model=rbm",
    "model/negative_phase=pcd",
    "model.hidden=6",
    "data.channels=1",
    *[override for override in SMALL if not override.startswith(("model.", "trainer.lr"))],
]
AVERAGED = [*SMALL, "trainer.ema_decay=[0,0.9]"]
DROPOUT = [
    "model=tarflow",
    "model.num_layers=[1,1]",
    "model.dropout=0.3",
    "data.random_shift=1",
    "trainer.betas=[0.8,0.9]",
    "trainer.activation_memory=checkpoint",
    *[override for override in SMALL if "steps_per_level" not in override],
]
MEASURED = {"images_per_second", "seconds", "memory_gib"}


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the metrics without those that differ between two identical runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def same(first: Any, second: Any) -> bool:
    """Return True if two values are equal to the last bit. Dicts and lists are compared too."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def assert_same_run(first: Path, second: Path) -> None:
    states = [read_checkpoint(run / "checkpoints" / "last.pt") for run in (first, second)]
    for key in ("step", "images_seen", "model", "ema", "emas", "optimizer"):
        assert same(states[0][key], states[1][key]), key
    assert rows(first) == rows(second)


def spawn(*arguments: object) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "flowgen", *map(str, arguments)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        path = run / "metrics.jsonl"
        if path.exists() and path.read_text().count('"train"') >= step:
            return
        time.sleep(0.01)
    raise TimeoutError


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)


def test_trainer_config_has_the_keys_and_defaults_of_the_yaml():
    folder = Path(__file__).parents[1] / "conf" / "trainer"
    cpu = yaml.safe_load((folder / "cpu.yaml").read_text())
    assert cpu.pop("_target_") == "flowgen.training.trainer.TrainerConfig"
    config = TrainerConfig()
    assert [field.name for field in fields(config)] == list(cpu)
    for name, value in cpu.items():
        default = getattr(config, name)
        assert (list(default) if isinstance(default, tuple) else default) == value, name
    gpu = yaml.safe_load((folder / "gpu.yaml").read_text())
    assert gpu.keys() <= {"defaults", *cpu}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": None, "minutes": None}, "training has no end"),
        ({"checkpoint_steps": 5}, "checkpoint_steps must be a list"),
        ({"betas": [0.9]}, "betas must be two numbers"),
        ({"ema_decay": []}, "ema_decay must be a number"),
        ({"sample_temperature": [0.7, 1.0]}, "sample_temperature must be a number"),
        ({"eval_every": [5]}, "eval_every must be a whole number"),
        ({"batch_size": 5, "grad_accum_steps": 2}, "batch_size=5 cannot be split"),
        ({"warmdown_ratio": 1.5}, "warmdown_ratio must be at most 1"),
        ({"ema_decay": 1}, "must be below 1"),
        ({"compile": True, "activation_memory": "reversible"}, "cannot be compiled"),
        ({"log_every": 0}, "log_every must be a whole number"),
        ({"warmup": "soon"}, "1 epoch"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TrainerConfig(**settings)


def test_learning_rate_rises_during_warmup_and_falls_at_the_end():
    rising = [learning_rate_factor(step, 0.0, 4, 0.5) for step in range(5)]
    assert rising == [0.25, 0.5, 0.75, 1.0, 1.0]
    falling = [learning_rate_factor(99, progress, 4, 0.5) for progress in (0.5, 0.75, 1.0)]
    assert falling == [1.0, 0.5, 0.0]
    assert learning_rate_factor(99, 0.99, 0, 0.0) == 1.0
    assert warmup_steps(7, 1000, 10) == 7
    assert warmup_steps("1 epoch", 1000, 10) == 100
    assert warmup_steps("2.5 epochs", 1000, 10) == 250
    with pytest.raises(UserError, match="1 epoch"):
        warmup_steps("soon", 1000, 10)


def test_a_run_writes_its_files(tiny_run):
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "train.log",
        "tensorboard",
        "curves.png",
        "samples/step_00000006.png",
    ):
        assert (tiny_run / name).exists(), name
    assert {path.name for path in (tiny_run / "checkpoints").iterdir()} == {"last.pt", "best.pt"}
    state = read_checkpoint(tiny_run / "checkpoints" / "last.pt")
    assert state.keys() >= REQUIRED.keys()
    assert state["step"] == 6
    assert state["images_seen"] == 24
    train = [row for row in rows(tiny_run) if row["split"] == "train"]
    assert [row["step"] for row in train] == [1, 2, 3, 4, 5, 6]
    assert all(row["bits_per_dim"] == row["loss"] for row in train)
    assert all({"lr", "grad_norm"} <= row.keys() for row in train)
    assert [row["step"] for row in rows(tiny_run) if row["split"] == "validation"] == [6]


def test_validation_images_steer_training_and_the_test_split_is_evaluated_once(
    images, tmp_path, command, monkeypatch
):
    splits: list[str] = []
    batches = ImageDataset.batches

    def record(data, split, *arguments):
        splits.append(split)
        return batches(data, split, *arguments)

    monkeypatch.setattr(ImageDataset, "batches", record)
    run = tmp_path / "run"
    overrides = [*SMALL, f"data.root={images}", "trainer.eval_every=2", f"output_dir={run}"]
    assert command("train", *overrides, "trainer.steps=6")[0] == 0
    validations = [row for row in rows(run) if row["split"] == "validation"]
    assert [row["step"] for row in validations] == [2, 4, 6]
    assert [row["step"] for row in rows(run) if row["split"] == "test"] == [6]
    assert splits.count("test") == 2  # once for the metrics, once for the entropy
    state = read_checkpoint(run / "checkpoints" / "last.pt")
    assert state["progress"]["best"] == min(row["bits_per_dim"] for row in validations)


def test_training_ends_early_if_the_validation_metric_does_not_improve(images, tmp_path, command):
    """With learning rate 0 nothing improves: the second evaluation after the first is the last."""
    run = tmp_path / "run"
    overrides = [
        *SMALL,
        f"data.root={images}",
        "trainer.eval_every=2",
        "trainer.patience=2",
        f"output_dir={run}",
    ]
    unchanging = ["trainer.steps=40", "trainer.lr=0", "trainer.ema_decay=0"]
    assert command("train", *overrides, *unchanging)[0] == 0
    evaluations = [(row["step"], row["split"]) for row in rows(run) if row["split"] != "train"]
    assert evaluations == [*((step, "validation") for step in (2, 4, 6)), (6, "test")]
    status, _, error = command("resume", run)
    assert status == 1
    assert "trainer.patience=4" in error
    assert command("resume", run, "trainer.patience=3")[0] == 0
    assert read_checkpoint(Run(run).last)["step"] == 8


def test_the_result_of_a_finished_run_is_its_test_metric():
    validation = [
        {"step": step, "split": "validation", "bits_per_dim": bits}
        for step, bits in ((1, 3.0), (2, 1.0), (3, 2.0))
    ]
    test = {"step": 3, "split": "test", "bits_per_dim": 2.5, "bits_per_dim_error": 0.25}
    later = {"step": 4, "split": "validation", "bits_per_dim": 4.0}
    earlier = test | {"step": 1, "bits_per_dim": 1.5}
    assert str(result_metric(validation)) == "validation bits_per_dim 1.000"
    assert str(result_metric([*validation, test])) == "test bits_per_dim 2.500 ± 0.250"
    assert str(result_metric([*validation, test, later])) == "validation bits_per_dim 1.000"
    assert str(result_metric([earlier, test])) == "test bits_per_dim 2.500 ± 0.250"


def test_a_run_that_continues_has_not_ended(tmp_path):
    run = Run(tmp_path)
    for step, split in ((1, "train"), (2, "train"), (2, "validation"), (2, "test")):
        assert not run.has_ended()
        run.write_metrics(step, split, {})
    assert run.has_ended()
    run.write_metrics(3, "train", {})
    assert not run.has_ended()


def test_peak_memory_does_not_count_memory_from_before_the_reset():
    device = torch.device("cpu")
    tensor = torch.ones(2**26)
    before = peak_memory(device)
    del tensor
    reset_peak_memory(device)
    assert sys.platform != "linux" or peak_memory(device) < before - 0.2


def test_load_returns_the_averaged_model_in_evaluation_mode(tiny_run):
    model = flowgen.load(tiny_run)
    state = read_checkpoint(tiny_run / "checkpoints" / "last.pt")
    assert isinstance(model, Glow)
    assert not model.training
    averages = {
        name.removeprefix("module."): value
        for name, value in state["ema"].items()
        if name != "n_averaged"
    }
    assert same(dict(model.state_dict()), averages)
    assert not same(dict(model.state_dict()), dict(state["model"]))


def test_the_ema_with_the_best_validation_metric_is_evaluated_and_saved(images, tmp_path, command):
    run = tmp_path / "run"
    decays = [0.999, 0, 0.5]
    overrides = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=20",
        "trainer.warmup=0",
        "trainer.warmdown_ratio=0",
        f"trainer.ema_decay={decays}",
    ]
    status, _, error = command("train", *overrides, f"output_dir={run}")
    assert status == 0, error
    state = read_checkpoint(Run(run).last)
    final = {row["split"]: row for row in rows(run) if row["step"] == 20}
    data = build_data(state["config"])
    model = flowgen.load(run)
    results = []
    for ema in state["emas"]:
        weights = {
            name.removeprefix("module."): value
            for name, value in ema.items()
            if name.startswith("module.")
        }
        model.load_state_dict(weights)
        results.append(
            [
                model.evaluate(data.batches(split, 4, 8))["bits_per_dim"].value
                for split in ("validation", "test")
            ]
        )
    assert len({validation for validation, _ in results}) == 3
    measured = [final[split]["bits_per_dim"] for split in ("validation", "test")]
    assert measured == pytest.approx(min(results), rel=1e-6)
    best = results.index(min(results))
    assert final["validation"]["ema"] == decays[best]
    assert same(state["ema"], state["emas"][best])
    # With other decays every EMA starts from the best one.
    other = TrainState(model, build_optimizer(model, "adam", 1e-3), "adam", decays[::-1])
    other.restore(state)
    assert all(same(dict(ema.state_dict()), dict(state["ema"])) for ema in other.emas)
    assert other.best_ema == 0


@pytest.mark.parametrize("ema", [0.99, 0])
def test_batch_statistics_belong_to_the_evaluated_weights(images, tmp_path, command, ema):
    """Metrics, checkpoint and fresh training batches agree; statistics of the last batches do not.

    The running averages of training lag behind the weights.
    """
    run = tmp_path / "run"
    overrides = [
        *NORMALIZED,
        f"data.root={images}",
        "trainer.steps=30",
        "trainer.lr=1e-2",
        f"trainer.ema_decay={ema}",
        "trainer.warmup=0",
        "trainer.warmdown_ratio=0",
        "trainer.eval_every=30",
    ]
    status, _, error = command("train", *overrides, f"output_dir={run}")
    assert status == 0, error
    state = read_checkpoint(Run(run).last)
    data = build_data(state["config"])
    model = flowgen.load(run)
    measured = rows(run)[-1]["bits_per_dim"]
    # In training mode the loss is not a likelihood.
    assert all("bits_per_dim" not in row for row in rows(run) if row["split"] == "train")
    expected = model.evaluate(data.batches("test", 4, 8))["bits_per_dim"].value
    assert measured == pytest.approx(expected, rel=1e-6)

    def variances() -> list[torch.Tensor]:
        return [value.clone() for name, value in model.named_buffers() if name.endswith("var")]

    saved = variances()
    update_bn(model, (data.train_batch(4 * index, 4, 1) for index in range(200)))
    fresh = variances()
    model.load_state_dict(state["model"])  # with the running averages of training
    running = variances()
    differences = [
        sum((first - second).abs().sum() for first, second in zip(fresh, others, strict=True))
        for others in (saved, running)
    ]
    assert differences[0] < differences[1] / 2


@pytest.mark.parametrize(
    ("model", "kill_at"),
    [(SMALL, 0), (SMALL, 3), (AVERAGED, 11), (NORMALIZED, 11), (PERSISTENT, 11), (DROPOUT, 11)],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    images, tmp_path, command, model, kill_at
):
    """The signal arrives at the start, or anywhere in a step before or after a checkpoint."""
    overrides = [
        *model,
        f"data.root={images}",
        "data.random_flip=true",
        "trainer.steps=60",
        "trainer.save_every=5",
        "trainer.eval_every=4",
    ]
    assert command("train", *overrides, f"output_dir={tmp_path / 'whole'}")[0] == 0
    killed = tmp_path / "killed"
    process = spawn("train", *overrides, f"output_dir={killed}")
    wait_for_step(killed, kill_at) if kill_at else wait_for_file(killed / "config.yaml")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    status, _, error = command("resume", killed)
    assert status == 0, error
    assert_same_run(tmp_path / "whole", killed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_the_run_and_tells_how_to_resume(images, tmp_path, command, number):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("the signal is ignored, as under nohup")
    overrides = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=4000",
        "trainer.eval_every=100000",
        "trainer.sample_every=100000",
    ]
    run = tmp_path / "stopped"
    process = spawn("train", *overrides, f"output_dir={run}")
    wait_for_step(run, 5)
    process.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode == 128 + number
    assert f"flowgen resume {run}" in output
    step = read_checkpoint(run / "checkpoints" / "last.pt")["step"]
    assert 5 <= step < 4000
    end = ["trainer.warmdown_ratio=0", f"trainer.steps={step + 3}"]
    assert command("resume", run, *end)[0] == 0
    assert rows(run)[-1]["step"] == step + 3


def test_resuming_a_finished_run_asks_for_more_steps(tiny_run, command):
    status, _, error = command("resume", tiny_run)
    assert status == 1
    assert "trainer.steps=12" in error
    assert command("resume", tiny_run, "trainer.steps=8")[0] == 0
    assert rows(tiny_run)[-1]["step"] == 8


@needs_compiler
def test_a_compiled_model_trains_like_an_eager_one(images, tmp_path, command):
    torch.compiler.reset()  # it compiles for any batch size after it has seen two of them
    overrides = [
        *SMALL,
        "model.levels=1",
        "model.steps_per_level=1",
        f"data.root={images}",
        "trainer.batch_size=32",
        "trainer.steps=3",
    ]
    modes = {
        "eager": [],
        "compiled": ["trainer.compile=true"],
        "recomputed": ["trainer.compile=true", "trainer.activation_memory=checkpoint"],
    }
    for name, mode in modes.items():
        assert command("train", *overrides, *mode, f"output_dir={tmp_path / name}")[0] == 0
    losses = {
        name: [row["loss"] for row in rows(tmp_path / name) if row["split"] == "train"]
        for name in modes
    }
    # The compiler draws other noise.
    assert losses["compiled"] == pytest.approx(losses["eager"], abs=0.03)
    assert losses["recomputed"] == pytest.approx(losses["eager"], abs=0.03)
    eager, *others = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["model"].keys()
        for name in modes
    )
    assert all(names == eager for names in others)


@needs_compiler
def test_compiled_gradients_have_the_precision_of_eager_ones(
    images, tmp_path, command, monkeypatch
):
    overrides = [
        *SMALL,
        f"data.root={images}",
        "model.levels=1",
        "model.steps_per_level=1",
        "trainer.precision=bfloat16",
        "trainer.steps=1",
    ]
    torch.compiler.reset()
    compile_module = torch.nn.Module.compile
    # The compiler's back end without code generation draws the same noise as eager mode.
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda model, mode: compile_module(model, backend="aot_eager")
    )
    for name, mode in {"eager": "false", "compiled": "true"}.items():
        arguments = (f"trainer.compile={mode}", f"output_dir={tmp_path / name}")
        assert command("train", *overrides, *arguments)[0] == 0
    eager, compiled = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["optimizer"]["state"]
        for name in ("eager", "compiled")
    )
    for index, state in eager.items():
        difference = (compiled[index]["exp_avg"] - state["exp_avg"]).norm()
        assert difference <= 1e-4 * state["exp_avg"].norm()


@pytest.fixture
def compiler(monkeypatch):
    """Replace code generation and timing. Return the seconds of a step in each mode, to change."""
    torch.compiler.reset()
    seconds = {"eager": 1.0, "compiled": 0.5}
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda model, mode: compile_module(model, backend="eager")
    )

    def time_steps(model: torch.nn.Module, *args: Any) -> float:
        return seconds["compiled" if model._compiled_call_impl else "eager"]

    monkeypatch.setattr("flowgen.training.compilation.time_steps", time_steps)
    return seconds


def mode(run: Path) -> dict[str, Any]:
    """Return the mode in the last checkpoint of a run."""
    return read_checkpoint(run / "checkpoints" / "last.pt")["mode"]


@needs_compiler
def test_auto_compiles_long_trainings_if_steps_become_faster(images, tmp_path, command, compiler):
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=1"]

    def is_compiled(name: str, *settings: str) -> bool:
        run = tmp_path / name
        assert command("train", *overrides, *settings, f"output_dir={run}")[0] == 0
        return mode(run)["compiled"]

    assert not is_compiled("short", "trainer.minutes=59")
    assert is_compiled("long", "trainer.minutes=60")
    assert not is_compiled(
        "recomputed", "trainer.minutes=60", "trainer.activation_memory=checkpoint"
    )
    compiler["compiled"] = 0.99
    assert not is_compiled("slower", "trainer.minutes=60")
    assert is_compiled("required", "trainer.compile=true")


@needs_compiler
def test_a_resumed_run_keeps_its_mode_or_says_that_it_changed(images, tmp_path, command, compiler):
    run = tmp_path / "run"
    long = [*SMALL, f"data.root={images}", "trainer.steps=1", "trainer.minutes=60"]
    assert command("train", *long, "trainer.precision=float32", f"output_dir={run}")[0] == 0
    compiler["compiled"] = 2.0  # the speed is not measured again
    status, output, error = command("resume", run, "trainer.steps=2")
    assert status == 0 and mode(run)["compiled"] and "changed" not in output + error
    status, output, error = command("resume", run, "trainer.steps=3", "trainer.compile=false")
    assert status == 0 and not mode(run)["compiled"]
    assert "float32, compiled before, float32, eager now" in output + error
    status, output, error = command("resume", run, "trainer.steps=4", "trainer.precision=bfloat16")
    assert status == 0 and "float32, eager before, bfloat16, eager now" in output + error


@needs_compiler
def test_a_run_without_a_mode_stays_eager(images, tmp_path, command, compiler):
    run = tmp_path / "run"
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=1", f"output_dir={run}"]
    assert command("train", *overrides)[0] == 0
    path = run / "checkpoints" / "last.pt"
    checkpoint = read_checkpoint(path)
    del checkpoint["mode"]
    torch.save(checkpoint, path)
    assert command("resume", run, "trainer.steps=2", "trainer.minutes=60")[0] == 0
    assert not mode(run)["compiled"]


@needs_compiler
def test_a_failing_compiler_changes_nothing(tmp_path, images, command, monkeypatch):
    def fail(module: torch.fx.GraphModule, inputs: Any) -> None:
        raise RuntimeError("no code for this model")

    torch.compiler.reset()
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda model, mode: compile_module(model, backend=fail)
    )
    overrides = [*PERSISTENT, f"data.root={images}", "trainer.steps=2"]
    for name, minutes in {"eager": 59, "failed": 60}.items():
        arguments = (f"trainer.minutes={minutes}", f"output_dir={tmp_path / name}")
        status, output, error = command("train", *overrides, *arguments)
        assert status == 0
    assert "the compiler failed" in " ".join((output + error).split())
    assert not mode(tmp_path / "failed")["compiled"]
    eager, failed = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["model"]
        for name in ("eager", "failed")
    )
    assert all(torch.equal(failed[name], value) for name, value in eager.items())


def test_compilation_needs_a_compiler(images, tmp_path, command):
    inductor = pytest.importorskip("torch._inductor.config")
    run = tmp_path / "run"
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=1"]
    required = [*overrides, "trainer.compile=true", f"output_dir={tmp_path / 'required'}"]
    optional = [*overrides, "trainer.minutes=60", f"output_dir={run}"]
    with inductor.patch("cpp.cxx", ("no-compiler",)):
        status, _, error = command("train", *required)
        assert status == 1 and "install g++" in " ".join(error.split())
        status, output, error = command("train", *optional)
    assert status == 0 and "this needs a C++ compiler" in " ".join((output + error).split())
    assert not mode(run)["compiled"]


def test_batch_norm_cannot_be_recomputed_by_a_compiler(images, tmp_path, command):
    overrides = [
        *NORMALIZED,
        f"data.root={images}",
        "trainer.steps=2",
        "trainer.compile=true",
        "trainer.activation_memory=checkpoint",
        f"output_dir={tmp_path / 'run'}",
    ]
    status, _, error = command("train", *overrides)
    assert status == 1
    assert "trainer.activation_memory=store" in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_batch_norm_needs_more_than_one_image(images, tmp_path, command):
    overrides = [
        "model=maf",
        "model.width=16",
        *[override for override in SMALL if not override.startswith("model.")],
        f"data.root={images}",
        "trainer.steps=2",
        "trainer.grad_accum_steps=4",
    ]
    status, _, error = command("train", *overrides, f"output_dir={tmp_path / 'run'}")
    assert status == 1
    assert "more than one image at a time" in error
    assert "trainer.batch_size" in error


def test_accumulated_gradients_equal_those_of_the_whole_batch(images, tmp_path, command):
    overrides = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=1",
        "trainer.warmup=0",
        "trainer.warmdown_ratio=0",
        "trainer.ema_decay=0",
    ]
    for parts in (1, 2):
        accumulate = f"trainer.grad_accum_steps={parts}"
        run = tmp_path / str(parts)
        assert command("train", *overrides, accumulate, f"output_dir={run}")[0] == 0
    first, second = (rows(tmp_path / str(parts))[0]["grad_norm"] for parts in (1, 2))
    # Only the dequantization noise differs.
    assert first == pytest.approx(second, rel=0.2)


def test_float32_convolutions_stay_float32_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    choose_device("cpu")
    assert not torch.backends.cudnn.allow_tf32


def test_only_one_process_trains_a_run(tiny_run, command):
    from flowgen.config.start import lock_run

    with lock_run(Run(tiny_run)):
        status, _, error = command("resume", tiny_run, "trainer.steps=9")
    assert status == 1
    assert "another process" in error


def test_resume_from_a_numbered_checkpoint(images, tmp_path, command):
    run = tmp_path / "run"
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=8", "trainer.checkpoint_every=4"]
    assert command("train", *overrides, f"output_dir={run}")[0] == 0
    whole = read_checkpoint(Run(run).last)
    assert command("resume", Run(run).step_path(4))[0] == 0
    assert same(read_checkpoint(Run(run).last)["model"], whole["model"])


def test_gradients_are_clipped_to_a_norm(images, tmp_path, command):
    """A step of SGD without momentum moves the weights by lr times the norm of the gradient."""
    sgd = ["trainer.optimizer=sgd", "trainer.momentum=0", "trainer.warmup=0", "trainer.lr=0.01"]
    overrides = [*SMALL, *sgd, f"data.root={images}", "trainer.warmdown_ratio=0"]
    overrides += ["trainer.steps=2", "trainer.precision=float32", "trainer.checkpoint_every=1"]
    for clip in (0, 0.25):
        run = Run(tmp_path / f"clip {clip}")
        output = f"output_dir={run.folder}"
        assert command("train", *overrides, f"trainer.grad_clip={clip}", output)[0] == 0
        norm = next(row for row in rows(run.folder) if row["step"] == 2)["grad_norm"]
        assert norm > 0.5
        model = build_model_and_data(read_config(run.config))[0]
        names = dict(model.named_parameters())
        states = [read_checkpoint(path)["model"] for path in (run.step_path(1), run.last)]
        change = torch.stack([(states[1][name] - states[0][name]).norm() for name in names]).norm()
        assert change.item() == pytest.approx(0.01 * min(norm, clip or math.inf), rel=1e-3)


def test_a_resumed_run_that_is_killed_at_once_continues_from_the_same_checkpoint(
    images, tmp_path, command, monkeypatch
):
    run = Run(tmp_path / "run")
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=8", "trainer.checkpoint_every=4"]
    assert command("train", *overrides, f"output_dir={run.folder}")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", lambda trainer: sys.exit(9))
        assert command("resume", run.step_path(4), "trainer.steps=10")[0] == 9
    assert read_checkpoint(run.last)["step"] == 4
    assert max(row["step"] for row in rows(run.folder)) == 4
    assert command("resume", run.folder)[0] == 0
    assert read_checkpoint(run.last)["step"] == 10


@pytest.mark.parametrize(
    "override", ["model.width=6", "trainer.batch_size=100000000", "trainer.device=cuda:7"]
)
def test_a_failed_resume_does_not_change_the_configuration(tiny_run, command, override):
    before = (tiny_run / "config.yaml").read_text()
    assert command("resume", tiny_run, "trainer.steps=9", override)[0] == 1
    assert (tiny_run / "config.yaml").read_text() == before


def test_a_run_whose_time_ends_during_an_evaluation_has_ended(
    images, tmp_path, command, monkeypatch
):
    validate = Trainer.validate

    def validate_slowly(trainer):
        time.sleep(1.5)
        return validate(trainer)

    run = Run(tmp_path / "run")
    overrides = [*SMALL, f"data.root={images}", "trainer.minutes=0.02"]
    intervals = ["trainer.eval_every=1", "trainer.save_every=1"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validate", validate_slowly)
        assert command("train", *overrides, *intervals, f"output_dir={run.folder}")[0] == 0
    step = read_checkpoint(run.last)["step"]
    status, _, error = command("resume", run.folder)
    assert status == 1
    assert f"has ended at step {step}" in error


def test_a_new_limit_of_a_training_replaces_the_other_one_and_null_only_itself(
    images, tmp_path, command
):
    run = Run(tmp_path / "run")
    train = ["train", *SMALL, f"data.root={images}", f"output_dir={run.folder}"]
    assert command(*train, "trainer.steps=2", "trainer.minutes=60")[0] == 0

    def limits() -> tuple[int | None, float | None]:
        trainer = read_config(run.config)["trainer"]
        return trainer["steps"], trainer["minutes"]

    assert limits() == (2, 60)
    assert "has ended at step 2" in command("resume", run.folder, "trainer.minutes=null")[2]
    assert limits() == (2, 60)
    assert command("resume", run.folder, "trainer.steps=3")[0] == 0
    assert limits() == (3, None)
    assert compose_config(["trainer=gpu", "trainer.minutes=null"]).config["trainer"]["steps"]


def test_a_folder_can_be_used_after_a_training_that_could_not_be_compiled(
    images, tmp_path, command, monkeypatch
):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def fail():
        raise InvalidCxxCompiler

    train = ["train", *SMALL, f"data.root={images}", "trainer.steps=2"]
    train.append(f"output_dir={tmp_path / 'run'}")
    with monkeypatch.context() as patch:
        patch.setattr(cpp_builder, "get_cpp_compiler", fail)
        status, _, error = command(*train, "trainer.compile=true")
    assert status == 1
    assert "install g++" in error
    assert command(*train)[0] == 0


def test_random_numbers_of_a_step_depend_on_seed_and_step_alone(
    images, tmp_path, command, monkeypatch
):
    """Frequent evaluations that draw random numbers do not change the weights."""
    evaluate = Glow.evaluate

    def draw_and_evaluate(*arguments):
        torch.rand(3)
        return evaluate(*arguments)

    monkeypatch.setattr(Glow, "evaluate", draw_and_evaluate)
    overrides = [*SMALL, f"data.root={images}", "data.random_flip=true", "trainer.steps=6"]
    for interval, name in ((1, "often"), (100, "never")):
        intervals = [f"trainer.{task}_every={interval}" for task in ("eval", "sample", "save")]
        assert command("train", *overrides, *intervals, f"output_dir={tmp_path / name}")[0] == 0
    often, never = (read_checkpoint(Run(tmp_path / name).last) for name in ("often", "never"))
    assert same(often["model"], never["model"])
    assert same(often["ema"], never["ema"])


@pytest.mark.parametrize(
    ("first", "then", "setting"),
    [
        (
            ["trainer.optimizer=sgd", "trainer.momentum=0.9"],
            ["trainer.momentum=0.5"],
            ("momentum", 0.5),
        ),
        ([], ["trainer.optimizer=sgd", "trainer.momentum=0.5"], ("momentum", 0.5)),
        (["trainer.optimizer=sgd"], ["trainer.optimizer=adam"], ("amsgrad", False)),
        ([], ["trainer.weight_decay=0.1"], ("weight_decay", 0.1)),
        ([], ["trainer.betas=[0.8,0.95]"], ("betas", (0.8, 0.95))),
    ],
)
def test_a_resumed_run_uses_the_new_settings_of_the_optimizer(
    images, tmp_path, command, first, then, setting
):
    run = tmp_path / "run"
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=2", *first]
    assert command("train", *overrides, f"output_dir={run}")[0] == 0
    status, _, error = command("resume", run, "trainer.steps=4", *then)
    assert status == 0, error
    name, value = setting
    assert read_checkpoint(Run(run).last)["optimizer"]["param_groups"][0][name] == value


def test_a_run_whose_time_ends_during_an_evaluation_is_not_evaluated_again(
    images, tmp_path, command, monkeypatch
):
    evaluate = Glow.evaluate

    def slow_evaluate(*arguments):
        time.sleep(0.6)
        return evaluate(*arguments)

    monkeypatch.setattr(Glow, "evaluate", slow_evaluate)
    run = tmp_path / "run"
    overrides = [
        *SMALL,
        f"data.root={images}",
        "trainer.minutes=0.01",
        "trainer.eval_every=1",
        "trainer.log_every=100",
    ]
    assert command("train", *overrides, f"output_dir={run}")[0] == 0
    # On a slow machine, the time is over before the evaluation, and the training row comes first.
    assert sorted((row["step"], row["split"]) for row in rows(run)) == [
        (1, "test"),
        (1, "train"),
        (1, "validation"),
    ]
    assert read_checkpoint(Run(run).last)["step"] == 1


def test_the_largest_seed_works(images, tmp_path, command):
    run = tmp_path / "run"
    overrides = [
        *SMALL,
        f"data.root={images}",
        f"seed={2**63 - 1}",
        "data.random_flip=true",
        "trainer.steps=11",  # more than an epoch
    ]
    assert command("train", *overrides, f"output_dir={run}")[0] == 0
    for argv in (
        ["resume", run, "trainer.steps=12"],
        ["sample", "--run", run, "--seed", 2**63 - 1],
    ):
        status, _, error = command(*argv)
        assert status == 0, error
