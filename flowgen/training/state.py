"""Training state: everything that a checkpoint stores and a resumed run restores."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch.optim.swa_utils import AveragedModel

from flowgen.bijections.linear import update_bn
from flowgen.bijections.networks import batch_norm_layers
from flowgen.models.base import GenerativeModel
from flowgen.training.nan_recovery import NaNRecovery
from flowgen.utils import as_list
from flowgen.utils.errors import UserError

OPTIMIZER_STATE = {  # tensors that each optimizer stores per parameter
    "adam": {"step", "exp_avg", "exp_avg_sq"},
    "sgd": {"momentum_buffer"},
}


class TrainState:
    """Model, EMAs, optimizer and progress of one training run.

    Attributes:
        emas: One averaged copy of the model per decay; empty if there is nothing to average.
        best_ema: Index of the EMA that was best at the last validation.
        step: Optimizer steps taken.
        images_seen: Training images consumed, which fixes the position in the data.
        seconds: Training time, including earlier parts of a resumed run.
        best_cost: Lowest cost (`Metric.cost`) at a validation so far.
        evals_since_best: Validations since that one.
    """

    def __init__(
        self,
        model: GenerativeModel,
        optimizer: torch.optim.Optimizer,
        optimizer_name: str,
        decays: Sequence[float],
    ):
        self.model = model
        self.optimizer = optimizer
        self.optimizer_name = optimizer_name
        # Batch norm needs a copy even without an average: its evaluation statistics are estimated
        # there, so that an evaluation does not change the training model.
        self.ema_decays = list(decays) if any(decays) or batch_norm_layers(model) else []
        self.emas = [build_ema(model, decay) for decay in self.ema_decays]
        self.best_ema = 0
        self.step = 0
        self.images_seen = 0
        self.seconds = 0.0
        self.best_cost = math.inf
        self.evals_since_best = 0
        self.nan_recovery = NaNRecovery()
        self._bn_updated_at: tuple[int, int] | None = None  # step and EMA

    @property
    def ema_model(self) -> GenerativeModel:
        """The model to evaluate and to sample from: the best EMA, or the model itself."""
        return cast(GenerativeModel, self.emas[self.best_ema].module if self.emas else self.model)

    def update_bn(self, batches: Iterable[tuple[Any, ...]]) -> None:
        """Estimate the batch statistics of the best EMA over `batches`, once per step."""
        current = (self.step, self.best_ema)
        if self.emas and self._bn_updated_at != current:
            update_bn(self.ema_model, batches)
            self._bn_updated_at = current

    def capture(self) -> dict[str, Any]:
        """Return the content of a checkpoint.

        The best of several EMAs is in it twice; torch.save writes its tensors once.
        """
        emas = [ema.state_dict() for ema in self.emas]
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "model": self.model.state_dict(),
            "ema": emas[self.best_ema] if emas else None,
            "emas": emas if len(emas) > 1 else [],
            "optimizer": self.optimizer.state_dict(),
            "progress": {
                "best": self.best_cost,
                "seconds": self.seconds,
                "evals_since_best": self.evals_since_best,
                "best_ema": self.best_ema,
            },
            "metric": self.model.metric.name,
            "nan_recovery": dataclasses.asdict(self.nan_recovery),
        }

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Continue exactly where `checkpoint` was saved.

        Raises:
            UserError: If the checkpoint belongs to another model.
        """
        self.restore_step(checkpoint)
        progress = checkpoint["progress"]
        self.seconds = progress["seconds"]
        # With another kind of noise the metric is another one, and its best value means nothing.
        if checkpoint.get("metric", self.model.metric.name) == self.model.metric.name:
            self.best_cost = progress["best"]
            self.evals_since_best = progress.get("evals_since_best", 0)
        self.nan_recovery = NaNRecovery(**checkpoint["nan_recovery"])

    def restore_step(self, checkpoint: dict[str, Any]) -> None:
        """Restore weights, optimizer and step of a checkpoint, but not its time or failures.

        Hyperparameters of the optimizer stay those of the current configuration.
        """
        try:
            self.model.load_state_dict(checkpoint["model"])
            self._load_emas(checkpoint)
            if self.optimizer_name == checkpoint["config"]["trainer"]["optimizer"]:
                current = self.optimizer.state_dict() | {"state": checkpoint["optimizer"]["state"]}
                self.optimizer.load_state_dict(current)
                self._check_optimizer_state()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                "the checkpoint does not fit the model of its own configuration: choose another one"
            ) from error
        self.step = checkpoint["step"]
        self.images_seen = checkpoint["images_seen"]
        self._bn_updated_at = None

    def _load_emas(self, checkpoint: dict[str, Any]) -> None:
        """Load all EMAs; with other decays than before all start from the best one."""
        same_decays = as_list(checkpoint["config"]["trainer"]["ema_decay"]) == self.ema_decays
        self.best_ema = checkpoint["progress"].get("best_ema", 0) if same_decays else 0
        states = checkpoint.get("emas") if same_decays else []
        for ema, state in zip(
            self.emas, states or [checkpoint["ema"]] * len(self.emas), strict=True
        ):
            if state is not None:
                ema.load_state_dict(state)

    def _check_optimizer_state(self) -> None:
        """Raise ValueError if the optimizer cannot take its next step with its loaded state."""
        for parameter, state in self.optimizer.state.items():
            fits = all(
                value is None or value.shape == (() if name == "step" else parameter.shape)
                for name, value in state.items()
            )
            if not fits or state.keys() != OPTIMIZER_STATE[self.optimizer_name]:
                raise ValueError("the optimizer has other tensors")


def build_ema(model: torch.nn.Module, decay: float) -> AveragedModel:
    """Return a copy of a model whose weights are an exponential moving average of the model's.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that early averages forget the
    initial weights.

    Args:
        model: The model.
        decay: Decay of late updates, from 0 to 1.
    """

    @torch.no_grad()
    def update(averages: Any, weights: Any, num_averaged: Any) -> None:
        count = int(num_averaged)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + count) / (10 + count)))

    return AveragedModel(model, multi_avg_fn=update)
