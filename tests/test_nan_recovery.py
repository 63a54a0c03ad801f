"""Non-finite losses: steps are skipped, training is rewound, and the culprit is named."""

import math

import pytest
import torch
from conftest import CHECKPOINT, SMALL
from test_training import rows

from flowgen.bijections.linear import BatchNorm
from flowgen.bijections.univariate import Affine
from flowgen.models.flows.glow import Glow
from flowgen.training.checkpoint import read_checkpoint
from flowgen.training.run_dir import Run


def fail_at(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Make the loss of these training steps, counted from 1, not finite."""
    count = 0
    forward = Glow.forward

    def failing_forward(
        self: Glow, images: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        nonlocal count
        loss = forward(self, images, labels)
        if self.training:
            count += 1
            if count in calls:
                return loss * math.nan
        return loss

    monkeypatch.setattr(Glow, "forward", failing_forward)
    # It runs the model too.
    monkeypatch.setattr("flowgen.training.trainer.check_batch_fits", lambda *arguments: None)


def test_a_failed_step_is_skipped_and_counted(images, tmp_path, command, monkeypatch):
    fail_at(monkeypatch, {3, 5})
    run = tmp_path / "run"
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=6"]
    assert command("train", *overrides, f"output_dir={run}")[0] == 0
    state = read_checkpoint(run / "checkpoints" / "last.pt")
    assert state["nan_recovery"]["skipped"] == 2
    assert state["nan_recovery"]["rewinds"] == 0
    assert state["optimizer"]["state"][0]["step"] == 4
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert rows(run)[2]["loss"] is None


def test_a_failed_step_that_spoils_running_statistics_rewinds_training(
    images, tmp_path, command, monkeypatch
):
    forward = BatchNorm.forward
    calls = 0

    def overflow(self, x, condition=None):
        nonlocal calls
        calls += torch.is_grad_enabled()
        if torch.is_grad_enabled() and calls == 40:
            x = x / 0
        return forward(self, x, condition)

    monkeypatch.setattr(BatchNorm, "forward", overflow)
    run = tmp_path / "run"
    overrides = [
        "model=maf",
        "model.width=16",
        *[override for override in SMALL if not override.startswith("model.")],
        f"data.root={images}",
        "trainer.steps=12",
        "trainer.eval_every=12",
    ]
    status, _, error = command("train", *overrides, f"output_dir={run}")
    assert status == 0
    assert "back to step" in error
    last = [row for row in rows(run) if row["split"] == "test"][-1]
    assert last["bits_per_dim"] is not None


def test_a_parameter_with_a_nonfinite_gradient_is_named(images, tmp_path, command, monkeypatch):
    backward = torch.Tensor.backward
    forward = Glow.forward
    models = []

    def spoil_gradient(self):
        backward(self)
        [*models[-1].parameters()][-1].grad.fill_(math.nan)

    def record_model(self, *arguments):
        if self.training:
            models.append(self)
        return forward(self, *arguments)

    monkeypatch.setattr(Glow, "forward", record_model)
    monkeypatch.setattr(torch.Tensor, "backward", spoil_gradient)
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=90"]
    status, _, error = command("train", *overrides, f"output_dir={tmp_path / 'run'}")
    *_, last_name = [name for name, _ in models[-1].named_parameters()]
    assert status == 1
    assert f"the gradient of {last_name}" in error


def test_five_failed_steps_rewind_training_and_halve_the_learning_rate(
    images, tmp_path, command, monkeypatch
):
    fail_at(monkeypatch, set(range(4, 9)))
    run = tmp_path / "run"
    overrides = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=12",
        "trainer.save_every=2",
        "trainer.eval_every=3",
        "trainer.warmup=0",
        "trainer.warmdown_ratio=0",
    ]
    status, _, error = command("train", *overrides, f"output_dir={run}")
    assert status == 0
    assert "back to step 3" in error, "the best checkpoint"
    # The evaluation at step 6 came before the rewind and is repeated.
    validated = [row["step"] for row in rows(run) if row["split"] == "validation"]
    assert validated == [3, 6, 9, 12]
    steps = [row for row in rows(run) if row["split"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["lr"] for row in steps] == [1e-3] * 3 + [5e-4] * 9


def test_training_that_never_recovers_names_the_culprit_and_stops(
    images, tmp_path, command, monkeypatch
):
    forward = Affine.forward

    def fail_on_training_batches(self, a, parameters):
        return forward(self, a / (len(a) != 4), parameters)

    monkeypatch.setattr(Affine, "forward", fail_on_training_batches)
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=90"]
    status, _, error = command("train", *overrides, f"output_dir={tmp_path / 'run'}")
    assert status == 1
    assert "bijection.bijections.1.bijections.2 (Coupling)" in error
    assert "trainer.lr below" in error
    assert "Traceback" not in error


def test_a_run_that_ends_with_a_failed_step_is_saved(images, tmp_path, command, monkeypatch):
    fail_at(monkeypatch, {5, 6})
    run = tmp_path / "run"
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=6"]
    assert command("train", *overrides, f"output_dir={run}")[0] == 0
    state = read_checkpoint(run / "checkpoints" / "last.pt")
    assert state["step"] == 6
    assert state["nan_recovery"]["failed"] == 2
    assert read_checkpoint(Run(run).best)["step"] == 6


def test_a_second_rewind_takes_an_older_checkpoint(tmp_path):
    run = Run(tmp_path)
    for step in (4, 8):
        run.save(CHECKPOINT | {"step": step}, numbered=True)
    assert run.latest_valid_checkpoint()["step"] == 8
    assert run.latest_valid_checkpoint(before=8)["step"] == 4
    assert run.latest_valid_checkpoint(before=4)["step"] == 8


def test_the_diagnosis_replays_the_failed_step_exactly(command, tmp_path, monkeypatch):
    """It sees the same images, classes, noise and precision, in both micro-batches."""
    calls: list[tuple] = []
    log_prob = Glow.log_prob

    def record(self, images, *arguments, **kwargs):
        if not self.training:
            return log_prob(self, images, *arguments, **kwargs)
        calls.append(
            (
                torch.is_grad_enabled(),
                images,
                kwargs.get("labels"),
                torch.random.get_rng_state(),
                torch.is_autocast_enabled("cpu"),
            )
        )
        return log_prob(self, images, *arguments, **kwargs) * math.nan

    monkeypatch.setattr(Glow, "log_prob", record)
    overrides = [
        *[word for word in SMALL if not word.startswith(("data", "trainer.precision"))],
        "data=mnist_sample",
        "model.num_classes=10",
        "trainer.steps=20",
        "trainer.grad_accum_steps=2",
        "trainer.precision=bfloat16",
        "model.levels=1",
    ]
    status, _, error = command("train", *overrides, f"output_dir={tmp_path / 'run'}")
    assert status == 1
    assert "trainer.lr below" in error
    first_replay = next(index for index, call in enumerate(calls) if not call[0])
    failed_calls = calls[first_replay - 2 : first_replay]
    replayed_calls = calls[first_replay : first_replay + 2]
    for failed, replayed in zip(failed_calls, replayed_calls, strict=True):
        assert failed[0]
        assert not replayed[0]
        assert failed[4]
        assert replayed[4]
        for first, second in zip(failed[1:4], replayed[1:4], strict=True):
            assert torch.equal(first, second)
