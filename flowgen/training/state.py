"""All that a run is at one moment, captured into a checkpoint and restored from it."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from flowgen.bijections import batch_normalisations, estimate_statistics
from flowgen.errors import FlowgenError
from flowgen.models import GenerativeModel

Tensors = tuple[Tensor, ...] | list[Tensor]

COUNTERS = ("best", "seconds", "failed", "skipped", "rewinds", "failed_at", "rewound_to", "lr_scale")


class State:
    """The model, its average, its optimiser, and the counters of a run."""

    def __init__(self, model: GenerativeModel, optimizer: torch.optim.Optimizer, ema: float, config: dict[str, Any]):
        self.model, self.optimizer, self.config = model, optimizer, config
        # Statistics of batch normalisation are estimated on a copy, so that a look at the model leaves its training alone.
        self.average = AveragedModel(model, multi_avg_fn=_warm_average(ema)) if ema or batch_normalisations(model) else None
        self.estimated_at = -1
        self.step = self.images_seen = 0
        self.failed = self.skipped = self.rewinds = 0  # steps in a row; steps in all; returns since the last that helped
        self.failed_at = self.rewound_to = -1
        self.seconds = 0.0
        self.lr_scale = 1.0
        self.best = math.inf

    @property
    def averaged(self) -> GenerativeModel:
        """The model to judge and to sample from."""
        model = self.average.module if self.average is not None else self.model
        assert isinstance(model, GenerativeModel)
        return model

    def update(self, rate: float) -> None:
        """One step of the optimiser at this learning rate, and of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def estimate(self, batches: Iterable[tuple[Any, ...]]) -> None:
        """Give the averaged weights batch statistics of their own, once a step."""
        if self.average is not None and self.estimated_at != self.step:
            estimate_statistics(self.averaged, batches)
            self.estimated_at = self.step

    def capture(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {
            "config": self.config,
            "step": self.step,
            "images_seen": self.images_seen,
            "model": self.model.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "metrics": {name: getattr(self, name) for name in COUNTERS},
        }

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Raises FlowgenError where the checkpoint is of another model."""
        try:
            self.model.load_state_dict(checkpoint["model"])
            if self.average is not None and checkpoint["ema"] is not None:
                self.average.load_state_dict(checkpoint["ema"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise FlowgenError("the checkpoint is of another model than its configuration says: name another one") from error
        torch.set_rng_state(checkpoint["random"]["cpu"])
        if torch.cuda.is_available() and len(checkpoint["random"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(checkpoint["random"]["cuda"])
        self.step, self.images_seen = checkpoint["step"], checkpoint["images_seen"]
        for name in COUNTERS:
            setattr(self, name, checkpoint["metrics"][name])


def _warm_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """An exponential moving average whose memory grows with the run: decay_n = min(decay, (1 + n) / (10 + n))."""

    @torch.no_grad()
    def update(averages: Tensors, currents: Tensors, count: Tensor | int) -> None:
        number = int(count)
        torch._foreach_lerp_(averages, currents, 1 - min(decay, (1 + number) / (10 + number)))

    return update
