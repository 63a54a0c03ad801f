"""The trainer: its schedule, exact resuming, rescue, and what it leaves on disk."""

import json
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
from conftest import SMALL

import flowgen
from flowgen.bijections.batchnorm import update_bn
from flowgen.config.instantiate import build_data
from flowgen.data.dataset import ImageDataset
from flowgen.models.flows.glow import Glow
from flowgen.training.checkpoint import KEYS, read_checkpoint
from flowgen.training.device import choose_device, peak_memory, reset_peak_memory
from flowgen.training.optim import OptimConfig, learning_rate_factor, warmup_steps
from flowgen.training.run_dir import Run, best_metric
from flowgen.training.state import TrainState
from flowgen.utils.errors import UserError

NORMALIZED = [
    "model=realnvp",
    "model.num_blocks=1",
    "model.levels=1",
    *[word for word in SMALL if "steps_per_level" not in word],
]
PERSISTENT = [  # chains that go on from step to step
    "model=rbm",
    "model/negative_phase=pcd",
    "model.hidden=6",
    "data.channels=1",
    *[word for word in SMALL if not word.startswith(("model.", "trainer.lr"))],
]
AVERAGED = [*SMALL, "trainer.ema_decay=[0,0.9]"]
DROPPING = [
    "model=tarflow",
    "model.num_layers=[1,1]",
    "model.dropout=0.3",
    "data.random_shift=1",
    "trainer.betas=[0.8,0.9]",
    "trainer.activation_memory=checkpoint",
    *[word for word in SMALL if "steps_per_level" not in word],
]
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
    for key in ("step", "images_seen", "model", "ema", "emas", "optimizer"):
        assert same(states[0][key], states[1][key]), key
    assert rows(one) == rows(other)


