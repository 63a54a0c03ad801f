"""Negative phases: estimators of the model's expectation in the gradient of an RBM."""

from abc import ABC, abstractmethod
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.models.rbm.energy import EnergyModel
from flowgen.models.rbm.sampling import ParallelTempering, bernoulli_from_logits, mean_field
from flowgen.utils.errors import check_whole


class NegativePhase(nn.Module, ABC):
    """Base class of the negative phases, which draw negatives without a gradient.

    Chains that persist between updates are buffers, so that a checkpoint contains them.
    """

    def __init__(self, *, gibbs_steps: int = 1):
        super().__init__()
        check_whole(high=10**5, gibbs_steps=gibbs_steps)
        self.gibbs_steps = gibbs_steps

    def allocate(self, hidden: int) -> None:
        """Create buffers for the chains of an RBM with this number of hidden units."""

    def initialize_chains(self, rbm: EnergyModel) -> None:
        """Draw the initial state of persistent chains."""

    @abstractmethod
    def forward(
        self, rbm: EnergyModel, data: Tensor, hidden_input: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw negatives.

        Args:
            rbm: The model.
            data: Visible units of the batch, (batch, visible).
            hidden_input: Their hidden inputs, (batch, hidden).

        Returns:
            Negatives (chains, visible) and their hidden inputs (chains, hidden). CD and MeanField
            return one negative per image of the batch, PCD and Tempering one per chain.
        """

    def diagnostics(self, rbm: EnergyModel) -> dict[str, float]:
        """Return quantities that show how well persistent chains mix."""
        return {}


class CD(NegativePhase):
    """Contrastive divergence: Gibbs sampling from the data.

    Hinton, Training products of experts by minimizing contrastive divergence (2002).

    Args:
        gibbs_steps: Number of Gibbs steps, the k of CD-k.
    """

    def forward(
        self, rbm: EnergyModel, data: Tensor, hidden_input: Tensor
    ) -> tuple[Tensor, Tensor]:
        for _ in range(self.gibbs_steps):
            hidden = bernoulli_from_logits(hidden_input)
            negative = bernoulli_from_logits(rbm.visible_input(hidden))
            hidden_input = rbm.hidden_input(negative)
        return negative, hidden_input


class PCD(NegativePhase):
    """Persistent contrastive divergence: chains that continue from update to update.

    Tieleman, Training restricted Boltzmann machines using approximations to the likelihood
    gradient (2008).

    Args:
        gibbs_steps: Number of Gibbs steps per update.
        num_chains: Number of persistent chains.
    """

    def __init__(self, *, gibbs_steps: int = 1, num_chains: int = 100):
        super().__init__(gibbs_steps=gibbs_steps)
        check_whole(high=10**5, num_chains=num_chains)
        self.num_chains = num_chains

    def allocate(self, hidden: int) -> None:
        self.hidden_units = nn.Buffer(torch.zeros(self.num_chains, hidden))
        # Free energies of the chains in nats at the last call of `diagnostics`
        self.last_free_energy = nn.Buffer(torch.zeros(self.num_chains))

    def initialize_chains(self, rbm: EnergyModel) -> None:
        self.hidden_units.copy_(bernoulli_from_logits(rbm.hidden_bias.expand_as(self.hidden_units)))

    def forward(
        self, rbm: EnergyModel, data: Tensor, hidden_input: Tensor
    ) -> tuple[Tensor, Tensor]:
        for _ in range(self.gibbs_steps):
            negative = bernoulli_from_logits(rbm.visible_input(self.hidden_units))
            hidden_input = rbm.hidden_input(negative)
            # In place, because a captured CUDA graph reads the same memory again.
            self.hidden_units.copy_(bernoulli_from_logits(hidden_input))
        return negative, hidden_input

    def diagnostics(self, rbm: EnergyModel) -> dict[str, float]:
        return {"autocorrelation": _autocorrelation(rbm, self.hidden_units, self.last_free_energy)}


class Tempering(NegativePhase):
    """Persistent parallel tempering, whose replicas at beta = 1 are the negatives.

    Desjardins et al., Tempered Markov chain Monte Carlo for training of restricted Boltzmann
    machines (2010); Cho, Raiko and Ilin, Parallel tempering is efficient for learning restricted
    Boltzmann machines (2010).

    Args:
        gibbs_steps: Number of Gibbs steps per update; swaps follow each step.
        num_chains: Number of independent ensembles.
        num_temperatures: Number of inverse temperatures from 0 to 1.
        adapt: Adapt the inverse temperatures to the swap rates.
    """

    def __init__(
        self,
        *,
        gibbs_steps: int = 1,
        num_chains: int = 100,
        num_temperatures: int = 10,
        adapt: bool = True,
    ):
        super().__init__(gibbs_steps=gibbs_steps)
        self.replicas = ParallelTempering(num_temperatures, num_chains, adapt)
        # At beta = 1, in nats, at the last call of `diagnostics`.
        self.last_free_energy = nn.Buffer(torch.zeros(num_chains))

    def allocate(self, hidden: int) -> None:
        self.replicas.allocate(hidden)

    def initialize_chains(self, rbm: EnergyModel) -> None:
        hidden = self.replicas.hidden
        hidden.copy_(bernoulli_from_logits(rbm.hidden_bias.expand_as(hidden)))

    def forward(
        self, rbm: EnergyModel, data: Tensor, hidden_input: Tensor
    ) -> tuple[Tensor, Tensor]:
        for _ in range(self.gibbs_steps):
            negative, hidden_input = self.replicas.step(rbm)
        return self.replicas.at_beta_one(negative), self.replicas.at_beta_one(hidden_input)

    def diagnostics(self, rbm: EnergyModel) -> dict[str, float]:
        swap_rates = self.replicas.swap_rates()
        hidden = self.replicas.at_beta_one(self.replicas.hidden)
        return {
            "autocorrelation": _autocorrelation(rbm, hidden, self.last_free_energy),
            "swap_rate": swap_rates.mean().item(),
            "swap_rate_lowest": swap_rates.min().item(),
            "round_trips": self.replicas.round_trips.item(),
        }


class MeanField(NegativePhase):
    """Deterministic mean-field updates from the data instead of Gibbs sampling.

    Welling and Hinton, A new learning algorithm for mean field Boltzmann machines (2002).

    Args:
        gibbs_steps: Number of mean-field updates of both layers.
    """

    def __init__(self, *, gibbs_steps: int = 5):
        super().__init__(gibbs_steps=gibbs_steps)

    def forward(
        self, rbm: EnergyModel, data: Tensor, hidden_input: Tensor
    ) -> tuple[Tensor, Tensor]:
        negative, _ = next(islice(mean_field(rbm, data), self.gibbs_steps - 1, None))
        return negative, rbm.hidden_input(negative)


@torch.no_grad()
def _autocorrelation(rbm: EnergyModel, hidden: Tensor, last_free_energy: Tensor) -> float:
    """Return the correlation over chains of the hidden units' free energy with its last value.

    It is near 1 if the chains hardly move. The new free energies replace `last_free_energy`.
    """
    free_energy = -(hidden @ rbm.hidden_bias) - F.softplus(rbm.visible_input(hidden)).sum(-1)
    pair = torch.stack((free_energy, last_free_energy))
    last_free_energy.copy_(free_energy)
    return torch.corrcoef(pair)[0, 1].nan_to_num(0.0).item() if len(free_energy) > 1 else 0.0
