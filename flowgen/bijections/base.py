"""The `Bijection` interface, and bijections made of other bijections."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from flowgen.bijections.reversible import ACTIVATION_MEMORY, Step, checkpointed, reversible


class Bijection(nn.Module, ABC):
    """Base class of invertible maps with a tractable log-determinant.

    Subclasses implement `forward` and `inverse`; those that are initialized from data also
    override `initialize`. Tensors are (batch, dim) or (batch, channels, height, width).

    The optional `condition`, (batch, cond_channels) or (batch, cond_channels, height, width), is
    an extra input of the networks inside, such as a class or another image. Bijections that
    contain others pass it on, and those with a network read it (see `concat_condition`).

    Attributes:
        supports_checkpointing: Whether a chain can recompute the bijection in the backward pass.
        supports_reversible: Whether the inverse is cheap and accurate enough to differentiate at
            its result.
    """

    supports_checkpointing: bool = True
    supports_reversible: bool = False

    @abstractmethod
    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map data to latent: return z and log|det dz/dx|, the latter of shape (batch,)."""

    @abstractmethod
    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map latent to data: return x and log|det dx/dz|, the latter of shape (batch,)."""

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Initialize from one batch of data before training and return the output for it."""
        return self(x, condition)[0]

    def invert_and_recompute(
        self, z: Tensor, condition: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Recover the input of `z`, and run `forward` on it with gradients.

        Returns:
            The leaf tensors whose concatenation along dimension 1 is the input, and the two
            results of `forward`.
        """
        with torch.no_grad():
            x, _ = self.inverse(z, condition)
        x.requires_grad_()
        return (x,), *self(x, condition)


class Chain(Bijection):
    """Bijections applied one after the other: z = f_n(... f_1(x)), log-determinants add up.

    `set_activation_memory` selects how the backward pass obtains the activations.

    Example:
        >>> from flowgen.bijections.linear import ActNorm
        >>> from flowgen.bijections.reshape import Squeeze
        >>> _ = torch.manual_seed(0)
        >>> chain = Chain(Squeeze(), ActNorm(4))
        >>> x = torch.randn(8, 1, 4, 4)
        >>> z = chain.initialize(x)
        >>> z.shape
        torch.Size([8, 4, 2, 2])
        >>> torch.allclose(chain.inverse(z)[0], x, atol=1e-5)
        True
    """

    def __init__(self, *bijections: Bijection):
        super().__init__()
        self.activation_memory = "store"
        self.inversion_errors: list[Tensor] = []  # of the inputs that backward passes recovered
        self.bijections = nn.ModuleList(bijections)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        for step in self._steps(condition):
            x, change = step(x, condition)
            log_det = log_det + change
        return x, log_det

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

    def _steps(self, condition: Tensor | None) -> Iterable[Step]:
        # Memory-saving steps have no gradient for the condition.
        needs_condition_grad = condition is not None and condition.requires_grad
        if self.activation_memory == "store" or not torch.is_grad_enabled() or needs_condition_grad:
            return self.bijections
        return self._memory_saving_steps()

    def _memory_saving_steps(self) -> Iterator[Step]:
        for saves_memory, group in groupby(self.bijections, self._saves_memory):
            if not saves_memory:
                yield from group
            elif self.activation_memory == "checkpoint":
                yield from map(checkpointed, group)
            else:
                yield from reversible([*group], self.inversion_errors)

    def _saves_memory(self, bijection: Any) -> bool:
        """Return whether this chain saves the memory, and no chain inside the bijection."""
        return not _chains(bijection) and (
            self.activation_memory == "checkpoint" or bijection.supports_reversible
        )


class Invert(Bijection):
    """The inverse of another bijection; the inverse of MAF is IAF.

    Kingma et al. (1606.04934).

    Example:
        >>> from flowgen.bijections.linear import ActNorm
        >>> _ = torch.manual_seed(0)
        >>> bijection = ActNorm(3)
        >>> z, _ = bijection(torch.randn(5, 3))
        >>> torch.equal(Invert(bijection)(z)[0], bijection.inverse(z)[0])
        True
    """

    def __init__(self, bijection: Bijection):
        super().__init__()
        self.bijection = bijection

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(x, condition)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection(z, condition)


class Flip(Bijection):
    """Reverse the order of the channels, or of the values of a vector.

    Example:
        >>> Flip()(torch.tensor([[1, 2, 3]]))[0]
        tensor([[3, 2, 1]])
    """

    supports_reversible = True

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.flip(1), x.new_zeros(len(x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self(z)


def concat_condition(x: Tensor, condition: Tensor | None) -> Tensor:
    """Append the condition to the channels of x, as the input of a network.

    Args:
        x: Values (batch, channels) or (batch, channels, height, width).
        condition: None, or a condition with the dimensions of x. One without pixels, (batch,
            cond_channels), is repeated at every pixel of x.

    Example:
        >>> concat_condition(torch.zeros(5, 3, 8, 8), torch.ones(5, 10)).shape
        torch.Size([5, 13, 8, 8])
    """
    if condition is None:
        return x
    if condition.dim() < x.dim():
        condition = condition[:, :, None, None].expand(-1, -1, *x.shape[2:])
    return torch.cat((x, condition.to(x.dtype)), 1)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """Return log N(z; 0, I) in nats, (batch,), for z of shape (batch, dim).

    Example:
        >>> standard_normal_log_prob(torch.zeros(1, 2))  # -log(2 pi)
        tensor([-1.8379])
    """
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)


def _chains(model: nn.Module) -> list[Chain]:
    return [module for module in model.modules() if isinstance(module, Chain)]


def supports_checkpointing(model: nn.Module) -> bool:
    """Return whether `model` consists of chains whose bijections can be recomputed one by one."""
    return bool(_chains(model)) and all(
        module.supports_checkpointing for module in model.modules() if isinstance(module, Bijection)
    )


def set_activation_memory(model: nn.Module, mode: str) -> None:
    """Select how all chains of `model` obtain the activations that the backward pass needs.

    Args:
        model: Model with chains of bijections.
        mode: "store" keeps all activations, "checkpoint" recomputes each bijection from its
            input, and "reversible" recovers the inputs by inverting the chain.

    Raises:
        ValueError: The mode is unknown, or the model does not support it.

    Example:
        >>> from flowgen.bijections.linear import ActNorm
        >>> chain = Chain(ActNorm(3), Flip())
        >>> set_activation_memory(chain, "reversible")
        >>> chain(torch.randn(5, 3))[0].sum().backward()
        >>> inversion_error(chain) < 1e-6
        True
    """
    if mode not in ACTIVATION_MEMORY:
        raise ValueError(
            f"activation memory must be one of {', '.join(ACTIVATION_MEMORY)}, not {mode!r}"
        )
    if mode != "store" and not supports_checkpointing(model):
        raise ValueError(f"activation memory {mode!r} is not supported by this model: use 'store'")
    chains = _chains(model)
    parts = [part for chain in chains for part in chain.bijections if not _chains(part)]
    for part in parts:
        if mode == "reversible" and not part.supports_reversible and list(part.parameters()):
            raise ValueError(
                "activation memory 'reversible' cannot recover the input of this model's "
                f"{type(part).__name__}: use 'checkpoint'"
            )
    for chain in chains:
        chain.activation_memory = mode


def inversion_error(model: nn.Module) -> float | None:
    """Return the largest error of the activations recovered since the last call, and reset it.

    The error is relative to the largest activation; without recovered ones the result is `None`.
    """
    chains = _chains(model)
    errors = [error for chain in chains for error in chain.inversion_errors]
    for chain in chains:
        chain.inversion_errors.clear()
    return torch.stack(errors).max().item() if errors else None
