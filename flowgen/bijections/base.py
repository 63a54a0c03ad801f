"""The `Bijection` interface, compositions of bijections, and their activation memory.

The backward pass of a deep flow obtains the activations in one of these ways:

- "store" keeps all activations.
- "checkpoint" keeps the input of every bijection and computes the bijection again. Chen et al.
  (1604.06174).
- "reversible" keeps the input of a chain and one output per 128 bijections, and recovers all other
  inputs by inversion. Memory then hardly grows with depth. Gomez et al. (1707.04585), section 3.2.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from flowgen.bijections.networks import batch_norm_layers, has_dropout

ACTIVATION_MEMORY = ("store", "checkpoint", "reversible")
# Longest run of bijections that are inverted from one saved output. Rounding errors grow with it.
MAX_INVERTED_BIJECTIONS = 128

ForwardFn = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]  # as Bijection.forward


class Bijection(nn.Module, ABC):
    """Base class of invertible maps with a tractable log-det.

    Subclasses implement `forward` and `inverse`. Subclasses whose parameters start from data also
    implement `init_from_data`. Tensors have shape (batch, dim) or (batch, channels, height, width).

    The optional `condition` is an additional input of the networks inside a bijection, such as a
    class or another image. It has shape (batch, cond_channels) or (batch, cond_channels, height,
    width). Bijections that contain other bijections pass it to them. Bijections with a network
    append it to the input of the network (see `concat_condition`).

    Attributes:
        supports_checkpointing: Whether a chain can recompute the bijection in the backward pass.
        supports_reversible: Whether the backward pass can recover the input from the output,
            because the inverse is cheap and accurate.
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
        self.init_from_data(x, condition)
        return self(x, condition)[0]

    def init_from_data(self, x: Tensor, condition: Tensor | None = None) -> None:
        """Set data-dependent parameters from one batch of data, by default none."""

    def invert_and_recompute(
        self, z: Tensor, condition: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Recover the input from the output z, then compute `forward` with gradients.

        Returns:
            A tuple of leaf tensors, whose concatenation along dimension 1 is the recovered input,
            followed by the two results of `forward`.
        """
        with torch.no_grad():
            x = self.inverse(z, condition)[0].requires_grad_()
        return (x,), *self(x, condition)


def compose(
    steps: Iterable[Any], x: Tensor, condition: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Apply steps in order and return the result and the sum of their log-dets.

    Args:
        steps: Functions with the arguments and results of `Bijection.forward`.
        x: Input of the first step.
        condition: Condition of all steps.
    """
    log_det = x.new_zeros(len(x))
    for step in steps:
        x, change = step(x, condition)
        log_det = log_det + change
    return x, log_det


class Chain(Bijection):
    """A composition of bijections, z = f_n(... f_1(x)), whose log-dets add up.

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

    max_inversion_error: Tensor | None = None  # of all backward passes, see `_reversible`

    def __init__(self, *bijections: Bijection):
        super().__init__()
        self.activation_memory = "store"
        self.bijections = nn.ModuleList(bijections)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # Memory-saving steps have no gradient for the condition.
        needs_condition_grad = condition is not None and condition.requires_grad
        if self.activation_memory == "store" or not torch.is_grad_enabled() or needs_condition_grad:
            return compose(self.bijections, x, condition)
        return compose(self._memory_saving_steps(), x, condition)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return compose([part.inverse for part in reversed(self.bijections)], z, condition)

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        for bijection in self.bijections:
            x = bijection.initialize(x, condition)  # type: ignore[operator]
        return x

    def _memory_saving_steps(self) -> Iterator[ForwardFn]:
        for saves_memory, group in groupby(self.bijections, self._saves_memory):
            if not saves_memory:
                yield from group
            elif self.activation_memory == "checkpoint":
                yield from map(_checkpointed, group)
            else:
                yield from _reversible([*group], self)

    def _saves_memory(self, bijection: Any) -> bool:
        """Return whether this chain should checkpoint or invert the bijection.

        It should not if the bijection contains chains, which do so themselves.
        """
        return not _chains(bijection) and (
            self.activation_memory == "checkpoint" or bijection.supports_reversible
        )


def _checkpointed(bijection: nn.Module) -> ForwardFn:
    """Return `bijection.forward` as a step that the backward pass computes again."""
    # Set only for batch norm layers, because torch.compile does not support context_fn.
    kwargs: dict[str, Any] = (
        {"context_fn": lambda: (nullcontext(), _frozen_statistics(bijection))}
        if batch_norm_layers(bijection)
        else {}
    )
    return partial(
        checkpoint,
        bijection,
        use_reentrant=False,
        preserve_rng_state=has_dropout(bijection),
        **kwargs,
    )


@contextmanager
def _frozen_statistics(bijection: nn.Module) -> Iterator[None]:
    """Restore the running statistics of batch norm layers at the end of the context."""
    with ExitStack() as stack:
        for layer in batch_norm_layers(bijection):
            for buffer in layer.buffers():
                # .data hides the change from autograd's version counter.
                stack.callback(buffer.data.copy_, buffer.clone())
        yield


def _reversible(bijections: Sequence[Any], chain: Chain) -> Iterator[ForwardFn]:
    """Yield steps that apply bijections and recover their inputs in the backward pass.

    The condition gets no gradient.

    Args:
        bijections: Bijections with `supports_reversible`, in the order of application.
        chain: Chain whose `max_inversion_error` the backward pass sets to the largest relative
            error of the recovered inputs so far.
    """
    for start in range(0, len(bijections), MAX_INVERTED_BIJECTIONS):
        yield partial(_apply_reversibly, bijections[start : start + MAX_INVERTED_BIJECTIONS], chain)


def _apply_reversibly(
    bijections: Sequence[Any], chain: Chain, x: Tensor, condition: Tensor | None
) -> tuple[Tensor, Tensor]:
    parameters = [parameter for bijection in bijections for parameter in bijection.parameters()]
    return _ReversibleFunction.apply(bijections, chain, x, condition, *parameters)


class _ReversibleFunction(torch.autograd.Function):
    """A composition of bijections that saves its output instead of the intermediate results.

    It also saves its input, to measure the error of the input that the backward pass recovers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        bijections: Sequence[Any],
        chain: Chain,
        x: Tensor,
        condition: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device_type = x.device.type
        ctx.bijections = bijections
        ctx.chain = chain
        ctx.autocast = torch.autocast(
            device_type,
            torch.get_autocast_dtype(device_type),
            enabled=torch.is_autocast_enabled(device_type),
        )
        z, log_det = compose(bijections, x, condition)
        ctx.save_for_backward(x, z, condition)
        return z, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, z_grad: Tensor, log_det_grad: Tensor) -> tuple[Any, ...]:
        x, z, condition = ctx.saved_tensors
        z = z.detach()  # its graph would lead back to this function
        parameter_grads: list[Tensor | None] = []
        for bijection in reversed(ctx.bijections):
            with torch.enable_grad(), ctx.autocast:
                leaves, *outputs = bijection.invert_and_recompute(z, condition)
            # The log-det of a volume-preserving bijection is a constant.
            num_outputs = 2 if outputs[1].requires_grad else 1
            grads = torch.autograd.grad(
                outputs[:num_outputs],
                [*leaves, *bijection.parameters()],
                (z_grad, log_det_grad)[:num_outputs],
                allow_unused=True,
            )
            z_grad = torch.cat(grads[: len(leaves)], 1)
            parameter_grads[:0] = grads[len(leaves) :]
            z = torch.cat([leaf.detach() for leaf in leaves], 1)
        largest_input = x.abs().max().clamp(min=torch.finfo(x.dtype).tiny)
        error = (z - x).abs().max() / largest_input
        largest = ctx.chain.max_inversion_error
        ctx.chain.max_inversion_error = error if largest is None else largest.maximum(error)
        return None, None, z_grad, None, *parameter_grads


