"""How long training goes on, and how often things happen on the way."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowgen.bijections.base import set_activation_memory
from flowgen.bijections.networks import batch_norm_layers
from flowgen.data.dataset import ImageDataset
from flowgen.models.base import GenerativeModel
from flowgen.training.device import Runtime, check_batch_fits, peak_memory, reset_peak_memory
from flowgen.training.distributed import ALONE, ProcessGroup
from flowgen.training.logger import Logger, NullLogger
from flowgen.training.nan_recovery import first_nonfinite_module
from flowgen.training.optim import OptimConfig, gradient_norm
from flowgen.training.run_dir import Run
from flowgen.training.sanity_checks import warn_implausible_likelihood, warn_inaccurate_inverse
from flowgen.training.signals import GracefulStop
from flowgen.training.state import TrainState
from flowgen.utils.distributed import split
from flowgen.utils.errors import UserError, check_number, check_whole
from flowgen.utils.memory import check_memory
from flowgen.utils.metrics import Metric, Metrics, MetricValue

SHORTEST = 0.001  # minutes


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Training ends after `steps` or `minutes`, whichever comes first, or after `patience` evaluations in a row without a better figure.

    Intervals are in steps, `conf/trainer/` says of what. Raises FlowgenError for what is no such thing.
    """

    steps: int | None
    minutes: float | None
    log_every: int
    eval_every: int
    eval_images: int | None
    sample_every: int
    sample_temperature: float
    save_every: int
    checkpoint_every: int
    checkpoint_steps: list[int]
    patience: int | None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise UserError("training has no end: set trainer.steps or trainer.minutes")
        if self.steps is not None:
            check_whole(steps=self.steps)
        if self.minutes is not None:
            check_number(SHORTEST, minutes=self.minutes)
        check_whole(
            log_every=self.log_every, eval_every=self.eval_every, sample_every=self.sample_every
        )
        check_whole(save_every=self.save_every, checkpoint_every=self.checkpoint_every)
        check_number(sample_temperature=self.sample_temperature)
        if self.patience is not None:
            check_whole(patience=self.patience)
        if self.eval_images is not None:
            check_whole(eval_images=self.eval_images)
        if not isinstance(self.checkpoint_steps, list):
            raise UserError(
                f"keep_at must be a list of steps, as in trainer.checkpoint_steps=[1000,5000], not {self.checkpoint_steps!r}"
            )
        for step in self.checkpoint_steps:
            check_whole(checkpoint_steps=step)

    def progress(self, step: int, seconds: float) -> float:
        """The share of the training that is done after so many steps and seconds, from 0 on; at 1 it ends."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(by_steps, by_time)

    def due(self, what: str, step: int) -> bool:
        """Whether it is time to `log`, `evaluate`, `sample` or `save`; what has no interval is left to the end."""
        return step % getattr(self, f"{what}_every", math.inf) == 0

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of this step is kept."""
        return step % self.checkpoint_every == 0 or step in self.checkpoint_steps


STATISTICS = (
    40  # batches of training images that the statistics of batch normalisation are estimated over
)


