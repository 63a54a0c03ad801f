"""Steps that fail: skipped, gone back from, and explained."""

import math

import pytest
import torch
from conftest import CHECKPOINT, SMALL
from test_training import rows

from flowgen.bijections.batchnorm import BatchNorm
from flowgen.bijections.univariate import Affine
from flowgen.models.flows.glow import Glow
from flowgen.training.checkpoint import read_checkpoint
from flowgen.training.run_dir import Run


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> list[int]:
    """Make the loss of these training steps, counted from 1, not finite."""
    count, forward = [0], Glow.forward

    def bad_at_times(
        self: Glow, images: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        count[0] += self.training
        return forward(self, images, labels) * (
            math.nan if count[0] in calls and self.training else 1.0
        )

    monkeypatch.setattr(Glow, "forward", bad_at_times)
    monkeypatch.setattr(
        "flowgen.training.trainer.check_batch_fits", lambda *_: None
    )  # which runs the model too
    return count


def test_a_bad_step_is_skipped_and_counted(images, tmp_path, command, monkeypatch):
    poison(monkeypatch, {3, 5})
    assert (
        command(
            "train",
            *SMALL,
            f"data.root={images}",
            "trainer.steps=6",
            f"output_dir={tmp_path / 'run'}",
        )[0]
        == 0
    )
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert (
        state["nan_recovery"]["skipped"] == 2
        and state["nan_recovery"]["rewinds"] == 0
        and state["optimizer"]["state"][0]["step"] == 4
    )
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert rows(tmp_path / "run")[2]["loss"] is None


def test_a_bad_step_that_spoils_running_statistics_goes_back(
    images, tmp_path, command, monkeypatch
):
    forward, calls = BatchNorm.forward, [0]

    def overflow(self, x, condition=None):
        calls[0] += torch.is_grad_enabled()
        return forward(self, x / 0 if torch.is_grad_enabled() and calls[0] == 40 else x, condition)

    monkeypatch.setattr(BatchNorm, "forward", overflow)
    words = [
        "model=maf",
        "model.width=16",
        *[word for word in SMALL if not word.startswith("model.")],
        f"data.root={images}",
    ]
    status, _, error = command(
        "train",
        *words,
        "trainer.steps=12",
        "trainer.eval_every=12",
        f"output_dir={tmp_path / 'run'}",
    )
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
    status, _, error = command(
        "train", *SMALL, f"data.root={images}", "trainer.steps=90", f"output_dir={tmp_path / 'run'}"
    )
    last = [name for name, _ in model.named_parameters()][-1]
    assert status == 1 and f"the gradient of {last}" in error


def test_several_bad_steps_go_back_with_half_the_learning_rate(
    images, tmp_path, command, monkeypatch
):
    poison(monkeypatch, set(range(4, 9)))
    words = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=12",
        "trainer.save_every=2",
        "trainer.warmup=0",
        "trainer.warmdown_ratio=0",
    ]
    status, _, error = command("train", *words, f"output_dir={tmp_path / 'run'}")
    assert status == 0 and "back to step 2" in error
    steps = [row for row in rows(tmp_path / "run") if row["split"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["lr"] for row in steps] == [1e-3] * 2 + [5e-4] * 10


def test_hopeless_training_names_the_culprit_and_stops(images, tmp_path, command, monkeypatch):
    transform = Affine.forward
    monkeypatch.setattr(
        Affine, "forward", lambda self, a, p: transform(self, a / (len(a) != 4), p)
    )  # training batches alone
    status, _, error = command(
        "train", *SMALL, f"data.root={images}", "trainer.steps=90", f"output_dir={tmp_path / 'run'}"
    )
    assert (
        status == 1
        and "bijection.bijections.1.bijections.2 (Coupling)" in error
        and "trainer.lr below" in error
    )
    assert "Traceback" not in error


def test_a_run_that_ends_on_a_bad_step_is_saved(images, tmp_path, command, monkeypatch):
    poison(monkeypatch, {5, 6})
    assert (
        command(
            "train",
            *SMALL,
            f"data.root={images}",
            "trainer.steps=6",
            f"output_dir={tmp_path / 'run'}",
        )[0]
        == 0
    )
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert (
        state["step"] == 6
        and state["nan_recovery"]["failed"] == 2
        and read_checkpoint(Run(tmp_path / "run").best)["step"] == 6
    )


def test_a_second_return_goes_further_back(tmp_path):
    run, state = Run(tmp_path), CHECKPOINT
    for step in (4, 8):
        run.save(state | {"step": step}, keep=True)
    assert (
        run.latest_valid_checkpoint()["step"] == 8
        and run.latest_valid_checkpoint(before=8)["step"] == 4
        and run.latest_valid_checkpoint(before=4)["step"] == 8
    )


def test_the_culprit_is_looked_for_in_the_very_step_that_failed(command, tmp_path, monkeypatch):
    """The diagnosis sees the same images, classes, noise and number format, under two parts of a batch."""
    seen: list[tuple] = []
    log_prob = Glow.log_prob

    def remember(self, images, *rest, **more):
        if self.training:
            noise = torch.random.get_rng_state()
            seen.append(
                (
                    torch.is_grad_enabled(),
                    images,
                    more.get("labels"),
                    noise,
                    torch.is_autocast_enabled("cpu"),
                )
            )
        return log_prob(self, images, *rest, **more) * (math.nan if self.training else 1.0)

    monkeypatch.setattr(Glow, "log_prob", remember)
    words = [
        *[word for word in SMALL if not word.startswith(("data", "trainer.precision"))],
        "data=mnist_sample",
        "model.num_classes=10",
    ]
    words += [
        "trainer.steps=20",
        "trainer.grad_accum_steps=2",
        "trainer.precision=bfloat16",
        "model.levels=1",
    ]
    status, _, error = command("train", *words, f"output_dir={tmp_path / 'run'}")
    assert status == 1 and "trainer.lr below" in error
    first = next(place for place, step in enumerate(seen) if not step[0])
    for failed, replayed in zip(seen[first - 2 : first], seen[first : first + 2], strict=True):
        assert failed[0] and not replayed[0] and failed[4] and replayed[4]
        assert all(
            torch.equal(one, other) for one, other in zip(failed[1:4], replayed[1:4], strict=True)
        )
