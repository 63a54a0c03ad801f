"""All that a run is at one moment, captured into a checkpoint and restored from it."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from flowgen.bijections.batchnorm import update_bn
from flowgen.bijections.networks import batch_norm_layers
from flowgen.models.base import GenerativeModel
from flowgen.training.nan_recovery import NaNRecovery
from flowgen.training.optim import OptimConfig, decays
from flowgen.utils.errors import UserError

MOMENTS = {
    "adam": {"step", "exp_avg", "exp_avg_sq"},
    "sgd": {"momentum_buffer"},
}  # of every parameter
Tensors = tuple[Tensor, ...] | list[Tensor]


class TrainState:
    """The model, its averages, its optimiser, and how far they are; beside it what never goes back: time, the best figure, failures."""

    def __init__(self, model: GenerativeModel, optimisation: OptimConfig):
        self.model, self.optimizer, self.kind = (
            model,
            optimisation.build(model),
            optimisation.optimizer,
        )
        # Statistics of batch normalisation are estimated on a copy, so that a look at the model leaves its training alone.
        wanted = any(optimisation.ema_decays) or batch_norm_layers(model)
        self.decays = optimisation.ema_decays if wanted else []
        self.averages = [
            AveragedModel(model, multi_avg_fn=_warm_average(decay)) for decay in self.decays
        ]
        self.chosen = 0  # of the averages: the best at the last look at the validation images
        self.estimated_at: tuple[int, int] | None = None
        self.step = self.images_seen = 0
        self.seconds, self.best, self.nan_recovery = 0.0, math.inf, NaNRecovery()
        self.evals_since_best = 0  # evaluations since the best one

    @property
    def ema_model(self) -> GenerativeModel:
        """The model to judge and to sample from."""
        model = self.averages[self.chosen].module if self.averages else self.model
        assert isinstance(model, GenerativeModel)
        return model

    def update(self, rate: float) -> None:
        """One step of the optimiser at this learning rate, and of the averages."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        for average in self.averages:
            average.update_parameters(self.model)

    def estimate(self, batches: Iterable[tuple[Any, ...]]) -> None:
        """Give the chosen average batch statistics of its own, once a step."""
        at = self.step, self.chosen
        if self.averages and self.estimated_at != at:
            update_bn(self.ema_model, batches)
            self.estimated_at = at

    def capture(self) -> dict[str, Any]:
        """Of several averages the chosen one is there twice, and written once."""
        averages = [average.state_dict() for average in self.averages]
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "model": self.model.state_dict(),
            "ema": averages[self.chosen] if averages else None,
            "emas": averages if len(averages) > 1 else [],
            "optimizer": self.optimizer.state_dict(),
            "progress": {
                "best": self.best,
                "seconds": self.seconds,
                "evals_since_best": self.evals_since_best,
                "best_ema": self.chosen,
            },
            "metric": self.model.metric.name,
            "nan_recovery": dataclasses.asdict(self.nan_recovery),
        }

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Take up a run where its checkpoint left it. Raises FlowgenError where that is of another model."""
        self.rollback(checkpoint)
        metrics = checkpoint["progress"]
        self.seconds = metrics["seconds"]
        if (
            checkpoint.get("metric", self.model.metric.name) == self.model.metric.name
        ):  # with other noise it may be another figure
            self.best, self.evals_since_best = metrics["best"], metrics.get("evals_since_best", 0)
        self.nan_recovery = NaNRecovery(**checkpoint["nan_recovery"])

    def rollback(self, checkpoint: dict[str, Any]) -> None:
        """Take up its weights, the optimiser's moments and the place in the data; the optimiser's settings stay those of today."""
        settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.chosen = self._load_averages(checkpoint)
            if (
                self.kind == checkpoint["config"]["trainer"]["optimizer"]
            ):  # moments of another kind would be of no use
                self.optimizer.load_state_dict(checkpoint["optimizer"])
                self._check_moments()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                "the checkpoint is of another model than its configuration says: name another one"
            ) from error
        for group, its_settings in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(its_settings)
        self.step, self.images_seen = checkpoint["step"], checkpoint["images_seen"]
        self.estimated_at = None

    def _load_averages(self, checkpoint: dict[str, Any]) -> int:
        """Which was chosen; where they remembered otherwise, all go on from that one."""
        kept = checkpoint.get("emas") or [checkpoint["ema"]]
        alike = decays(checkpoint["config"]["trainer"]["ema_decay"]) == self.decays
        for average, state in zip(
            self.averages, kept if alike else [checkpoint["ema"]] * len(self.averages), strict=True
        ):
            if state is not None:
                average.load_state_dict(state)
        return checkpoint["progress"].get("best_ema", 0) if alike else 0

    def _check_moments(self) -> None:
        """Raise ValueError where the optimiser could not take its next step with them."""
        known = MOMENTS[self.kind]
        for parameter, moments in self.optimizer.state.items():
            if moments.keys() != known:
                raise ValueError("other moments")
            for name, value in moments.items():
                shape = () if name == "step" else parameter.shape
                if value is not None and (not isinstance(value, Tensor) or value.shape != shape):
                    raise ValueError(f"{name} is of another shape")


def _warm_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """An exponential moving average whose memory grows with the run: decay_n = min(decay, (1 + n) / (10 + n))."""

    @torch.no_grad()
    def update(averages: Tensors, currents: Tensors, count: Tensor | int) -> None:
        number = int(count)
        torch._foreach_lerp_(averages, currents, 1 - min(decay, (1 + number) / (10 + number)))

    return update