@dataclass
class Evaluator:
    """At the averaged weights; the weights that are trained, their optimiser and their batches stay as they are."""

    cadence: Intervals
    optimisation: OptimConfig
    machine: Runtime
    state: TrainState
    data: ImageDataset
    journal: Logger | NullLogger
    seed: int

    def eval_model(self) -> GenerativeModel:
        """The chosen average in evaluation mode, its batch statistics a function of the seed and the state alone."""
        self.machine.seed(self.seed, self.state.step)
        size = self.optimisation.batch_size // self.optimisation.grad_accum_steps
        seen = self.state.images_seen
        self.state.estimate(
            self.data.train_batch(seen + size * number, size, self.seed)
            for number in range(STATISTICS)
        )
        return self.state.ema_model.eval()

    def validate(self) -> bool:
        """Choose the best of the averages on the validation split; whether it is the best so far, by which training is steered."""
        state, metric = self.state, self.state.model.metric
        judgements = [
            self._judgement("validation", average) for average in range(len(state.averages) or 1)
        ]
        costs = [metric.cost(each[metric.name].value) for each in judgements]
        state.chosen = costs.index(min(costs))
        which = (
            [MetricValue(Metric("ema"), state.decays[state.chosen], split="validation")]
            if len(costs) > 1
            else []
        )
        self.journal.write(state.step, "validation", judgements[state.chosen] | Metrics.of(*which))
        better = min(costs) < state.best
        state.best, state.evals_since_best = (
            min(*costs, state.best),
            0 if better else state.evals_since_best + 1,
        )
        return better

    def test(self) -> None:
        """Measure the chosen average on the test split, by which nothing is steered, and warn of a figure that is too good."""
        judgement, images = self._judgement("test", self.state.chosen), self._images("test")
        self.journal.write(self.state.step, "test", judgement)
        warn_implausible_likelihood(judgement[self.state.model.metric.name], self.data, images)

    def _judgement(self, split: str, average: int) -> Metrics:
        """What is measured of one of the averages, which is then the chosen one."""
        self.state.chosen = average
        judgement = self.eval_model().evaluate(self._images(split), self._images("train")).on(split)
        self.state.model.train()
        return judgement

    def _images(self, split: str) -> Iterator[Tensor]:
        return self.data.batches(split, self.optimisation.batch_size, self.cadence.eval_images)

    def sample(self) -> None:
        """Show 32 samples of the chosen average, and the features that it has."""
        generator = torch.Generator(self.machine.device).manual_seed(
            self.seed
        )  # the same latents at every look
        images, _ = self.eval_model().sample(32, self.cadence.sample_temperature, generator)
        self.state.model.train()
        self.journal.samples(self.state.step, images, self.data.bits)
        self.journal.filters(self.state.ema_model.filters())


