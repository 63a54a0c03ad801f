"""Bijections whose parameters are functions of the condition."""

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from flowgen.bijections.base import Bijection, Invert
from flowgen.bijections.networks import zero_init


class Amortized(Bijection):
    """A bijection with its own parameters for every vector of a batch: theta + linear(condition).

    It starts with the parameters theta of the bijection. A flow as the approximate posterior of a
    variational autoencoder has such parameters: Rezende and Mohamed (1505.05770), section 4.2; van
    den Berg et al. (1803.05649), section 3.

    Args:
        bijection: Bijection of vectors (batch, dim) that uses no condition.
        cond_channels: Values of the condition, which has shape (batch, cond_channels).

    Example:
        >>> from flowgen.bijections.residual import Planar
        >>> _ = torch.manual_seed(0)
        >>> bijection = Amortized(Planar(6), cond_channels=3)
        >>> _ = torch.nn.init.normal_(bijection.linear.weight)
        >>> x, condition = torch.randn(5, 6), torch.randn(5, 3)
        >>> z, log_det = bijection(x, condition)
        >>> torch.allclose(bijection.inverse(z, condition)[0], x, atol=1e-5)
        True
    """

    def __init__(self, bijection: Bijection, cond_channels: int):
        super().__init__()
        self.bijection = bijection
        self.sizes = [parameter.numel() for parameter in bijection.parameters()]
        self.linear = zero_init(nn.Linear(cond_channels, sum(self.sizes)))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        def transform(parameters: dict[str, Tensor], row: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = functional_call(self.bijection, parameters, (row[None],))
            return z[0], log_det[0]

        return vmap(transform)(self._parameters_of(x, condition), x)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # The number of steps of an iterative inverse depends on the row, so that vmap cannot be
        # used.
        parameters = self._parameters_of(z, condition)
        inverse = Invert(self.bijection)
        rows = [
            functional_call(
                inverse,
                {f"bijection.{name}": values[index] for name, values in parameters.items()},
                (z[index : index + 1],),
            )
            for index in range(len(z))
        ]
        x, log_det = zip(*rows, strict=True)
        return torch.cat(x), torch.cat(log_det)

    def _parameters_of(self, x: Tensor, condition: Tensor | None) -> dict[str, Tensor]:
        """Return the parameters of each row: tensors (batch, *shape of the parameter)."""
        changes = self.linear(condition).to(x.dtype).split(self.sizes, 1)
        return {
            name: parameter + change.unflatten(1, parameter.shape)
            for (name, parameter), change in zip(
                self.bijection.named_parameters(), changes, strict=True
            )
        }
