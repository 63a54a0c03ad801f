"""The training loop, one for every model."""

import logging
import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from flowgen.data import Images
from flowgen.errors import FlowgenError, check_choice, check_number, check_whole
from flowgen.models import GenerativeModel
from flowgen.training.device import autocast_dtype, choose_device, peak_memory, seed_step
from flowgen.training.journal import Journal
from flowgen.training.rescue import are_finite, first_bad_module
from flowgen.training.run import Run
from flowgen.training.schedule import learning_rate_factor, warmup_steps
from flowgen.training.state import State
from flowgen.training.stop import StopRequest
from flowgen.training.threads import use_threads

SHORTEST = 0.001  # minutes
PATIENCE = 5  # steps in a row that may fail before training goes back
REWINDS = 3  # times that training goes back before it gives up
STATISTICS = 40  # batches of training images that the statistics of batch normalisation are estimated over
HELPED = 1000  # steps past a failure after which a return has helped
log = logging.getLogger("flowgen")


class Trainer:
    """Adam, or descent with momentum: linear warm-up, clipped gradients, averaged weights; `conf/trainer/` explains the arguments."""

    def __init__(
        self,
        *,
        steps: int | None,
        minutes: float | None,
        batch_size: int,
        accumulate: int,
        optimizer: str,
        momentum: float,
        lr: float,
        warmup: int | str,
        decay: float,
        clip: float,
        ema: float,
        initial_images: int,
        device: str,
        threads: int | str,
        precision: str,
        compile: bool,
        log_every: int,
        evaluate_every: int,
        evaluate_images: int | None,
        sample_every: int,
        sample_temperature: float,
        save_every: int,
        keep_every: int,
        keep_at: list[int],
    ):
        if steps is None and minutes is None:
            raise FlowgenError("training has no end: set trainer.steps or trainer.minutes")
        check_whole(batch_size=batch_size, accumulate=accumulate, initial_images=initial_images, log_every=log_every)
        check_whole(evaluate_every=evaluate_every, sample_every=sample_every, save_every=save_every, keep_every=keep_every)
        check_whole(**{name: value for name, value in {"steps": steps, "evaluate_images": evaluate_images}.items() if value is not None})
        check_number(lr=lr, decay=decay, clip=clip, ema=ema, sample_temperature=sample_temperature)
        if minutes is not None:
            check_number(SHORTEST, minutes=minutes)
        check_choice((True, False), compile=compile)
        if not isinstance(keep_at, list):
            raise FlowgenError(f"keep_at must be a list of steps, as in trainer.keep_at=[1000,5000], not {keep_at!r}")
        for step in keep_at:
            check_whole(keep_at=step)
        check_choice(("adam", "sgd"), optimizer=optimizer)
        check_number(momentum=momentum)
        if decay > 1 or ema >= 1 or momentum >= 1:
            raise FlowgenError(f"decay must be at most 1, ema and momentum below 1, not {decay}, {ema} and {momentum}")
        if batch_size % accumulate:
            raise FlowgenError(f"batch_size={batch_size} cannot be split into accumulate={accumulate} equal parts")
        warmup_steps(warmup, 1, 1)
        self.steps, self.minutes = steps, minutes
        self.batch_size, self.accumulate = batch_size, accumulate
        self.optimizer, self.momentum = optimizer, momentum
        self.lr, self.warmup, self.decay, self.clip, self.ema = lr, warmup, decay, clip, ema
        self.initial_images = initial_images
        self.device, self.precision, self.compile = choose_device(device), precision, compile
        self.threads = use_threads(threads)
        self.autocast_dtype = autocast_dtype(precision, self.device)
        self.log_every, self.evaluate_every, self.evaluate_images = log_every, evaluate_every, evaluate_images
        self.sample_every, self.sample_temperature = sample_every, sample_temperature
        self.save_every, self.keep_every, self.keep_at = save_every, keep_every, keep_at

    def train(
        self, model: GenerativeModel, data: Images, run: Run, config: dict, seed: int, checkpoint: dict | None, trained: bool = False
    ) -> int | None:
        """Train to the end, from the start or from `checkpoint`; a signal that asked to stop is returned once the run is saved.

        A model that is `trained` already keeps its weights at the start; any other looks at some images first.
        Raises FlowgenError where losses stay non-finite after `REWINDS` returns to the last good checkpoint.
        """
        data.to(self.device)
        model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if checkpoint is None and not trained:
            model.initialize(*data.draw(0, self.initial_images, seed))
        state = State(model, self._optimizer(model), self.ema, config)
        if checkpoint is None:
            run.save(self._capture(state, data, seed))
        else:
            state.restore(checkpoint)
            run.forget_after(state.step)
        if self.compile:  # CUDA graphs spare a GPU its thousand launches a step, but overwrite gradients that accumulate
            model.compile(mode="reduce-overhead" if self.accumulate == 1 else "default")

        warmup = warmup_steps(self.warmup, len(data.train), self.batch_size)
        busy, logged, saved = 0.0, state.step, state.step
        clock = time.monotonic() - state.seconds
        with StopRequest() as stop, self._journal(run, state) as journal:
            while self._progress(state) < 1 and stop.signal is None:
                began = time.monotonic()
                rate = self.lr * state.lr_scale * learning_rate_factor(state.step, self._progress(state), warmup, self.decay)
                seed_step(self.device, seed, state.step)
                levels, labels = data.draw(state.images_seen, self.batch_size, seed)
                loss, grad_norm = self._gradients(model, levels, labels)
                state.step, state.images_seen = state.step + 1, state.images_seen + self.batch_size
                if math.isfinite(loss) and math.isfinite(grad_norm):
                    state.update(rate)
                    state.failed = 0
                else:
                    state.failed, state.skipped = state.failed + 1, state.skipped + 1
                    if state.failed == PATIENCE or not are_finite(model.buffers()):
                        self._rewind(state, run, levels)
                        busy, logged = 0.0, state.step
                        continue
                busy += time.monotonic() - began
                state.seconds = time.monotonic() - clock
                journal.advance(state.step if self.steps else state.seconds)

                if self._due(self.log_every, state):
                    speed = (state.step - logged) * self.batch_size / busy
                    row = {"loss": loss, "lr": rate, "grad_norm": grad_norm, "images_per_second": speed, "skipped": state.skipped}
                    used = {"seconds": state.seconds, "memory_gib": peak_memory(self.device)}
                    journal.write(state.step, "train", row | model.health() | used)
                    busy, logged = 0.0, state.step
                best = self._due(self.evaluate_every, state) and self._evaluate(state, data, journal, seed)
                if self._due(self.sample_every, state):
                    self._sample(state, data, journal, seed)
                keep = state.step % self.keep_every == 0 or state.step in self.keep_at
                if best or keep or (self._due(self.save_every, state) and not state.failed):
                    run.save(self._capture(state, data, seed), best=best, keep=keep)
                    saved = state.step
            if saved != state.step:
                run.save(self._capture(state, data, seed))
            journal.curves()
        return stop.signal

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum, fused=True)
        return torch.optim.Adam(model.parameters(), lr=self.lr, fused=True)

    def _journal(self, run: Run, state: State) -> Journal:
        if self.steps:
            return Journal(run, state.step, state.step, self.steps, "step", state.model)
        return Journal(run, state.step, state.seconds, 60 * (self.minutes or 0.0), "s", state.model)

    def _gradients(self, model: nn.Module, levels: Tensor, labels: Tensor | None) -> tuple[float, float]:
        """Fill the clipped gradients of one batch; its loss and the gradients' norm before clipping."""
        model.zero_grad()
        losses = []
        parts = levels.chunk(self.accumulate)
        labels_of = [None] * len(parts) if labels is None else labels.chunk(self.accumulate)
        for part, its_labels in zip(parts, labels_of, strict=True):
            with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype != torch.float32):
                loss = model(part, its_labels) / self.accumulate
            loss.backward()
            losses.append(loss.detach())
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        total_norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        loss, norm = torch.stack([torch.stack(losses).sum(), total_norm]).tolist()  # one wait for the device, not two
        if self.clip and math.isfinite(norm):  # by what is not finite every gradient would become so, the culprit's among them
            nn.utils.clip_grads_with_norm_(parameters, self.clip, total_norm)
        return loss, norm

    def _progress(self, state: State) -> float:
        """The share of the training that is done, by whichever of steps and minutes ends it first."""
        by_steps = state.step / self.steps if self.steps else 0.0
        by_time = state.seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(by_steps, by_time)

    def _due(self, every: int, state: State) -> bool:
        return state.step % every == 0 or self._progress(state) >= 1

    def _judged(self, state: State, data: Images, seed: int) -> GenerativeModel:
        """The averaged model in evaluation mode, its batch statistics a function of `seed` and the state alone."""
        seed_step(self.device, seed, state.step)
        size = self.batch_size // self.accumulate
        state.estimate(data.draw(state.images_seen + size * number, size, seed) for number in range(STATISTICS))
        return state.averaged.eval()

    def _capture(self, state: State, data: Images, seed: int) -> dict[str, Any]:
        """What a checkpoint holds: the averaged model is the one that is judged."""
        self._judged(state, data, seed)
        state.model.train()
        return state.capture()

    def _evaluate(self, state: State, data: Images, journal: Journal, seed: int) -> bool:
        """Write the validation figures of the averaged model, at the end the test figures too; whether the former are the best so far."""
        model = self._judged(state, data, seed)
        judged = {}
        for split in ("validation", "test") if self._progress(state) >= 1 else ("validation",):
            held_out, train = (data.batches(name, self.batch_size, self.evaluate_images) for name in (split, "train"))
            judged[split] = model.evaluate(held_out, train)
            journal.write(state.step, split, judged[split])
        figures = judged["validation"]
        state.model.train()
        journal.curves()
        worth = -figures[model.figure] if model.higher_is_better else figures[model.figure]
        is_best = worth < state.best
        state.best = worth if is_best else state.best
        return is_best

    def _sample(self, state: State, data: Images, journal: Journal, seed: int) -> None:
        generator = torch.Generator(self.device).manual_seed(seed)  # the same latents at every look
        levels, _ = self._judged(state, data, seed).sample(32, self.sample_temperature, generator)
        state.model.train()
        journal.samples(state.step, levels, data.bits)
        journal.features(state.averaged.features())

    def _rewind(self, state: State, run: Run, levels: Tensor) -> None:
        """Back to the last good checkpoint with half the learning rate."""
        culprit = first_bad_module(state.model, levels)
        if state.rewinds == REWINDS and state.step <= state.failed_at + HELPED:
            raise FlowgenError(
                f"the loss is not finite, first at {culprit}, and {REWINDS} returns with half the learning rate each did not help: "
                f"train again with trainer.lr below {self.lr * state.lr_scale:.2g}, or a smaller trainer.clip"
            )
        failed_at = state.step
        rewinds = state.rewinds + 1 if failed_at <= state.failed_at + HELPED else 1
        kept = {"failed_at": failed_at, "rewinds": rewinds, "skipped": state.skipped, "seconds": state.seconds, "best": state.best}
        lr_scale = state.lr_scale / 2
        checkpoint = run.last_good(before=state.rewound_to if rewinds > 1 else math.inf)
        assert checkpoint is not None  # one is written before the first step
        state.restore(checkpoint)
        run.forget_after(state.step)
        for name, value in kept.items():
            setattr(state, name, value)
        state.failed, state.lr_scale, state.rewound_to = 0, lr_scale, state.step
        what = "step %d: the loss is not finite, first at %s: back to step %d with a learning rate of %.2g"
        log.warning(what, failed_at, culprit, state.step, self.lr * state.lr_scale)
