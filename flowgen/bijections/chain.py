"""How bijections compose."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from flowgen.bijections.base import Bijection
from flowgen.bijections.continuous import CNF
from flowgen.bijections.reversible import ACTIVATION_MEMORY, Forward, checkpointed, reversible
from flowgen.utils.errors import UserError, check_choice


class Chain(Bijection):
    """Bijections one after the other; the log-dets add up. `memory` says how the backward pass comes by what it needs, see `memory`."""

    memory = "store"

    def __init__(self, *bijections: Bijection):
        super().__init__()
        self.inversion_errors: list[Tensor] = []  # of what the backward passes recovered
        self.bijections = nn.ModuleList(bijections)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        keep = (
            self.memory == "store"
            or not torch.is_grad_enabled()
            or (condition is not None and condition.requires_grad)
        )
        for step in self.bijections if keep else self._sparing():
            x, change = step(x, condition)
            log_det = log_det + change
        return x, log_det

    def _sparing(self) -> Iterator[Forward]:
        """The bijections in steps that keep little for the backward pass; one that holds another chain leaves that to it."""
        each: Any = self.bijections
        for sparing, group in groupby(each, self._spares):
            bijections = [*group]
            if not sparing:
                yield from bijections
            elif self.memory == "checkpoint":
                yield from map(checkpointed, bijections)
            else:
                yield from reversible(bijections, self.inversion_errors)

    def _spares(self, bijection: Bijection) -> bool:
        return not _holds_chain(bijection) and (
            self.memory == "checkpoint" or bijection.supports_reversible
        )

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = z.new_zeros(len(z))
        for bijection in reversed(self.bijections):
            z, change = bijection.inverse(z, condition)  # type: ignore[operator]
            log_det = log_det + change
        return z, log_det

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        for bijection in self.bijections:
            x = bijection.initialize(x, condition)  # type: ignore[operator]
        return x


def _holds_chain(bijection: nn.Module) -> bool:
    return any(isinstance(module, Chain) for module in bijection.modules())


def supports_checkpointing(model: nn.Module) -> bool:
    """Whether it is made of bijections that can be computed again one by one; a continuous one is trained as a whole."""
    modules = list(model.modules())
    return any(isinstance(module, Chain) for module in modules) and not any(
        isinstance(module, CNF) for module in modules
    )


def set_activation_memory(model: nn.Module, memory: str) -> None:
    """Let every chain of `model` `keep`, `checkpoint` or `invert` for its backward pass.

    Raises FlowgenError for a model that cannot be recomputed, or has parameters in bijections that cannot be recovered.
    """
    check_choice(ACTIVATION_MEMORY, memory=memory)
    chains = [module for module in model.modules() if isinstance(module, Chain)]
    if memory != "store" and not supports_checkpointing(model):
        raise UserError(
            f"this model keeps nothing that could be computed again: leave trainer.activation_memory={memory} out"
        )
    for bijection in (
        bijection for chain in chains for bijection in chain.bijections if memory == "reversible"
    ):
        if not (_holds_chain(bijection) or bijection.supports_reversible) and any(
            True for _ in bijection.parameters()
        ):
            raise UserError(
                f"trainer.activation_memory=reversible cannot recover what entered this model's {type(bijection).__name__}: set trainer.activation_memory=checkpoint"
            )
    for chain in chains:
        chain.memory = memory


def inversion_error(model: nn.Module) -> float | None:
    """The largest error of what was recovered since the last call, relative to the largest number; None where nothing was."""
    chains = [module for module in model.modules() if isinstance(module, Chain)]
    errors = [error for chain in chains for error in chain.inversion_errors]
    for chain in chains:
        chain.inversion_errors.clear()
    return torch.stack(errors).max().item() if errors else None
