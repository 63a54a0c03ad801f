"""What a training computes on."""

import torch

from flowgen.bijections import MEMORY
from flowgen.errors import FlowgenError, check_choice
from flowgen.training.device import autocast_dtype, choose_device, seed_step
from flowgen.training.threads import use_threads


class Machine:
    """A device, how many threads feed it, the number format of the networks inside couplings, and whether the model is compiled for it.

    Raises FlowgenError for what this machine has not.
    """

    def __init__(self, *, device: str, threads: int | str, precision: str, compile: bool, memory: str):
        check_choice((True, False), compile=compile)
        check_choice(MEMORY, memory=memory)
        if compile and memory == "invert":
            raise FlowgenError("memory=invert cannot be compiled: set trainer.compile=false, or trainer.memory=checkpoint")
        self.memory = memory
        self.device, self.threads, self.compile = choose_device(device), use_threads(threads), compile
        self.dtype = autocast_dtype(precision, self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def seed(self, seed: int, step: int) -> None:
        """Make all that `step` draws here a function of it and of `seed`."""
        seed_step(self.device, seed, step)
