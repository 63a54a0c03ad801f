"""How to train, for every model."""

import logging
import math
import time
from dataclasses import fields
from typing import Any

import torch

from flowgen.bijections import batch_normalisations, save_memory
from flowgen.costs import check_fits
from flowgen.data import Images
from flowgen.errors import FlowgenError
from flowgen.models import GenerativeModel
from flowgen.training.cadence import Cadence
from flowgen.training.device import reset_peak_memory
from flowgen.training.footprint import check_batch_fits
from flowgen.training.loop import Training
from flowgen.training.machine import Machine
from flowgen.training.optimisation import Optimisation
from flowgen.training.run import Run
from flowgen.training.state import State
from flowgen.training.team import ALONE, Team

log = logging.getLogger("flowgen")


class Trainer:
    """How to train, on what machine; `conf/trainer/` explains the settings, which are those of `Cadence` and `Optimisation`, in one list.

    Raises FlowgenError for settings that make no sense.
    """

    def __init__(self, *, device: str, threads: int | str, precision: str, compile: bool, memory: str, **settings: Any):
        of_cadence = {field.name for field in fields(Cadence)}
        self.cadence = Cadence(**{name: value for name, value in settings.items() if name in of_cadence})
        self.optimisation = Optimisation(**{name: value for name, value in settings.items() if name not in of_cadence})
        self.machine = Machine(device=device, threads=threads, precision=precision, compile=compile, memory=memory)

    def train(
        self,
        model: GenerativeModel,
        data: Images,
        run: Run,
        config: dict[str, Any],
        checkpoint: dict[str, Any] | None,
        trained: bool = False,
        team: Team = ALONE,
    ) -> int | None:
        """Train to the end, from the start or from `checkpoint`; a signal that asked to stop is returned once the run is saved.

        Every process of the `team` is to call this, and ends when the run is saved.

        A model that is `trained` already keeps its weights at the start; any other looks at some images first.
        Raises FlowgenError where a batch does not fit into memory, and where losses stay non-finite after several returns to the last
        good checkpoint.
        """
        if team.size > 1 and not model.shares_batches:
            raise FlowgenError("this model trains in one process alone: leave trainer.devices and torchrun out, and give each device a run")
        team.check_device(self.machine.device)
        team.check_divides(self.optimisation.batch_size, self.optimisation.accumulate)
        for name in ("batch_size", "initial_images"):
            check_fits(f"trainer.{name}", getattr(self.optimisation, name), 5 * math.prod(data.shape))  # a byte and a float32 a number
        if self.machine.compile and self.machine.memory == "checkpoint" and (team.size > 1 or batch_normalisations(model)):
            raise FlowgenError(
                "batch normalisation and several processes are compiled with trainer.memory=keep alone: leave out one or the other"
            )
        save_memory(model, self.machine.memory)
        reset_peak_memory(self.machine.device)
        data.to(self.machine.device)
        model.to(self.machine.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if checkpoint is None and not trained:
            model.initialize(*data.draw(0, self.optimisation.initial_images, config["seed"]))
        check_batch_fits(model, data, self.machine, self.optimisation.batch_size, self.optimisation.accumulate * team.size)
        team.same_weights(model)
        state = State(model, self.optimisation)
        if checkpoint is not None:
            state.restore(checkpoint)
            run.forget_after(state.step)
        if self.machine.compile:  # CUDA graphs spare a GPU its thousand launches a step, but overwrite gradients that accumulate
            model.compile(mode="reduce-overhead" if self.optimisation.accumulate == 1 else "default")
        training = Training(self.cadence, self.optimisation, self.machine, state, data, run, config, team)
        if checkpoint is None:
            training.save()
        if self.machine.compile:
            warm_up(training)
        stopped = training.loop()
        team.ask(lambda: None)  # a launcher would end the one that saves when another has ended
        return stopped


def warm_up(training: Training) -> None:
    """Compile on the first batch, and say how long it took; nothing is learnt."""
    log.info("compiling the model, which may take minutes")
    began, model = time.monotonic(), training.state.model
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # statistics of batches, and chains
    for loss in training.losses(model):
        loss.backward()
    model.zero_grad()
    for buffer, before in buffers:
        buffer.copy_(before)
    log.info("compiled in %.0f s", time.monotonic() - began)
