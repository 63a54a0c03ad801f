"""The training loop, and all that it works on."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowgen.data import Images
from flowgen.measures import Judgement, Measured, Metric
from flowgen.shares import split
from flowgen.training.cadence import Cadence
from flowgen.training.device import peak_memory
from flowgen.training.doubts import doubt_recovery
from flowgen.training.journal import Journal, NoJournal
from flowgen.training.look import Look
from flowgen.training.machine import Machine
from flowgen.training.optimisation import Optimisation, gradient_norm
from flowgen.training.rescue import first_bad_module
from flowgen.training.run import Run
from flowgen.training.state import State
from flowgen.training.stop import StopRequest
from flowgen.training.team import Team


class Training:
    """One training of one model."""

    def __init__(
        self,
        cadence: Cadence,
        optimisation: Optimisation,
        machine: Machine,
        state: State,
        data: Images,
        run: Run,
        config: dict[str, Any],
        team: Team,
    ):
        self.team, self.rows = team, team.rows(optimisation.batch_size, optimisation.accumulate) if team.size > 1 else None
        self.cadence, self.optimisation, self.machine = cadence, optimisation, machine
        self.state, self.data, self.run, self.config, self.seed = state, data, run, config, config["seed"]
        self.done = {"save": state.step}  # the step at which each thing was last done
        self.busy, self.logged = 0.0, state.step  # seconds of computing since this step
        in_steps = self.cadence.steps is not None
        at, total, unit = (state.step, self.cadence.steps, "step") if in_steps else (state.seconds, 60 * (self.cadence.minutes or 0.0), "s")
        self.journal = Journal(run, state.model, state.step, at, total or 0, unit) if team.leads else NoJournal()
        self.look = Look(cadence, optimisation, machine, state, data, self.journal, self.seed)

    def loop(self) -> int | None:
        """Step after step to the end, or to a signal, which is returned."""
        state, row = self.state, {}
        started, stopped = time.monotonic() - state.seconds, None
        with StopRequest() as stop, self.journal:
            while not self.over and stopped is None:
                began = time.monotonic()
                row = self.step()
                if state.rescue.note(is_good(row), state.model.buffers()):
                    self.go_back()
                    row = {}
                    continue
                state.step, state.images_seen = state.step + 1, state.images_seen + self.optimisation.batch_size
                self.busy += time.monotonic() - began
                state.seconds, _ = self.team.agree(time.monotonic() - started, None)
                self.report(row)
                state.seconds, stopped = self.team.agree(time.monotonic() - started, stop.signal)
            if self.over and row:
                self.report(row)  # what the last step has not been followed by yet
            if self.done["save"] != state.step:
                self.save()
            self.journal.curves()
        return stopped

    def step(self) -> dict[str, float]:
        """Fill the gradients of one batch, and move the weights where all is finite."""
        state = self.state
        rate = state.rescue.lr_scale * self.optimisation.rate(state.step, self.progress, len(self.data.train))
        state.model.zero_grad()
        losses = []
        for loss in self.losses(state.model):
            loss.backward()
            losses.append(loss.detach())
        mean = self.team.average(state.model, torch.stack(losses).sum())
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
        parts = self.optimisation.parts(*self.data.next(self.state.images_seen, self.optimisation.batch_size, self.seed, self.rows))
        for levels, labels in parts:
            with self.machine.autocast(), split(self.team):
                loss = model(levels, labels) / len(parts)
            yield loss

    def go_back(self) -> None:
        """To a good checkpoint, which the data and the random numbers follow; what was not compiled calls the hooks of the diagnosis."""
        state = self.state
        culprit = first_bad_module(state.model, lambda: list(self.losses(state.model.forward)))
        last_good = partial(self.team.ask, self.run.last_good)
        state.go_back(state.rescue.rewind(last_good, state.step + 1, culprit, self.optimisation.lr))
        self.run.forget_after(state.step)
        self.busy, self.logged = 0.0, state.step

    @property
    def progress(self) -> float:
        return self.cadence.progress(self.state.step, self.state.seconds)

    @property
    def over(self) -> bool:
        patience = self.cadence.patience
        return self.progress >= 1 or (patience is not None and self.state.without_gain >= patience)

    def due(self, what: str) -> bool:
        """Whether to do this after this step: at its time, or at the end, but once."""
        due = (self.over or self.cadence.due(what, self.state.step)) and self.done.get(what) != self.state.step
        if due:
            self.done[what] = self.state.step
        return due

    def report(self, row: dict[str, float]) -> None:
        """Log, judge, sample and save, each at its time."""
        state = self.state
        self.journal.advance(state.step if self.cadence.steps is not None else state.seconds)
        if self.due("log"):
            self.log(row)
        best = self.due("evaluate") and self.look.validate()
        if self.due("test"):
            self.look.test()
        if self.done.get("evaluate") == state.step and not self.over:  # then they are drawn once, at the end
            self.journal.curves()
        if self.due("sample"):
            self.look.sample()
        keep = self.cadence.keeps(state.step)
        if best or (keep and self.done["save"] != state.step) or (not state.rescue.failed and self.due("save")):
            self.save(best, keep)

    def log(self, row: dict[str, float]) -> None:
        state = self.state
        speed = (state.step - self.logged) * self.optimisation.batch_size / self.busy
        row = row | {"images_per_second": speed, "skipped": state.rescue.skipped} | doubt_recovery(state.model.health())
        measured = [Measured(Metric(name), value) for name, value in row.items()]
        if state.model.loss_metric is not None:
            measured.insert(0, Measured(state.model.loss_metric, row["loss"]))
        facts = {"seconds": state.seconds, "memory_gib": peak_memory(self.machine.device)}
        self.journal.write(state.step, "train", Judgement.of(*measured, **facts))
        self.busy, self.logged = 0.0, state.step

    def save(self, best: bool = False, keep: bool = False) -> None:
        """What was judged is what the checkpoint holds."""
        self.look.judged()
        self.state.model.train()
        self.run.save({"config": self.config, **self.state.capture()}, best=best, keep=keep)
        self.done["save"] = self.state.step


def is_good(row: dict[str, float]) -> bool:
    return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