def spawn(*arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "flowgen", *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        path = run / "metrics.jsonl"
        if path.exists() and path.read_text().count('"train"') >= step:
            return
        time.sleep(0.01)
    raise TimeoutError


def test_schedule_rises_over_the_warm_up_and_falls_at_the_end():
    assert [learning_rate_factor(step, 0.0, 4, 0.5) for step in range(5)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
    ]
    assert [learning_rate_factor(99, progress, 4, 0.5) for progress in (0.5, 0.75, 1.0)] == [
        1.0,
        0.5,
        0.0,
    ]
    assert learning_rate_factor(99, 0.99, 0, 0.0) == 1.0
    assert (
        warmup_steps(7, 1000, 10) == 7
        and warmup_steps("1 epoch", 1000, 10) == 100
        and warmup_steps("2.5 epochs", 1000, 10) == 250
    )
    with pytest.raises(UserError, match="1 epoch"):
        warmup_steps("soon", 1000, 10)


def test_a_run_leaves_what_the_design_names(tiny_run):
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
    assert state.keys() >= KEYS and state["step"] == 6 and state["images_seen"] == 24
    train = [row for row in rows(tiny_run) if row["split"] == "train"]
    assert [row["step"] for row in train] == [1, 2, 3, 4, 5, 6]
    assert all(
        row["bits_per_dim"] == row["loss"] and {"lr", "grad_norm"} <= row.keys() for row in train
    )
    assert [row["step"] for row in rows(tiny_run) if row["split"] == "validation"] == [6]


def test_choices_are_made_on_validation_images_and_the_test_split_is_judged_once(
    images, tmp_path, command, monkeypatch
):
    seen: list[str] = []
    batches = ImageDataset.batches
    monkeypatch.setattr(
        ImageDataset,
        "batches",
        lambda data, split, *rest: [seen.append(split), batches(data, split, *rest)][1],
    )
    words = [
        *SMALL,
        f"data.root={images}",
        "trainer.eval_every=2",
        f"output_dir={tmp_path / 'run'}",
    ]
    assert command("train", *words, "trainer.steps=6")[0] == 0
    assert [row["step"] for row in rows(tmp_path / "run") if row["split"] == "validation"] == [
        2,
        4,
        6,
    ]
    assert [row["step"] for row in rows(tmp_path / "run") if row["split"] == "test"] == [6]
    assert seen.count("test") == 2  # once to judge, once for what no model can say of them
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["progress"]["best"] == min(
        row["bits_per_dim"] for row in rows(tmp_path / "run") if row["split"] == "validation"
    )


def test_training_ends_early_where_validation_shows_no_gain(images, tmp_path, command):
    """A learning rate of nothing never gains: the second evaluation after the best is the last, and the run has ended."""
    words = [
        *SMALL,
        f"data.root={images}",
        "trainer.eval_every=2",
        "trainer.patience=2",
        f"output_dir={tmp_path / 'run'}",
    ]
    assert (
        command("train", *words, "trainer.steps=40", "trainer.lr=0", "trainer.ema_decay=0")[0] == 0
    )
    assert [
        (row["step"], row["split"]) for row in rows(tmp_path / "run") if row["split"] != "train"
    ] == [
        *((step, "validation") for step in (2, 4, 6)),
        (6, "test"),
    ]
    status, _, error = command("resume", tmp_path / "run")
    assert status == 1 and "trainer.patience=4" in error
    assert command("resume", tmp_path / "run", "trainer.patience=3")[0] == 0
    assert read_checkpoint(Run(tmp_path / "run").last)["step"] == 8


def test_a_run_is_known_by_its_test_figure_once_it_has_ended(tmp_path):
    validation = [
        {"step": step, "split": "validation", "bits_per_dim": bits}
        for step, bits in ((1, 3.0), (2, 1.0), (3, 2.0))
    ]
    test = {"step": 3, "split": "test", "bits_per_dim": 2.5, "bits_per_dim_error": 0.25}
    assert str(best_metric(validation)) == "validation bits_per_dim 1.000"
    assert str(best_metric([*validation, test])) == "test bits_per_dim 2.500 ± 0.250"
    assert (
        str(
            best_metric(
                [*validation, test, {"step": 4, "split": "validation", "bits_per_dim": 4.0}]
            )
        )
        == "validation bits_per_dim 1.000"
    )
    assert (
        str(best_metric([test | {"step": 1, "bits_per_dim": 1.5}, test]))
        == "test bits_per_dim 2.500 ± 0.250"
    )


def test_a_run_that_is_given_more_has_not_ended(tmp_path):
    run = Run(tmp_path)
    for step, split in ((1, "train"), (2, "train"), (2, "validation"), (2, "test")):
        assert not run.has_ended()
        run.write_metrics(step, split, {})
    assert run.has_ended()
    run.write_metrics(3, "train", {})
    assert not run.has_ended()


def test_the_memory_of_a_training_is_its_own():
    """Not that of what the process has held before."""
    held, device = torch.ones(2**26), torch.device("cpu")
    before = peak_memory(device)
    del held
    reset_peak_memory(device)
    assert sys.platform != "linux" or peak_memory(device) < before - 0.2


def test_load_gives_the_averaged_model_in_evaluation_mode(tiny_run):
    model = flowgen.load(tiny_run)
    state = read_checkpoint(tiny_run / "checkpoints" / "last.pt")
    assert isinstance(model, Glow) and not model.training
    averages = {
        name.removeprefix("module."): value
        for name, value in state["ema"].items()
        if name != "n_averaged"
    }
    assert same(dict(model.state_dict()), averages) and not same(
        dict(model.state_dict()), dict(state["model"])
    )


def test_of_several_averages_the_best_by_validation_is_judged_and_kept(images, tmp_path, command):
    run, decays = tmp_path / "run", [0.999, 0, 0.5]
    words = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=20",
        "trainer.warmup=0",
        "trainer.warmdown_ratio=0",
        f"trainer.ema_decay={decays}",
    ]
    status, _, error = command("train", *words, f"output_dir={run}")
    assert status == 0, error
    state, judged = (
        read_checkpoint(Run(run).last),
        {row["split"]: row for row in rows(run) if row["step"] == 20},
    )
    data, model, found = build_data(state["config"]), flowgen.load(run), []
    for average in state["emas"]:
        model.load_state_dict(
            {
                name.removeprefix("module."): value
                for name, value in average.items()
                if name.startswith("module.")
            }
        )
        found.append(
            [
                model.evaluate(data.batches(split, 4, 8))["bits_per_dim"].value
                for split in ("validation", "test")
            ]
        )
    assert len({validation for validation, _ in found}) == 3
    assert [judged[split]["bits_per_dim"] for split in ("validation", "test")] == pytest.approx(
        min(found), rel=1e-6
    )
    chosen = found.index(min(found))
    assert judged["validation"]["ema"] == decays[chosen] and same(
        state["ema"], state["emas"][chosen]
    )
    settings = {field.name: state["config"]["trainer"][field.name] for field in fields(OptimConfig)}
    other = TrainState(model, OptimConfig(**settings | {"ema": decays[::-1]}))
    other.restore(state)  # averages of other memories all begin at the chosen one
    assert (
        all(same(dict(average.state_dict()), dict(state["ema"])) for average in other.averages)
        and other.chosen == 0
    )