class Invert(Bijection):
    """The inverse of another bijection.

    The inverse of a masked autoregressive flow is an inverse autoregressive flow. Kingma et al.
    (1606.04934).

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
    """Concatenate the channels of x and of the condition, as the input of a network.

    Args:
        x: Values of shape (batch, channels) or (batch, channels, height, width).
        condition: Condition of shape (batch, cond_channels) or (batch, cond_channels, height,
            width), or None, which returns x. A condition of shape (batch, cond_channels) is
            broadcast over the pixels of x.

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
    """Return log N(z; 0, I) in nats, of shape (batch,), for z of shape (batch, dim).

    Example:
        >>> standard_normal_log_prob(torch.zeros(1, 2))  # -log(2 pi)
        tensor([-1.8379])
    """
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)


def _chains(model: nn.Module) -> list[Chain]:
    return [module for module in model.modules() if isinstance(module, Chain)]


def supports_checkpointing(model: nn.Module) -> bool:
    """Return whether `model` has bijections in chains and all can be recomputed individually."""
    return any(len(chain.bijections) for chain in _chains(model)) and all(
        module.supports_checkpointing for module in model.modules() if isinstance(module, Bijection)
    )


def set_activation_memory(model: nn.Module, mode: str) -> None:
    """Select how the backward passes of all chains in `model` obtain the activations.

    Args:
        model: Model with chains of bijections.
        mode: "store" to keep all activations, "checkpoint" to recompute each bijection from its
            input, or "reversible" to recover the inputs by inverting the chain.

    Raises:
        ValueError: The mode is unknown, or the model does not support it.

    Example:
        >>> from flowgen.bijections.linear import ActNorm
        >>> chain = Chain(ActNorm(3), Flip())
        >>> set_activation_memory(chain, "reversible")
        >>> chain(torch.randn(5, 3))[0].sum().backward()
        >>> pop_inversion_error(chain) < 1e-6
        True
    """
    if mode not in ACTIVATION_MEMORY:
        raise ValueError(
            f"activation memory must be one of {', '.join(ACTIVATION_MEMORY)}, not {mode!r}"
        )
    if mode != "store" and not supports_checkpointing(model):
        raise ValueError(f"activation memory {mode!r} is not supported by this model: use 'store'")
    chains = _chains(model)
    for part in [part for chain in chains for part in chain.bijections if not _chains(part)]:
        if mode == "reversible" and not part.supports_reversible and list(part.parameters()):
            raise ValueError(
                "activation memory 'reversible' cannot recover the input of this model's "
                f"{type(part).__name__}: use 'checkpoint'"
            )
    for chain in chains:
        chain.activation_memory = mode


def pop_inversion_error(model: nn.Module) -> float | None:
    """Return and reset the largest relative error of recovered activations since the last call.

    An error is the largest absolute difference between the recovered and the original input of a
    chain, divided by the largest absolute value of the input.

    Returns:
        Largest error, or None if no backward pass has recovered activations.
    """
    chains = [chain for chain in _chains(model) if chain.max_inversion_error is not None]
    errors = [cast(Tensor, chain.max_inversion_error) for chain in chains]
    for chain in chains:
        chain.max_inversion_error = None
    return torch.stack(errors).max().item() if errors else None
