"""The training loop."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from flowgen.bijections.base import ACTIVATION_MEMORY, set_activation_memory
from flowgen.bijections.networks import batch_norm_layers
from flowgen.data.dataset import ImageDataset
from flowgen.models.base import GenerativeModel
from flowgen.training.device import Runtime, check_batch_fits, peak_memory, reset_peak_memory
from flowgen.training.distributed import ProcessGroup, shard_batches
from flowgen.training.logger import Logger
from flowgen.training.nan_recovery import first_nonfinite_module
from flowgen.training.optim import (
    OPTIMIZERS,
    build_optimizer,
    gradient_norm,
    learning_rate_factor,
    warmup_steps,
)
from flowgen.training.run_dir import Run
from flowgen.training.sanity_checks import warn_implausible_likelihood, warn_inaccurate_inverse
from flowgen.training.signals import GracefulStop
from flowgen.training.state import TrainState, ema_decays
from flowgen.utils.errors import UserError, check_choice, check_number, check_whole
from flowgen.utils.memory import check_memory
from flowgen.utils.metrics import Metric, Metrics, MetricValue

MIN_MINUTES = 0.001
NUM_SAMPLES = 32  # images in a grid of samples
BN_UPDATE_BATCHES = 40  # training batches over which batch statistics are estimated
log = logging.getLogger("flowgen")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """All settings of a training, with the defaults of conf/trainer/cpu.yaml.

    Training ends after `steps`, after `minutes`, or after `patience` validations in a row without
    a better result: at the first of these limits.

    Raises:
        UserError: if a value is out of range or two values contradict each other.

    Example:
        >>> TrainerConfig(steps=1000, lr=1e-3).ema_decay
        0.99
    """

    steps: int | None = None  # optimizer steps; null: no limit
    minutes: float | None = 5  # minutes of training, evaluation and sampling; null: no limit
    batch_size: int = 16  # images per optimizer step
    grad_accum_steps: int = 1  # micro-batches per optimizer step
    optimizer: str = "adam"  # adam (AdamW) or sgd
    momentum: float = 0.9  # of sgd
    betas: Sequence[float] = (0.9, 0.999)  # of adam
    weight_decay: float = 0.0  # of adam, decoupled
    lr: float = 4e-3  # full learning rate
    warmup: int | str = 100  # steps, or epochs as in "1 epoch"
    warmdown_ratio: float = 0.5  # last part of training, over which the learning rate falls to 0
    grad_clip: float = 50.0  # largest gradient norm; 0: no limit
    ema_decay: float | Sequence[float] = 0.99  # of the averaged weights; 0: no average
    init_images: int = 256  # training images for data-dependent initialization
    device: str = "cpu"  # auto, cpu or cuda
    num_processes: int | None = None  # processes on this machine; null: one, or torchrun's
    num_threads: int | str = "auto"  # CPU threads; auto: one per free core
    precision: str = "auto"  # of the networks: float32, bfloat16 or auto
    compile: bool = False  # use torch.compile
    activation_memory: str = "store"  # for the backward pass: store, checkpoint or reversible
    log_every: int = 10  # steps between log lines
    eval_every: int = 1000  # steps between validations
    patience: int | None = None  # validations without a better result before training ends
    eval_images: int | None = 500  # images of each evaluated split; null: all
    sample_every: int = 1000  # steps between grids of samples
    sample_temperature: float = 0.7  # of these samples
    save_every: int = 250  # steps between checkpoints
    checkpoint_every: int = 1_000_000  # steps between numbered checkpoints, which are kept
    checkpoint_steps: list[int] = field(default_factory=list)  # more steps with such a checkpoint

    def __post_init__(self) -> None:
        decays = ema_decays(self.ema_decay)
        _check(
            self.steps is not None or self.minutes is not None,
            "training has no end: set trainer.steps or trainer.minutes",
        )
        _check(
            isinstance(self.checkpoint_steps, list),
            "checkpoint_steps must be a list of steps, as in "
            f"trainer.checkpoint_steps=[1000,5000], not {self.checkpoint_steps!r}",
        )
        _check(
            isinstance(self.betas, Sequence) and len(self.betas) == 2,
            f"betas must be two numbers, as in trainer.betas=[0.9,0.95], not {self.betas!r}",
        )
        _check(
            len(decays) > 0,
            "ema_decay must be a number, 0 for no average, or several, as in "
            "trainer.ema_decay=[0.99,0.999], not []",
        )
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.type is int or (setting.type == int | None and value is not None):
                check_whole(**{setting.name: value})
            elif setting.type is float:
                check_number(**{setting.name: value})
        if self.minutes is not None:
            check_number(MIN_MINUTES, minutes=self.minutes)
        for step in self.checkpoint_steps:
            check_whole(checkpoint_steps=step)
        for beta in self.betas:
            check_number(betas=beta)
        for decay in decays:
            check_number(ema_decay=decay)
        _check(
            self.warmdown_ratio <= 1, f"warmdown_ratio must be at most 1, not {self.warmdown_ratio}"
        )
        _check(
            max(*decays, self.momentum, *self.betas) < 1,
            "ema_decay, momentum and betas must be below 1, not "
            f"{self.ema_decay}, {self.momentum} and {self.betas}",
        )
        _check(
            self.batch_size % self.grad_accum_steps == 0,
            f"batch_size={self.batch_size} cannot be split into "
            f"grad_accum_steps={self.grad_accum_steps} equal parts",
        )
        warmup_steps(self.warmup, 1, 1)
        check_choice(OPTIMIZERS, optimizer=self.optimizer)
        check_choice((True, False), compile=self.compile)
        check_choice(ACTIVATION_MEMORY, activation_memory=self.activation_memory)
        _check(
            not self.compile or self.activation_memory != "reversible",
            "activation_memory=reversible cannot be compiled: "
            "set trainer.compile=false, or trainer.activation_memory=checkpoint",
        )


class Trainer:
    """One training of one model.

    Args:
        config: all settings.
        model: the model to train, on the CPU.
        data: training, validation and test images.
        run: the directory for metrics, samples and checkpoints; only the main process writes.
        run_config: the configuration that checkpoints store; its `seed` and the step fix all
            random numbers.
        group: the processes that train the model together.
        runtime: the device and precision.
    """

    def __init__(
        self,
        config: TrainerConfig,
        model: GenerativeModel,
        data: ImageDataset,
        run: Run,
        run_config: dict[str, Any],
        group: ProcessGroup,
        runtime: Runtime,
    ):
        self.config = config
        self.model = model
        self.data = data
        self.run = run
        self.run_config = run_config
        self.seed: int = run_config["seed"]
        self.group = group
        self.runtime = runtime
        self.rows: Tensor | None = None  # indices of this process's rows of every batch
        self.logger: Logger | None = None  # in the main process only

    def fit(
        self, checkpoint: dict[str, Any] | None = None, init_weights: bool = False
    ) -> int | None:
        """Train to the end. Every process of the group calls this method.

        Args:
            checkpoint: where to continue; None: start from scratch.
            init_weights: whether the model starts from trained weights, so that data-dependent
                initialization is skipped.

        Returns:
            the signal that stopped training early, once the run is saved, or None.

        Raises:
            UserError: if a batch does not fit into memory, or if losses stay non-finite after
                several rollbacks.
        """
        self._prepare(checkpoint, init_weights)
        state = self.state
        row: dict[str, float] = {}
        stop_signal = None
        start_time = time.monotonic() - state.seconds
        with GracefulStop() as stop, self.logger or nullcontext():
            while not self.finished and stop_signal is None:
                step_start = time.monotonic()
                row = self.training_step()
                if state.nan_recovery.record(row.values(), self.model.buffers()):
                    self.rollback()
                    continue
                state.step += 1
                state.images_seen += self.config.batch_size
                self.step_seconds.append(time.monotonic() - step_start)
                # Synchronize the clock, so that all processes stop at the same step.
                state.seconds, _ = self.group.sync_clock_and_signal(
                    time.monotonic() - start_time, None
                )
                self._after_step(row)
                state.seconds, stop_signal = self.group.sync_clock_and_signal(
                    time.monotonic() - start_time, stop.signal
                )
            if self.finished and row:
                self._after_step(row)  # time may have run out during the last evaluation
            if self.last_done["save"] != state.step:
                self.save_checkpoint()
            if self.logger:
                self.logger.plot_curves()
        self.group.barrier()  # a launcher kills processes that outlive the others
        return stop_signal

    def training_step(self) -> dict[str, float]:
        """Take one optimizer step, unless the loss or a gradient is not finite.

        Returns:
            loss, learning rate and gradient norm.
        """
        model = self.model
        optimizer = self.state.optimizer
        lr = self.learning_rate()
        model.zero_grad()
        losses = []
        for images, labels in self.micro_batches():
            loss = self.compute_loss(model, images, labels)
            loss.backward()
            losses.append(loss.detach())
        mean_loss = self.group.all_reduce_grads(model, torch.stack(losses).sum())
        grad_norm = gradient_norm(model)
        # Transfer both numbers at once: a single device synchronization.
        loss_value, norm_value = torch.stack([mean_loss, grad_norm]).tolist()
        row = {"loss": loss_value, "lr": lr, "grad_norm": norm_value}
        if not all(map(math.isfinite, row.values())):
            return row
        if self.config.grad_clip:
            nn.utils.clip_grads_with_norm_(model.parameters(), self.config.grad_clip, grad_norm)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        optimizer.step()
        for ema in self.state.emas:
            ema.update_parameters(model)
        return row

    def learning_rate(self) -> float:
        """Return the learning rate of the next optimizer step."""
        config = self.config
        warmup = warmup_steps(config.warmup, len(self.data.train), config.batch_size)
        factor = learning_rate_factor(self.state.step, self.progress, warmup, config.warmdown_ratio)
        return self.state.nan_recovery.lr_scale * (config.lr * factor)

    def micro_batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Seed the step and yield its micro-batches: images and labels.

        Batches and noise depend only on seed and step, so that a step can be replayed.
        """
        self.runtime.seed(self.seed, self.state.step)
        images, labels = self.data.next_batch(
            self.state.images_seen, self.config.batch_size, self.seed, self.rows
        )
        parts = self.config.grad_accum_steps
        label_parts = [None] * parts if labels is None else labels.chunk(parts)
        yield from zip(images.chunk(parts), label_parts, strict=True)

    def compute_loss(
        self, forward: Callable[..., Tensor], images: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Return the share of one micro-batch in the loss of its step."""
        with self.runtime.autocast():
            return forward(images, labels) / self.config.grad_accum_steps

    def rollback(self) -> None:
        """Restore the last good checkpoint after non-finite losses.

        Data order and random numbers follow the step. The diagnosis replays the uncompiled model,
        whose modules call their hooks.
        """
        state = self.state
        culprit = first_nonfinite_module(
            self.model,
            lambda: [
                self.compute_loss(self.model.forward, *batch) for batch in self.micro_batches()
            ],
        )
        checkpoint = state.nan_recovery.rewind(
            lambda before: self.group.broadcast_from_main(self.run.latest_valid_checkpoint, before),
            state.step + 1,
            culprit,
            self.config.lr,
        )
        state.rollback(checkpoint)
        if self.group.is_main:
            self.run.truncate_metrics(state.step)
        self.step_seconds.clear()

    @property
    def progress(self) -> float:
        """The finished fraction of training; at 1 it ends."""
        config = self.config
        by_steps = self.state.step / config.steps if config.steps else 0.0
        by_time = self.state.seconds / (60 * config.minutes) if config.minutes else 0.0
        return max(by_steps, by_time)

    @property
    def position(self) -> float:
        """The position of the progress bar: optimizer steps, or seconds without a last step."""
        return self.state.step if self.config.steps is not None else self.state.seconds

    @property
    def finished(self) -> bool:
        """True once training has reached its end or run out of patience."""
        patience = self.config.patience or math.inf
        return self.progress >= 1 or self.state.evals_since_best >= patience

    def _after_step(self, row: dict[str, float]) -> None:
        """Log, evaluate, sample and save, if it is time to."""
        config = self.config
        state = self.state
        if self.logger:
            self.logger.advance(self.position)
        if self._is_due("log", config.log_every):
            self.log_step(row)
        is_best = self._is_due("eval", config.eval_every) and self.validate()
        if self._is_due("test", math.inf):
            self.test()
        if self.logger and self.last_done.get("eval") == state.step and not self.finished:
            self.logger.plot_curves()  # at the end `fit` plots them
        if self._is_due("sample", config.sample_every):
            self.sample()
        keep = state.step % config.checkpoint_every == 0 or state.step in config.checkpoint_steps
        if (
            is_best
            or (keep and self.last_done["save"] != state.step)
            or (not state.nan_recovery.failed and self._is_due("save", config.save_every))
        ):
            self.save_checkpoint(best=is_best, keep=keep)

    def _is_due(self, task: str, interval: float) -> bool:
        """Return whether to do a task after this step: at its interval or the end, but once."""
        step = self.state.step
        due = (self.finished or step % interval == 0) and self.last_done.get(task) != step
        if due:
            self.last_done[task] = step
        return due

    def log_step(self, row: dict[str, float]) -> None:
        """Write the metrics of the last training step."""
        state = self.state
        speed = len(self.step_seconds) * self.config.batch_size / sum(self.step_seconds)
        diagnostics = self.model.diagnostics()
        warn_inaccurate_inverse(diagnostics)
        row = row | {"images_per_second": speed, "skipped": state.nan_recovery.skipped}
        values = [MetricValue(Metric(name), value) for name, value in (row | diagnostics).items()]
        if self.model.loss_metric is not None:
            values.insert(0, MetricValue(self.model.loss_metric, row["loss"]))
        if self.logger:
            memory_gib = peak_memory(self.runtime.device)
            metrics = Metrics.of(*values, seconds=state.seconds, memory_gib=memory_gib)
            self.logger.write(state.step, "train", metrics)
        self.step_seconds.clear()

    def eval_model(self) -> GenerativeModel:
        """Return the best EMA, or the model without EMA, in evaluation mode.

        Its batch statistics are estimated over training batches that the seed and the state fix.
        """
        self.runtime.seed(self.seed, self.state.step)
        size = self.config.batch_size // self.config.grad_accum_steps
        self.state.update_bn(
            self.data.train_batch(self.state.images_seen + size * index, size, self.seed)
            for index in range(BN_UPDATE_BATCHES)
        )
        return self.state.ema_model.eval()

    def validate(self) -> bool:
        """Evaluate all EMAs on the validation split and select the best.

        Returns:
            whether it is the best so far.
        """
        state = self.state
        metric = self.model.metric
        results = [self._evaluate("validation", index) for index in range(len(state.emas) or 1)]
        cost_of_ema = [metric.cost(result[metric.name].value) for result in results]
        lowest_cost = min(cost_of_ema)
        state.best_ema = cost_of_ema.index(lowest_cost)
        metrics = results[state.best_ema]
        if len(results) > 1:
            metrics |= Metrics.of(MetricValue(Metric("ema"), state.ema_decays[state.best_ema]))
        if self.logger:
            self.logger.write(state.step, "validation", metrics)
        is_best = lowest_cost < state.best
        state.best = min(lowest_cost, state.best)
        state.evals_since_best = 0 if is_best else state.evals_since_best + 1
        return is_best

    def test(self) -> None:
        """Evaluate on the test split, for reporting only."""
        metrics = self._evaluate("test", self.state.best_ema)
        if self.logger:
            self.logger.write(self.state.step, "test", metrics)
        warn_implausible_likelihood(
            metrics[self.model.metric.name], self.data, self._eval_batches("test")
        )

    def _evaluate(self, split: str, ema_index: int) -> Metrics:
        """Return the metrics of one EMA, which becomes the selected one."""
        self.state.best_ema = ema_index
        metrics = self.eval_model().evaluate(self._eval_batches(split), self._eval_batches("train"))
        self.model.train()
        return metrics.on(split)

    def _eval_batches(self, split: str) -> Iterator[Tensor]:
        return self.data.batches(split, self.config.batch_size, self.config.eval_images)

    def sample(self) -> None:
        """Draw samples with the same random seed every time."""
        generator = torch.Generator(self.runtime.device).manual_seed(self.seed)
        images, _ = self.eval_model().sample(NUM_SAMPLES, self.config.sample_temperature, generator)
        self.model.train()
        if self.logger:
            self.logger.write_samples(self.state.step, images, self.data.bits)
            self.logger.write_filters(self.state.ema_model.filters())

    def save_checkpoint(self, best: bool = False, keep: bool = False) -> None:
        """Save the state, with the batch statistics that an evaluation of this step uses.

        Args:
            best: save it as `best.pt` too.
            keep: save it under the number of its step too.
        """
        self.eval_model()
        self.model.train()
        if self.group.is_main:
            self.run.save({"config": self.run_config, **self.state.capture()}, best=best, keep=keep)
        self.last_done["save"] = self.state.step

    def _prepare(self, checkpoint: dict[str, Any] | None, init_weights: bool) -> None:
        """Initialize or restore the model, and create state and logger."""
        config = self.config
        model = self.model
        device = self.runtime.device
        self._check_settings()
        try:
            set_activation_memory(model, config.activation_memory)
        except ValueError as error:
            raise UserError(
                f"trainer.activation_memory={config.activation_memory}: {error}"
            ) from error
        reset_peak_memory(device)
        self.data.to(device)
        model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if checkpoint is None and not init_weights:
            model.initialize(*self.data.train_batch(0, config.init_images, self.seed))
        check_batch_fits(
            model,
            self.data,
            self.runtime,
            config.batch_size,
            config.grad_accum_steps * self.group.size,
            config.activation_memory,
        )
        self.group.broadcast_weights(model)
        optimizer = build_optimizer(
            model,
            config.optimizer,
            config.lr,
            momentum=config.momentum,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self.state = TrainState(model, optimizer, config.optimizer, ema_decays(config.ema_decay))
        if self.group.size > 1:  # after the EMAs are copied, which evaluate whole batches
            self.rows = self.group.rows(config.batch_size, config.grad_accum_steps)
            shard_batches(model, self.group.rank, self.group.size)
        if checkpoint is not None:
            self.state.restore(checkpoint)
            if self.group.is_main:
                self.run.truncate_metrics(self.state.step)
        self.last_done = {"save": self.state.step}  # the step at which each task was last done
        self.step_seconds: list[float] = []  # of the training steps since the last log line
        if self.group.is_main:
            total = config.steps or 60 * (config.minutes or 0.0)
            unit = "step" if config.steps else "s"
            self.logger = Logger(self.run, model, self.state.step, self.position, total, unit)
        if config.compile:
            # CUDA graphs reduce launch overhead, but overwrite accumulated gradients.
            model.compile(mode="reduce-overhead" if config.grad_accum_steps == 1 else "default")
        if checkpoint is None:
            self.save_checkpoint()
        if config.compile:
            self._warm_up()

    def _check_settings(self) -> None:
        """Check that the model can be trained with these settings on this machine."""
        config = self.config
        if self.group.size > 1:
            _check(
                self.model.shares_batches,
                "this model trains in one process: remove trainer.num_processes and torchrun, "
                "and start one run per device",
            )
            self.group.check_device(self.runtime.device)
            self.group.check_divides(config.batch_size, config.grad_accum_steps)
        bytes_per_image = 5 * math.prod(self.data.image_shape)  # one byte and one float32 per value
        check_memory("trainer.batch_size", config.batch_size, bytes_per_image)
        check_memory("trainer.init_images", config.init_images, bytes_per_image)
        recomputes = config.compile and config.activation_memory == "checkpoint"
        _check(
            not (recomputes and (self.group.size > 1 or batch_norm_layers(self.model))),
            "trainer.compile=true with batch normalization or several processes needs "
            "trainer.activation_memory=store: set it, or trainer.compile=false",
        )

    def _warm_up(self) -> None:
        """Compile the model on the first batch, without training it."""
        log.info("compiling the model, which may take minutes")
        start_time = time.monotonic()
        # A forward pass changes running statistics and Markov chains.
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        for images, labels in self.micro_batches():
            self.compute_loss(self.model, images, labels).backward()
        self.model.zero_grad()
        for buffer, original in buffers:
            buffer.copy_(original)
        log.info("compiled in %.0f s", time.monotonic() - start_time)


def _check(valid: bool, message: str) -> None:
    if not valid:
        raise UserError(message)