class Training:
    """One training of one model."""

    def __init__(
        self,
        cadence: Intervals,
        optimisation: OptimConfig,
        machine: Runtime,
        state: TrainState,
        data: ImageDataset,
        run: Run,
        config: dict[str, Any],
        team: ProcessGroup,
    ):
        self.team, self.rows = (
            team,
            team.rows(optimisation.batch_size, optimisation.grad_accum_steps)
            if team.size > 1
            else None,
        )
        self.cadence, self.optimisation, self.machine = cadence, optimisation, machine
        self.state, self.data, self.run, self.config, self.seed = (
            state,
            data,
            run,
            config,
            config["seed"],
        )
        self.done = {"save": state.step}  # the step at which each thing was last done
        self.busy, self.logged = 0.0, state.step  # seconds of computing since this step
        in_steps = self.cadence.steps is not None
        at, total, unit = (
            (state.step, self.cadence.steps, "step")
            if in_steps
            else (state.seconds, 60 * (self.cadence.minutes or 0.0), "s")
        )
        self.journal = (
            Logger(run, state.model, state.step, at, total or 0, unit)
            if team.is_main
            else NullLogger()
        )
        self.look = Evaluator(cadence, optimisation, machine, state, data, self.journal, self.seed)

    def loop(self) -> int | None:
        """Step after step to the end, or to a signal, which is returned."""
        state, row = self.state, {}
        started, stopped = time.monotonic() - state.seconds, None
        with GracefulStop() as stop, self.journal:
            while not self.over and stopped is None:
                began = time.monotonic()
                row = self.step()
                if state.nan_recovery.record(is_good(row), state.model.buffers()):
                    self.rollback()
                    row = {}
                    continue
                state.step, state.images_seen = (
                    state.step + 1,
                    state.images_seen + self.optimisation.batch_size,
                )
                self.busy += time.monotonic() - began
                state.seconds, _ = self.team.sync_clock_and_signal(time.monotonic() - started, None)
                self.report(row)
                state.seconds, stopped = self.team.sync_clock_and_signal(
                    time.monotonic() - started, stop.signal
                )
            if self.over and row:
                self.report(row)  # what the last step has not been followed by yet
            if self.done["save"] != state.step:
                self.save()
            self.journal.curves()
        return stopped

    def step(self) -> dict[str, float]:
        """Fill the gradients of one batch, and move the weights where all is finite."""
        state = self.state
        rate = state.nan_recovery.lr_scale * self.optimisation.rate(
            state.step, self.progress, len(self.data.train)
        )
        state.model.zero_grad()
        losses = []
        for loss in self.losses(state.model):
            loss.backward()
            losses.append(loss.detach())
        mean = self.team.all_reduce_grads(state.model, torch.stack(losses).sum())
        norm = gradient_norm(state.model)
        numbers = torch.stack([mean, norm]).tolist()  # one wait for the device, not two
        row = {"loss": numbers[0], "lr": rate, "grad_norm": numbers[1]}
        if is_good(row):
            self.optimisation.clip_gradients(state.model, norm)
            state.update(rate)
        return row

    def losses(self, model: Callable[..., Tensor]) -> Iterator[Tensor]:
        """The shares of this step's loss, of one part of its batch after the other; the same whenever the step is taken again."""
        self.machine.seed(self.seed, self.state.step)
        parts = self.optimisation.parts(
            *self.data.next_batch(
                self.state.images_seen, self.optimisation.batch_size, self.seed, self.rows
            )
        )
        for images, labels in parts:
            with self.machine.autocast(), split(self.team):
                loss = model(images, labels) / len(parts)
            yield loss

    def rollback(self) -> None:
        """To a good checkpoint, which the data and the random numbers follow; what was not compiled calls the hooks of the diagnosis."""
        state = self.state
        culprit = first_nonfinite_module(
            state.model, lambda: list(self.losses(state.model.forward))
        )
        latest_valid_checkpoint = partial(
            self.team.broadcast_from_main, self.run.latest_valid_checkpoint
        )
        state.rollback(
            state.nan_recovery.rewind(
                latest_valid_checkpoint, state.step + 1, culprit, self.optimisation.lr
            )
        )
        self.run.truncate_metrics(state.step)
        self.busy, self.logged = 0.0, state.step

    @property
    def progress(self) -> float:
        return self.cadence.progress(self.state.step, self.state.seconds)

    @property
    def over(self) -> bool:
        patience = self.cadence.patience
        return self.progress >= 1 or (
            patience is not None and self.state.evals_since_best >= patience
        )

    def due(self, what: str) -> bool:
        """Whether to do this after this step: at its time, or at the end, but once."""
        due = (self.over or self.cadence.due(what, self.state.step)) and self.done.get(
            what
        ) != self.state.step
        if due:
            self.done[what] = self.state.step
        return due

    def report(self, row: dict[str, float]) -> None:
        """Log, judge, sample and save, each at its time."""
        state = self.state
        self.journal.advance(state.step if self.cadence.steps is not None else state.seconds)
        if self.due("log"):
            self.log(row)
        best = self.due("eval") and self.look.validate()
        if self.due("test"):
            self.look.test()
        if (
            self.done.get("eval") == state.step and not self.over
        ):  # then they are drawn once, at the end
            self.journal.curves()
        if self.due("sample"):
            self.look.sample()
        keep = self.cadence.keeps(state.step)
        if (
            best
            or (keep and self.done["save"] != state.step)
            or (not state.nan_recovery.failed and self.due("save"))
        ):
            self.save(best, keep)

    def log(self, row: dict[str, float]) -> None:
        state = self.state
        speed = (state.step - self.logged) * self.optimisation.batch_size / self.busy
        row = (
            row
            | {"images_per_second": speed, "skipped": state.nan_recovery.skipped}
            | warn_inaccurate_inverse(state.model.diagnostics())
        )
        measured = [MetricValue(Metric(name), value) for name, value in row.items()]
        if state.model.loss_metric is not None:
            measured.insert(0, MetricValue(state.model.loss_metric, row["loss"]))
        facts = {"seconds": state.seconds, "memory_gib": peak_memory(self.machine.device)}
        self.journal.write(state.step, "train", Metrics.of(*measured, **facts))
        self.busy, self.logged = 0.0, state.step

    def save(self, best: bool = False, keep: bool = False) -> None:
        """What was judged is what the checkpoint holds."""
        self.look.eval_model()
        self.state.model.train()
        self.run.save({"config": self.config, **self.state.capture()}, best=best, keep=keep)
        self.done["save"] = self.state.step


def is_good(row: dict[str, float]) -> bool:
    return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


log = logging.getLogger("flowgen")