@pytest.mark.parametrize("ema", [0.99, 0])
def test_batch_statistics_are_those_of_the_weights_that_are_judged(images, tmp_path, command, ema):
    """What was judged, what the checkpoint holds and what fresh training batches say agree; the last batches' statistics do not."""
    words = [
        *NORMALIZED,
        f"data.root={images}",
        "trainer.steps=30",
        "trainer.lr=1e-2",
        f"trainer.ema_decay={ema}",
    ]
    run = tmp_path / "run"
    status, _, error = command(
        "train",
        *words,
        "trainer.warmup=0",
        "trainer.warmdown_ratio=0",
        "trainer.eval_every=30",
        f"output_dir={run}",
    )
    assert status == 0, error
    config = read_checkpoint(Run(run).last)["config"]
    data, model = build_data(config), flowgen.load(run)
    judged = rows(run)[-1]["bits_per_dim"]
    assert all(
        "bits_per_dim" not in row for row in rows(run) if row["split"] == "train"
    )  # it is no likelihood there
    assert judged == pytest.approx(
        model.evaluate(data.batches("test", 4, 8))["bits_per_dim"].value, rel=1e-6
    )

    def deviations() -> list[torch.Tensor]:
        return [value.clone() for name, value in model.named_buffers() if name.endswith("var")]

    kept = deviations()
    update_bn(model, (data.train_batch(4 * number, 4, 1) for number in range(200)))
    fresh = deviations()
    model.load_state_dict(read_checkpoint(Run(run).last)["model"])  # which keeps the last batches'
    apart = [
        sum((one - other).abs().sum() for one, other in zip(fresh, others, strict=True))
        for others in (kept, deviations())
    ]
    assert apart[0] < apart[1] / 2


