"""The multi-scale split as a bijection to one vector."""

import torch
from torch import Tensor

from flowgen.bijections.base import Bijection, beside
from flowgen.bijections.layers import Network


class FactorOut(Bijection):
    """Half of the channels leave, the other half goes on through `inner`: (B, C, H, W) -> (B, C*H*W).

    Without a network the leaving half is latent as it is. With one it is standardised by the Gaussian that the network predicts
    from the half that stays and the condition: z = (x_out - mean) exp(-log_deviation). The vector is [inner's latent, leaving half].
    Real NVP (1605.08803), section 3.6; Glow (1807.03039), section 3.
    """

    def __init__(self, inner: Bijection, network: Network | None = None):
        super().__init__()
        self.inner = inner
        self.network = network

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        stays, leaves = x.chunk(2, dim=1)
        leaves, change = self._standardise(leaves, stays, condition)
        z, log_det = self.inner(stays, condition)
        return torch.cat([z, leaves.flatten(1)], dim=1), log_det + change

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inner_z, leaves = z.chunk(2, dim=1)  # each half of the channels holds half of the numbers
        stays, log_det = self.inner.inverse(inner_z, condition)
        leaves = leaves.view(stays.shape)
        if self.network is not None:
            mean, log_deviation = self._gaussian(self.network, beside(stays, condition))
            leaves = torch.addcmul(mean, leaves, log_deviation.exp())
            log_det = log_det + log_deviation.flatten(1).sum(1)
        return torch.cat([stays, leaves], dim=1), log_det

    def _standardise(self, leaves: Tensor, stays: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.network is None:
            return leaves, leaves.new_zeros(len(leaves))
        mean, log_deviation = self._gaussian(self.network, beside(stays, condition))
        return (leaves - mean) * (-log_deviation).exp(), -log_deviation.flatten(1).sum(1)

    @staticmethod
    def _gaussian(network: Network, seen: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(seen.device.type, enabled=False):  # a prior is part of the likelihood: no bfloat16
            mean, log_deviation = network(seen).chunk(2, dim=1)
        return mean, log_deviation

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        stays, leaves = x.chunk(2, dim=1)
        if self.network is not None:
            self.network.initialize(beside(stays, condition))
        leaves, _ = self._standardise(leaves, stays, condition)
        return torch.cat([self.inner.initialize(stays, condition), leaves.flatten(1)], dim=1)