class Trainer:
    """How to train, on what machine; `conf/trainer/` explains the settings, which are those of `Cadence` and `Optimisation`, in one list.

    Raises FlowgenError for settings that make no sense.
    """

    def __init__(
        self,
        *,
        device: str,
        num_threads: int | str,
        precision: str,
        compile: bool,
        activation_memory: str,
        **settings: Any,
    ):
        of_cadence = {field.name for field in fields(Intervals)}
        self.cadence = Intervals(
            **{name: value for name, value in settings.items() if name in of_cadence}
        )
        self.optimisation = OptimConfig(
            **{name: value for name, value in settings.items() if name not in of_cadence}
        )
        self.machine = Runtime(
            device=device,
            num_threads=num_threads,
            precision=precision,
            compile=compile,
            activation_memory=activation_memory,
        )

    def train(
        self,
        model: GenerativeModel,
        data: ImageDataset,
        run: Run,
        config: dict[str, Any],
        checkpoint: dict[str, Any] | None,
        trained: bool = False,
        team: ProcessGroup = ALONE,
    ) -> int | None:
        """Train to the end, from the start or from `checkpoint`; a signal that asked to stop is returned once the run is saved.

        Every process of the `team` is to call this, and ends when the run is saved.

        A model that is `trained` already keeps its weights at the start; any other looks at some images first.
        Raises FlowgenError where a batch does not fit into memory, and where losses stay non-finite after several returns to the last
        good checkpoint.
        """
        if team.size > 1 and not model.shares_batches:
            raise UserError(
                "this model trains in one process alone: leave trainer.num_processes and torchrun out, and give each device a run"
            )
        team.check_device(self.machine.device)
        team.check_divides(self.optimisation.batch_size, self.optimisation.grad_accum_steps)
        for name in ("batch_size", "init_images"):
            check_memory(
                f"trainer.{name}", getattr(self.optimisation, name), 5 * math.prod(data.image_shape)
            )  # a byte and a float32 a number
        if (
            self.machine.compile
            and self.machine.activation_memory == "checkpoint"
            and (team.size > 1 or batch_norm_layers(model))
        ):
            raise UserError(
                "batch normalisation and several processes are compiled with trainer.activation_memory=store alone: leave out one or the other"
            )
        try:
            set_activation_memory(model, self.machine.activation_memory)
        except ValueError as error:
            raise UserError(f"trainer.activation_memory: {error}") from error
        reset_peak_memory(self.machine.device)
        data.to(self.machine.device)
        model.to(self.machine.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if checkpoint is None and not trained:
            model.initialize(*data.train_batch(0, self.optimisation.init_images, config["seed"]))
        check_batch_fits(
            model,
            data,
            self.machine,
            self.optimisation.batch_size,
            self.optimisation.grad_accum_steps * team.size,
        )
        team.broadcast_weights(model)
        state = TrainState(model, self.optimisation)
        if checkpoint is not None:
            state.restore(checkpoint)
            run.truncate_metrics(state.step)
        if self.machine.compile:  # CUDA graphs spare a GPU its thousand launches a step, but overwrite gradients that accumulate
            model.compile(
                mode="reduce-overhead" if self.optimisation.grad_accum_steps == 1 else "default"
            )
        training = Training(
            self.cadence, self.optimisation, self.machine, state, data, run, config, team
        )
        with explain_small_batches():
            if checkpoint is None:
                training.save()
            if self.machine.compile:
                warm_up(training)
            stopped = training.loop()
        team.broadcast_from_main(
            lambda: None
        )  # a launcher would end the one that saves when another has ended
        return stopped


@contextmanager
def explain_small_batches() -> Iterator[None]:
    """Turn the error of batch norm layers for one image into one that names the setting."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "batch normalization needs more than one image per micro-batch: "
            "increase trainer.batch_size, or decrease trainer.grad_accum_steps"
        ) from error


def warm_up(training: Training) -> None:
    """Compile on the first batch, and say how long it took; nothing is learnt."""
    log.info("compiling the model, which may take minutes")
    began, model = time.monotonic(), training.state.model
    buffers = [
        (buffer, buffer.clone()) for buffer in model.buffers()
    ]  # statistics of batches, and chains
    for loss in training.losses(model):
        loss.backward()
    model.zero_grad()
    for buffer, before in buffers:
        buffer.copy_(before)
    log.info("compiled in %.0f s", time.monotonic() - began)