@pytest.mark.parametrize(
    ("model", "kill_at"),
    [(SMALL, 0), (SMALL, 3), (AVERAGED, 11), (NORMALIZED, 11), (PERSISTENT, 11), (DROPPING, 11)],
)
def test_killed_and_resumed_equals_never_stopped(images, tmp_path, command, model, kill_at):
    """Killed at the first moment, before and after a step that saves, wherever in the next one the signal finds it."""
    words = [
        *model,
        f"data.root={images}",
        "data.random_flip=true",
        "trainer.steps=14",
        "trainer.save_every=5",
        "trainer.eval_every=4",
    ]
    assert command("train", *words, f"output_dir={tmp_path / 'whole'}")[0] == 0
    killed = tmp_path / "killed"
    process = spawn("train", *words, f"output_dir={killed}")
    wait_for_step(killed, kill_at) if kill_at else wait_for_file(killed / "config.yaml")
    process.send_signal(signal.SIGKILL)
    process.wait()
    status, _, error = command("resume", killed)
    assert status == 0 or "has ended" in error, error  # it may have been too quick to be killed
    assert_same_run(tmp_path / "whole", killed)


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 600
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_stopped_by_sigterm_saves_and_says_how_to_resume(images, tmp_path, command):
    words = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=4000",
        "trainer.eval_every=100000",
        "trainer.sample_every=100000",
    ]
    stopped = tmp_path / "stopped"
    process = spawn("train", *words, f"output_dir={stopped}")
    wait_for_step(stopped, 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and f"flowgen resume {stopped}" in output
    step = read_checkpoint(stopped / "checkpoints" / "last.pt")["step"]
    assert 5 <= step < 4000
    end = ["trainer.warmdown_ratio=0", f"trainer.steps={step + 3}"]
    assert command("resume", stopped, *end)[0] == 0
    assert rows(stopped)[-1]["step"] == step + 3


def test_an_ended_run_asks_for_more_steps(tiny_run, command):
    status, _, error = command("resume", tiny_run)
    assert status == 1 and "trainer.steps=12" in error
    assert command("resume", tiny_run, "trainer.steps=8")[0] == 0
    assert rows(tiny_run)[-1]["step"] == 8


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_training_goes_like_the_eager_one(images, tmp_path, command):
    words = [
        *SMALL,
        "model.levels=1",
        "model.steps_per_level=1",
        f"data.root={images}",
        "trainer.batch_size=32",
        "trainer.steps=3",
    ]
    ways = {
        "eager": [],
        "compiled": ["trainer.compile=true"],
        "recomputed": ["trainer.compile=true", "trainer.activation_memory=checkpoint"],
    }
    for name, how in ways.items():
        assert command("train", *words, *how, f"output_dir={tmp_path / name}")[0] == 0
    losses = {
        name: [row["loss"] for row in rows(tmp_path / name) if row["split"] == "train"]
        for name in ways
    }
    assert losses["compiled"] == pytest.approx(
        losses["eager"], abs=0.03
    )  # the compiler draws other noise
    assert losses["recomputed"] == pytest.approx(losses["eager"], abs=0.03)
    eager, *others = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["model"].keys()
        for name in ways
    )
    assert all(other == eager for other in others)


def test_batch_statistics_are_not_recomputed_by_a_compiler(images, tmp_path, command):
    words = [
        *NORMALIZED,
        f"data.root={images}",
        "trainer.steps=2",
        "trainer.compile=true",
        "trainer.activation_memory=checkpoint",
        f"output_dir={tmp_path / 'run'}",
    ]
    status, _, error = command("train", *words)
    assert (
        status == 1
        and "trainer.activation_memory=store" in error
        and not (tmp_path / "run" / "checkpoints").exists()
    )


def test_accumulated_gradients_are_those_of_the_whole_batch(images, tmp_path, command):
    words = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=1",
        "trainer.warmup=0",
        "trainer.warmdown_ratio=0",
        "trainer.ema_decay=0",
    ]
    for parts in (1, 2):
        assert (
            command(
                "train",
                *words,
                f"trainer.grad_accum_steps={parts}",
                f"output_dir={tmp_path / str(parts)}",
            )[0]
            == 0
        )
    one, two = (rows(tmp_path / str(parts))[0]["grad_norm"] for parts in (1, 2))
    assert one == pytest.approx(
        two, rel=0.2
    )  # the noise within the bins differs, nothing else does


def test_float32_convolutions_stay_float32_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    choose_device("cpu")
    assert not torch.backends.cudnn.allow_tf32


