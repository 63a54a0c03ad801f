"""The training loop."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flowgen.bijections.base import ACTIVATION_MEMORY, set_activation_memory
from flowgen.bijections.networks import batch_norm_layers
from flowgen.data.dataset import ImageDataset
from flowgen.models.base import GenerativeModel
from flowgen.training import optim, sanity_checks
from flowgen.training.compilation import compile_model
from flowgen.training.device import Runtime, check_batch_fits, peak_memory, reset_peak_memory
from flowgen.training.distributed import WorkerGroup, shard_batches
from flowgen.training.logger import Logger, WorkerLogger
from flowgen.training.nan_recovery import first_nonfinite_module
from flowgen.training.run_dir import Run
from flowgen.training.signals import GracefulStop
from flowgen.training.state import TrainState
from flowgen.utils import as_list
from flowgen.utils.errors import UserError, check, check_choice, check_number, check_whole, log
from flowgen.utils.memory import check_memory
from flowgen.utils.metrics import Metric, Metrics, MetricValue

MIN_MINUTES = 0.001
MIN_COMPILED_MINUTES = 60  # shorter trainings do not pay for minutes of compilation
MIN_SPEEDUP = 1.05  # of compiled steps, below which auto returns to eager mode
NUM_SAMPLES = 32  # images in a grid of samples
BN_UPDATE_BATCHES = 40  # training batches over which batch statistics are estimated
CHECKS: dict[Any, Callable[..., None]] = {  # of settings by type; for `LISTS`, of each element
    int: check_whole,
    int | None: check_whole,
    list[int]: check_whole,
    float: check_number,
    float | None: partial(check_number, MIN_MINUTES),
    Sequence[float]: check_number,
    float | Sequence[float]: check_number,
}
OPTIONAL = (int | None, float | None)
LISTS = (list[int], Sequence[float], float | Sequence[float])


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """All settings of a training run. Comments in conf/trainer/cpu.yaml explain each of them.

    Training ends after `steps`, after `minutes`, or after `patience` validations in a row without
    a better result: at the first of these limits.

    Raises:
        UserError: If a value is out of range or two values contradict each other.

    Example:
        >>> TrainerConfig(steps=1000, lr=1e-3).ema_decay
        0.99
    """

    steps: int | None = None
    minutes: float | None = 5
    batch_size: int = 16
    grad_accum_steps: int = 1
    optimizer: str = "adam"
    momentum: float = 0.9
    betas: Sequence[float] = (0.9, 0.999)
    weight_decay: float = 0.0
    lr: float = 4e-3
    warmup: int | str = 100
    warmdown_ratio: float = 0.5
    grad_clip: float = 50.0
    ema_decay: float | Sequence[float] = 0.99
    init_images: int = 256
    device: str = "cpu"
    num_processes: int | None = None
    num_threads: int | str = "auto"
    precision: str = "auto"
    compile: bool | str = "auto"
    activation_memory: str = "store"
    log_every: int = 10
    eval_every: int = 1000
    patience: int | None = None
    eval_images: int | None = 500
    sample_every: int = 1000
    sample_temperature: float = 0.7
    save_every: int = 250
    checkpoint_every: int = 1_000_000
    checkpoint_steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(
            self.steps is not None or self.minutes is not None,
            "training has no end: set trainer.steps or trainer.minutes",
        )
        check(
            isinstance(self.checkpoint_steps, list),
            "checkpoint_steps must be a list of steps, as in "
            f"trainer.checkpoint_steps=[1000,5000], not {self.checkpoint_steps!r}",
        )
        check(
            isinstance(self.betas, Sequence) and len(self.betas) == 2,
            f"betas must be two numbers, as in trainer.betas=[0.9,0.95], not {self.betas!r}",
        )
        decays = as_list(self.ema_decay)
        check(
            len(decays) > 0,
            "ema_decay must be a number, 0 for no average, or several, as in "
            "trainer.ema_decay=[0.99,0.999], not []",
        )
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.type in CHECKS and (value is not None or setting.type not in OPTIONAL):
                for number in as_list(value) if setting.type in LISTS else [value]:
                    CHECKS[setting.type](**{setting.name: number})
        check(
            self.warmdown_ratio <= 1, f"warmdown_ratio must be at most 1, not {self.warmdown_ratio}"
        )
        check(
            max(*decays, self.momentum, *self.betas) < 1,
            "ema_decay, momentum and betas must be below 1, not "
            f"{self.ema_decay}, {self.momentum} and {self.betas}",
        )
        check(
            self.batch_size % self.grad_accum_steps == 0,
            f"batch_size={self.batch_size} cannot be split into "
            f"grad_accum_steps={self.grad_accum_steps} equal parts",
        )
        optim.warmup_steps(self.warmup, 1, 1)
        check_choice(optim.OPTIMIZERS, optimizer=self.optimizer)
        check_choice((True, False, "auto"), compile=self.compile)
        check_choice(ACTIVATION_MEMORY, activation_memory=self.activation_memory)
        check(
            self.compile is not True or self.activation_memory != "reversible",
            "activation_memory=reversible cannot be compiled: "
            "set trainer.compile=false, or trainer.activation_memory=checkpoint",
        )


@dataclass(eq=False)
class Trainer:
    """Training run of one model.

    Args:
        config: All settings.
        model: Model to train, on the CPU.
        data: Training, validation and test images.
        run: Folder for metrics, samples and checkpoints. Only the main process writes.
        run_config: Configuration that checkpoints store. Its `seed` and the step fix all random
            numbers.
        group: Processes that train the model together.
        runtime: Device and precision.

    Attributes:
        state: Optimizer, EMAs and progress, see `TrainState`.
        logger: Writes metrics and pictures, in the main process.
        batch_indices: Indices of this process's images in every batch, or None for all of them.
        last_done: The step at which each task was last done.
        saved_as_finished: Whether the last checkpoint is that of a finished training.
        step_metrics: Loss, learning rate and gradient norm of the last training step.
        step_seconds: Durations of the training steps since the last log line.
        compiled: Whether the model is compiled, or None until this is chosen.
    """

    config: TrainerConfig
    model: GenerativeModel
    data: ImageDataset
    run: Run
    run_config: dict[str, Any]
    group: WorkerGroup
    runtime: Runtime
    state: TrainState = field(init=False)
    logger: Any = field(init=False, default_factory=WorkerLogger)
    batch_indices: Tensor | None = field(init=False, default=None)
    last_done: dict[str, int] = field(init=False, default_factory=dict)
    saved_as_finished: bool = field(init=False, default=False)
    step_metrics: dict[str, float] = field(init=False, default_factory=dict)
    step_seconds: list[float] = field(init=False, default_factory=list)
    compiled: bool | None = field(init=False, default=None)

    def prepare(self, checkpoint: dict[str, Any] | None = None, init_weights: bool = False) -> None:
        """Initialize or restore the model and its state. No file of the run changes.

        Args:
            checkpoint: Checkpoint to continue from. Default: start from scratch.
            init_weights: Whether the model starts from trained weights, so that data-dependent
                initialization is skipped.

        Raises:
            UserError: If a setting does not fit this machine, or a batch its memory.
        """
        self._check_settings()
        self._prepare_model(initialize=checkpoint is None and not init_weights)
        self._create_state()
        if checkpoint is not None:
            self.state.restore(checkpoint)
        self._choose_compilation(checkpoint)

    def fit(self) -> int | None:
        """Train to the end, after `prepare`. Every process of the group calls this method.

        Returns:
            The signal that stopped training early, once the run is saved, or None.

        Raises:
            UserError: If losses stay non-finite after training was rewound several times.
        """
        state = self.state
        # A rewind or a resume starts from here, even if an older checkpoint was chosen.
        self.save_checkpoint()
        if self.group.is_main:
            self.run.truncate_metrics(state.step)
            total = self.config.steps or 60 * (self.config.minutes or 0.0)
            unit = "steps" if self.config.steps else "seconds"
            self.logger = Logger(self.run, self.model, state.step, self.progress, total, unit)
        stop_signal = None
        start_time = time.monotonic() - state.seconds
        with GracefulStop() as stop, self.logger:
            while not self.finished and stop_signal is None:
                step_start = time.monotonic()
                self.step_metrics = self.training_step()
                if state.nan_recovery.record(self.step_metrics.values(), self.model.buffers()):
                    self.rewind()
                    continue
                state.step += 1
                state.images_seen += self.config.batch_size
                self.step_seconds.append(time.monotonic() - step_start)
                # Synchronize the clock, so that all processes stop at the same step.
                state.seconds, _ = self.group.sync_clock_and_signal(
                    time.monotonic() - start_time, None
                )
                self._after_step()
                state.seconds, stop_signal = self.group.sync_clock_and_signal(
                    time.monotonic() - start_time, stop.signal
                )
            self._finish()
        self.group.barrier()  # a launcher kills processes that outlive the others
        return stop_signal

    def training_step(self) -> dict[str, float]:
        """Take one optimizer step, unless the loss or a gradient is not finite.

        Returns:
            Loss, learning rate and gradient norm.
        """
        config = self.config
        model = self.model
        # The rate rises over the warm-up, which may be given in epochs, and falls at the end.
        warmup = optim.warmup_steps(config.warmup, len(self.data.train), config.batch_size)
        factor = optim.learning_rate_factor(
            self.state.step, self.fraction_done, warmup, config.warmdown_ratio
        )
        lr = self.state.nan_recovery.lr_scale * (config.lr * factor)  # every rewind halves it
        model.zero_grad()
        losses = []
        for images, labels in self.micro_batches():
            loss = self.compute_loss(model, images, labels)
            loss.backward()
            losses.append(loss.detach())
        gradients = [
            parameter.grad for parameter in model.parameters() if parameter.grad is not None
        ]
        mean_loss = torch.stack(losses).sum()
        self.group.all_reduce_mean([*gradients, mean_loss])
        grad_norm = nn.utils.get_total_norm(gradients)
        # Transfer both numbers at once: a single device synchronization.
        loss_value, norm_value = torch.stack([mean_loss, grad_norm]).tolist()
        metrics = {"loss": loss_value, "lr": lr, "grad_norm": norm_value}
        if not all(map(math.isfinite, metrics.values())):
            return metrics  # `fit` counts the failed step and rewinds after several
        if config.grad_clip and norm_value > config.grad_clip:
            nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, grad_norm)
        for param_group in self.state.optimizer.param_groups:
            param_group["lr"] = lr
        self.state.optimizer.step()
        for ema in self.state.emas:
            ema.update_parameters(model)
        return metrics

    def micro_batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Seed the step and yield its micro-batches: images and labels.

        Batches and noise depend only on seed and step, so that a step can be replayed.
        """
        self.runtime.seed(self.run_config["seed"], self.state.step)
        images, labels = self.data.next_batch(
            self.state.images_seen,
            self.config.batch_size,
            self.run_config["seed"],
            self.batch_indices,
        )
        count = self.config.grad_accum_steps
        label_chunks = [None] * count if labels is None else labels.chunk(count)
        yield from zip(images.chunk(count), label_chunks, strict=True)

    def compute_loss(
        self, loss_fn: Callable[..., Tensor], images: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Return the share of one micro-batch in the loss of its step.

        Args:
            loss_fn: The model, or its `forward` without torch.compile.
            images: The micro-batch, (batch, channels, height, width).
            labels: Classes (batch,), or None.
        """
        with self.runtime.autocast():
            return loss_fn(images, labels) / self.config.grad_accum_steps

    def rewind(self) -> None:
        """Go back to the last good checkpoint after non-finite losses, with half the learning rate.

        Data order and random numbers follow the step, so the same batches come again. The
        diagnosis before it replays the failed step without torch.compile, whose modules do not
        call their hooks.
        """
        state = self.state
        bad_module = first_nonfinite_module(
            self.model,
            lambda: [
                self.compute_loss(self.model.forward, *batch) for batch in self.micro_batches()
            ],
        )
        checkpoint = self.group.broadcast_from_main(
            self.run.latest_valid_checkpoint, state.nan_recovery.rewind_limit(state.step + 1)
        )
        state.nan_recovery.count_rewind(
            checkpoint["step"], state.step + 1, bad_module, self.config.lr
        )
        state.restore_step(checkpoint)
        state.evals_since_best = checkpoint["progress"].get("evals_since_best", 0)
        self.last_done = {"save": state.step}  # later steps and their tasks are done again
        if self.group.is_main:
            self.run.truncate_metrics(state.step)
        self.step_seconds.clear()

    @property
    def fraction_done(self) -> float:
        """The finished fraction of training, in steps or in time; at 1 training ends."""
        by_steps = self.state.step / self.config.steps if self.config.steps else 0.0
        by_time = self.state.seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        return max(by_steps, by_time)

    @property
    def progress(self) -> float:
        """Progress in the unit of the progress bar: optimizer steps, or seconds without `steps`."""
        return self.state.step if self.config.steps is not None else self.state.seconds

    @property
    def finished(self) -> bool:
        """True once training has reached its end or run out of patience."""
        out_of_patience = self.state.evals_since_best >= (self.config.patience or math.inf)
        return self.fraction_done >= 1 or out_of_patience

    def _after_step(self) -> None:
        """Log, evaluate, sample and save, if it is time to."""
        config = self.config
        state = self.state
        self.logger.advance(self.progress)
        if self._start_if_due("log", config.log_every):
            self.log_step()
        is_best = self._start_if_due("eval", config.eval_every) and self.validate()
        if self.finished and self.last_done.get("test") != state.step:
            self.last_done["test"] = state.step
            self.test()
        if self.last_done.get("eval") == state.step and not self.finished:
            self.logger.plot_curves()  # at the end `_finish` plots them
        if self._start_if_due("sample", config.sample_every):
            self.sample()
        numbered = (
            state.step % config.checkpoint_every == 0 or state.step in config.checkpoint_steps
        )
        if (
            is_best
            or (numbered and self.last_done["save"] != state.step)
            or (not state.nan_recovery.failed and self._start_if_due("save", config.save_every))
        ):
            self.save_checkpoint(is_best, numbered)

    def _finish(self) -> None:
        """Complete the tasks of the last step; the time may have run out during its evaluation."""
        if self.finished and self.step_metrics:
            self._after_step()
        if self.last_done["save"] != self.state.step or self.saved_as_finished != self.finished:
            self.save_checkpoint()
        self.logger.plot_curves()

    def _start_if_due(self, task: str, interval: int) -> bool:
        """Return whether to do a task after this step, and record that it is done.

        It is done at its interval and at the end, once per step.
        """
        step = self.state.step
        due = (self.finished or step % interval == 0) and self.last_done.get(task) != step
        if due:
            self.last_done[task] = step
        return due

    def log_step(self) -> None:
        """Write the metrics of the last training step, and diagnostics."""
        diagnostics = self.model.diagnostics()
        sanity_checks.warn_inaccurate_inverse(diagnostics)
        row = {
            **self.step_metrics,
            "images_per_second": (
                len(self.step_seconds) * self.config.batch_size / sum(self.step_seconds)
            ),
            "skipped": self.state.nan_recovery.skipped,
            **diagnostics,
        }
        self.step_seconds.clear()
        values = [MetricValue(Metric(name), value) for name, value in row.items()]
        if self.model.loss_metric is not None:
            loss = MetricValue(
                self.model.loss_metric,
                self.step_metrics["loss"],
                likelihood=self.model.likelihood,
            )
            values.insert(0, loss)
        memory_gib = peak_memory(self.runtime.device)
        metrics = Metrics.of(*values, seconds=self.state.seconds, memory_gib=memory_gib)
        self.logger.write(self.state.step, "train", metrics)

    def eval_model(self) -> GenerativeModel:
        """Return the best EMA, or the model without EMA, in evaluation mode.

        Its batch statistics are estimated over training batches that the seed and the state fix.
        """
        self._update_batch_statistics()
        return self.state.ema_model.eval()

    def _update_batch_statistics(self) -> None:
        self.runtime.seed(self.run_config["seed"], self.state.step)
        size = self.config.batch_size // self.config.grad_accum_steps
        self.state.update_bn(
            self.data.train_batch(
                self.state.images_seen + size * index, size, self.run_config["seed"]
            )
            for index in range(BN_UPDATE_BATCHES)
        )

    def validate(self) -> bool:
        """Evaluate all EMAs on the validation split and select the best.

        Returns:
            Whether it is better than at all validations before.
        """
        state = self.state
        metric = self.model.metric
        results = [self._evaluate("validation", index) for index in range(len(state.emas) or 1)]
        cost_of_ema = [metric.cost(result[metric.name].value) for result in results]
        state.best_ema = cost_of_ema.index(min(cost_of_ema))
        metrics = results[state.best_ema]
        if len(results) > 1:
            metrics |= Metrics.of(MetricValue(Metric("ema"), state.ema_decays[state.best_ema]))
        self.logger.write(state.step, "validation", metrics)
        is_best = min(cost_of_ema) < state.best_cost
        state.best_cost = min(*cost_of_ema, state.best_cost)
        state.evals_since_best = 0 if is_best else state.evals_since_best + 1
        return is_best

    def test(self) -> None:
        """Evaluate on the test split, for reporting only."""
        metrics = self._evaluate("test", self.state.best_ema)
        self.logger.write(self.state.step, "test", metrics)
        sanity_checks.warn_implausible_likelihood(
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
        generator = torch.Generator(self.runtime.device).manual_seed(self.run_config["seed"])
        images, _ = self.eval_model().sample(NUM_SAMPLES, self.config.sample_temperature, generator)
        self.model.train()
        self.logger.write_samples(self.state.step, images, self.data.bits)
        self.logger.write_filters(self.state.ema_model.filters())

    def save_checkpoint(self, is_best: bool = False, numbered: bool = False) -> None:
        """Save the state, with the batch statistics that an evaluation of this step uses.

        Args:
            is_best: Save it as `best.pt` too.
            numbered: Save it under the number of its step too.
        """
        self._update_batch_statistics()
        self.model.train()
        if self.group.is_main:
            self.run.save(
                {"config": self.run_config, "mode": self.mode, **self.state.capture()},
                is_best=is_best,
                numbered=numbered,
            )
        self.last_done["save"] = self.state.step
        self.saved_as_finished = self.finished

    def _prepare_model(self, initialize: bool) -> None:
        """Move the model to the device, initialize it from data, and check that a batch fits."""
        config = self.config
        model = self.model
        try:
            set_activation_memory(model, config.activation_memory)
        except ValueError as error:
            raise UserError(
                f"trainer.activation_memory={config.activation_memory}: {error}"
            ) from error
        reset_peak_memory(self.runtime.device)
        self.data.to(self.runtime.device)
        model.to(self.runtime.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if initialize:
            model.initialize(*self.data.train_batch(0, config.init_images, self.run_config["seed"]))
        check_batch_fits(
            model,
            self.data,
            self.runtime,
            config.batch_size,
            config.grad_accum_steps * self._memory_shares,
            config.activation_memory,
        )
        self.group.broadcast_weights(model)

    @property
    def _memory_shares(self) -> int:
        """Number of memories that share a batch: those of GPUs, or those of machines."""
        on_gpu = self.runtime.device.type == "cuda"
        return self.group.size if on_gpu else self.group.num_machines

    def _create_state(self) -> None:
        """Create the optimizer and the EMAs, and give each process its part of the batches."""
        config = self.config
        optimizer = optim.build_optimizer(
            self.model,
            config.optimizer,
            config.lr,
            momentum=config.momentum,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self.state = TrainState(self.model, optimizer, config.optimizer, as_list(config.ema_decay))
        if self.group.size > 1:  # after the EMAs are copied, which evaluate whole batches
            self.batch_indices = self.group.batch_indices(
                config.batch_size, config.grad_accum_steps
            )
            shard_batches(self.model, self.group.rank, self.group.size)

    def _check_settings(self) -> None:
        """Check that the model can be trained with these settings on this machine."""
        config = self.config
        if self.group.size > 1:
            check(
                self.model.shares_batches,
                "this model trains in one process: remove trainer.num_processes and torchrun, "
                "and start one run per device",
            )
            self.group.check_device(self.runtime.device)
            self.group.check_divides(config.batch_size, config.grad_accum_steps)
        bytes_per_image = 5 * math.prod(self.data.image_shape)  # one byte and one float32 per value
        check_memory("trainer.batch_size", config.batch_size, bytes_per_image)
        check_memory("trainer.init_images", config.init_images, bytes_per_image)
        check(
            not (config.compile is True and config.activation_memory == "checkpoint")
            or (self.group.size == 1 and not batch_norm_layers(self.model)),
            "trainer.compile=true with batch normalization or several processes needs "
            "trainer.activation_memory=store: set it, or trainer.compile=false",
        )

    @property
    def mode(self) -> dict[str, Any]:
        """Precision and compilation of the steps. Steps in another mode give other bits."""
        precision = str(self.runtime.dtype).removeprefix("torch.")
        return {"precision": precision, "compiled": self.compiled}

    def _choose_compilation(self, checkpoint: dict[str, Any] | None) -> None:
        """Compile the model if it is asked for or if it pays, and report a change of the mode.

        Args:
            checkpoint: Checkpoint to resume from, or None. If it has steps but no mode, the run was
                eager.
        """
        config = self.config
        previous = checkpoint.get("mode", {}) if checkpoint else {}
        before = previous.get("compiled", False if self.state.step else None)
        if config.compile == "auto":
            is_long = (config.minutes or 0) >= MIN_COMPILED_MINUTES
            wanted = (
                (is_long if before is None else before)
                and self.runtime.device.type == "cpu"
                and self.group.size == 1
                and config.activation_memory == "store"
            )
        else:
            wanted = bool(config.compile)
        self.compiled = wanted and compile_model(
            self.model,
            self._compute_gradients,
            # CUDA graphs reduce launch overhead, but overwrite accumulated gradients.
            mode="reduce-overhead" if config.grad_accum_steps == 1 else "default",
            required=config.compile is True,
            min_speedup=MIN_SPEEDUP if config.compile == "auto" and before is None else 0.0,
        )
        if previous and before is not None and previous != self.mode:
            log.warning(
                "precision or compilation changed, so the results differ slightly from those "
                "without an interruption: %s before, %s now",
                *map(describe_mode, (previous, self.mode)),
            )

    def _compute_gradients(self) -> None:
        """Run the forward and backward passes of the next step, without an update."""
        for images, labels in self.micro_batches():
            self.compute_loss(self.model, images, labels).backward()


def describe_mode(mode: dict[str, Any]) -> str:
    """Return a mode as text, as in "bfloat16, compiled"."""
    return f"{mode['precision']}, {'compiled' if mode['compiled'] else 'eager'}"
