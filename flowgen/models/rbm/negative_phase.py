"""Where the negatives of an RBM's gradient come from."""

from abc import ABC, abstractmethod
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.models.rbm.energy import EnergyModel
from flowgen.models.rbm.sampling import ParallelTempering, bernoulli_from_logits, mean_field
from flowgen.utils.errors import check_whole

MOST = 10**5  # sweeps of a step, and chains: more would never end


class NegativePhase(nn.Module, ABC):
    """Draws negatives without gradient; what it keeps between updates are buffers, so that a checkpoint holds them."""

    def allocate(self, visible: int, hidden: int) -> None:
        """Make room for chains of a machine of this size."""

    def start(self, machine: EnergyModel) -> None:
        """Begin the chains anew."""

    @abstractmethod
    def forward(self, machine: EnergyModel, data: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Negatives (batch, visible) and their hidden inputs (batch, hidden), given the data and theirs."""

    def diagnostics(self, machine: EnergyModel) -> dict[str, float]:
        """How well the chains mix."""
        return {}


class CD(NegativePhase):
    """Contrastive divergence: `sweeps` of Gibbs sampling from the data. Hinton (2002)."""

    def __init__(self, *, gibbs_steps: int):
        super().__init__()
        check_whole(high=MOST, gibbs_steps=gibbs_steps)
        self.gibbs_steps = gibbs_steps

    def forward(self, machine: EnergyModel, data: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(self.gibbs_steps):
            data = bernoulli_from_logits(machine.visible_input(bernoulli_from_logits(inputs)))
            inputs = machine.hidden_input(data)
        return data, inputs


class PCD(NegativePhase):
    """Persistent contrastive divergence: `chains` that go on where the last update left them. Tieleman (2008)."""

    hidden_units: Tensor
    last_free_energy: Tensor

    def __init__(self, *, gibbs_steps: int, num_chains: int):
        super().__init__()
        check_whole(high=MOST, gibbs_steps=gibbs_steps, num_chains=num_chains)
        self.gibbs_steps, self.num_chains = gibbs_steps, num_chains

    def allocate(self, visible: int, hidden: int) -> None:
        self.register_buffer("hidden_units", torch.zeros(self.num_chains, hidden))
        self.register_buffer("last_free_energy", torch.zeros(self.num_chains))

    def start(self, machine: EnergyModel) -> None:
        self.hidden_units.copy_(
            bernoulli_from_logits(machine.hidden_bias.expand_as(self.hidden_units))
        )

    def forward(self, machine: EnergyModel, data: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(self.gibbs_steps):
            negative = bernoulli_from_logits(machine.visible_input(self.hidden_units))
            inputs = machine.hidden_input(negative)
            self.hidden_units.copy_(
                bernoulli_from_logits(inputs)
            )  # in place, as a captured CUDA graph needs it
        return negative, inputs

    def diagnostics(self, machine: EnergyModel) -> dict[str, float]:
        return {
            "autocorrelation": _autocorrelation(machine, self.hidden_units, self.last_free_energy)
        }


class Tempering(NegativePhase):
    """The rung at beta = 1 of a ladder of parallel tempering that persists. Desjardins et al. (2010); Cho, Raiko and Ilin (2010)."""

    last_free_energy: Tensor

    def __init__(self, *, gibbs_steps: int, num_chains: int, num_temperatures: int, adapt: bool):
        super().__init__()
        check_whole(high=MOST, gibbs_steps=gibbs_steps)
        self.gibbs_steps = gibbs_steps
        self.ladder = ParallelTempering(num_temperatures, num_chains, adapt)
        self.register_buffer("last_free_energy", torch.zeros(num_chains))

    def allocate(self, visible: int, hidden: int) -> None:
        self.ladder.allocate(hidden)

    def start(self, machine: EnergyModel) -> None:
        self.ladder.hidden.copy_(
            bernoulli_from_logits(machine.hidden_bias.expand_as(self.ladder.hidden))
        )

    def forward(self, machine: EnergyModel, data: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(self.gibbs_steps):
            negative, inputs = self.ladder.sweep(machine)
        return self.ladder.top(negative), self.ladder.top(inputs)

    def diagnostics(self, machine: EnergyModel) -> dict[str, float]:
        rates = self.ladder.swap_rates()
        return {
            "autocorrelation": _autocorrelation(
                machine, self.ladder.top(self.ladder.hidden), self.last_free_energy
            ),
            "swap_rate": rates.mean().item(),
            "swap_rate_lowest": rates.min().item(),
            "round_trips": self.ladder.round_trips.item(),
        }


class MeanField(NegativePhase):
    """`sweeps` of mean field from the data. Welling and Hinton (2002)."""

    def __init__(self, *, gibbs_steps: int):
        super().__init__()
        check_whole(high=MOST, gibbs_steps=gibbs_steps)
        self.gibbs_steps = gibbs_steps

    def forward(self, machine: EnergyModel, data: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        negative, _ = next(islice(mean_field(machine, data), self.gibbs_steps - 1, None))
        return negative, machine.hidden_input(negative)


@torch.no_grad()
def _autocorrelation(machine: EnergyModel, hidden: Tensor, last: Tensor) -> float:
    """Over the chains, the correlation of their hidden units' free energy with that at the last call; near 1 where they hardly move."""
    free = -(hidden @ machine.hidden_bias) - F.softplus(machine.visible_input(hidden)).sum(-1)
    correlation = (
        torch.corrcoef(torch.stack((free, last)))[0, 1].nan_to_num(0.0).item()
        if len(free) > 1
        else 0.0
    )
    last.copy_(free)
    return correlation