def test_a_run_is_trained_by_one_process_alone(tiny_run, command):
    from flowgen.commands.train import lock_run

    with lock_run(Run(tiny_run)):
        status, _, error = command("resume", tiny_run, "trainer.steps=9")
    assert status == 1 and "another process" in error


def test_resume_from_a_named_checkpoint_file(images, tmp_path, command):
    words = [*SMALL, f"data.root={images}", "trainer.steps=8", "trainer.checkpoint_every=4"]
    assert command("train", *words, f"output_dir={tmp_path / 'run'}")[0] == 0
    whole = read_checkpoint(Run(tmp_path / "run").last)
    assert command("resume", Run(tmp_path / "run").step_path(4))[0] == 0
    assert same(read_checkpoint(Run(tmp_path / "run").last)["model"], whole["model"])


def test_a_failing_resume_leaves_the_configuration_alone(tiny_run, command):
    before = (tiny_run / "config.yaml").read_text()
    assert command("resume", tiny_run, "trainer.steps=9", "model.width=6")[0] == 1
    assert (tiny_run / "config.yaml").read_text() == before


def test_what_a_step_draws_depends_on_seed_and_step_alone(images, tmp_path, command, monkeypatch):
    """Looks at the model that draw numbers of their own, often or never, leave the same weights."""
    evaluate = Glow.evaluate
    monkeypatch.setattr(Glow, "evaluate", lambda *of: [torch.rand(3), evaluate(*of)][1])
    words = [*SMALL, f"data.root={images}", "data.random_flip=true", "trainer.steps=6"]
    for often, name in ((1, "often"), (100, "never")):
        looks = [f"trainer.{what}_every={often}" for what in ("evaluate", "sample", "save")]
        assert command("train", *words, *looks, f"output_dir={tmp_path / name}")[0] == 0
    one, other = (read_checkpoint(Run(tmp_path / name).last) for name in ("often", "never"))
    assert same(one["model"], other["model"]) and same(one["ema"], other["ema"])


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
def test_a_resumed_run_takes_the_settings_of_the_optimiser_that_are_given(
    images, tmp_path, command, first, then, setting
):
    words = [*SMALL, f"data.root={images}", "trainer.steps=2", *first]
    assert command("train", *words, f"output_dir={tmp_path / 'run'}")[0] == 0
    status, _, error = command("resume", tmp_path / "run", "trainer.steps=4", *then)
    assert status == 0, error
    name, value = setting
    assert (
        read_checkpoint(Run(tmp_path / "run").last)["optimizer"]["param_groups"][0][name] == value
    )


def test_a_run_whose_time_ends_while_it_is_judged_is_not_judged_again(
    images, tmp_path, command, monkeypatch
):
    evaluate = Glow.evaluate
    monkeypatch.setattr(Glow, "evaluate", lambda *of: [time.sleep(0.6), evaluate(*of)][1])
    words = [
        *SMALL,
        f"data.root={images}",
        "trainer.minutes=0.01",
        "trainer.eval_every=1",
        "trainer.log_every=100",
    ]
    assert command("train", *words, f"output_dir={tmp_path / 'run'}")[0] == 0
    assert [(row["step"], row["split"]) for row in rows(tmp_path / "run")] == [
        (1, "validation"),
        (1, "train"),
        (1, "test"),
    ]
    assert read_checkpoint(Run(tmp_path / "run").last)["step"] == 1


def test_the_largest_seed_is_as_good_as_any(images, tmp_path, command):
    words = [
        *SMALL,
        f"data.root={images}",
        f"seed={2**63 - 1}",
        "data.random_flip=true",
        "trainer.steps=11",
    ]  # more than an epoch
    assert command("train", *words, f"output_dir={tmp_path / 'run'}")[0] == 0
    for words in (
        ["resume", tmp_path / "run", "trainer.steps=12"],
        ["sample", "--run", tmp_path / "run", "--seed", 2**63 - 1],
    ):
        status, _, error = command(*words)
        assert status == 0, error
