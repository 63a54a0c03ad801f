"""Looks at a model while it is trained: what is measured of it, and its samples."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flowgen.data import Images
from flowgen.measures import Judgement, Measured, Metric
from flowgen.models import GenerativeModel
from flowgen.training.cadence import Cadence
from flowgen.training.doubts import doubt_likelihood
from flowgen.training.journal import Journal, NoJournal
from flowgen.training.machine import Machine
from flowgen.training.optimisation import Optimisation
from flowgen.training.state import State

STATISTICS = 40  # batches of training images that the statistics of batch normalisation are estimated over


@dataclass
class Look:
    """At the averaged weights; the weights that are trained, their optimiser and their batches stay as they are."""

    cadence: Cadence
    optimisation: Optimisation
    machine: Machine
    state: State
    data: Images
    journal: Journal | NoJournal
    seed: int

    def judged(self) -> GenerativeModel:
        """The chosen average in evaluation mode, its batch statistics a function of the seed and the state alone."""
        self.machine.seed(self.seed, self.state.step)
        size = self.optimisation.batch_size // self.optimisation.accumulate
        seen = self.state.images_seen
        self.state.estimate(self.data.draw(seen + size * number, size, self.seed) for number in range(STATISTICS))
        return self.state.averaged.eval()

    def validate(self) -> bool:
        """Choose the best of the averages on the validation split; whether it is the best so far, by which training is steered."""
        state, metric = self.state, self.state.model.metric
        judgements = [self._judgement("validation", average) for average in range(len(state.averages) or 1)]
        costs = [metric.cost(each[metric.name].value) for each in judgements]
        state.chosen = costs.index(min(costs))
        which = [Measured(Metric("ema"), state.decays[state.chosen], split="validation")] if len(costs) > 1 else []
        self.journal.write(state.step, "validation", judgements[state.chosen] | Judgement.of(*which))
        better = min(costs) < state.best
        state.best, state.without_gain = min(*costs, state.best), 0 if better else state.without_gain + 1
        return better

    def test(self) -> None:
        """Measure the chosen average on the test split, by which nothing is steered, and warn of a figure that is too good."""
        judgement, images = self._judgement("test", self.state.chosen), self._images("test")
        self.journal.write(self.state.step, "test", judgement)
        doubt_likelihood(judgement[self.state.model.metric.name], self.data, images)

    def _judgement(self, split: str, average: int) -> Judgement:
        """What is measured of one of the averages, which is then the chosen one."""
        self.state.chosen = average
        judgement = self.judged().evaluate(self._images(split), self._images("train")).on(split)
        self.state.model.train()
        return judgement

    def _images(self, split: str) -> Iterator[Tensor]:
        return self.data.batches(split, self.optimisation.batch_size, self.cadence.evaluate_images)

    def sample(self) -> None:
        """Show 32 samples of the chosen average, and the features that it has."""
        generator = torch.Generator(self.machine.device).manual_seed(self.seed)  # the same latents at every look
        levels, _ = self.judged().sample(32, self.cadence.sample_temperature, generator)
        self.state.model.train()
        self.journal.samples(self.state.step, levels, self.data.bits)
        self.journal.features(self.state.averaged.features())
