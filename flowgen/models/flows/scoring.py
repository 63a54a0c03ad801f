"""What flows say of images, and how they are judged."""

import math
from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from flowgen.bijections import Bijection
from flowgen.errors import FlowgenError
from flowgen.measures import BITS_PER_DIM, Judgement, Measured
from flowgen.models.base import LOOK, Evaluation, GenerativeModel
from flowgen.models.flows.dequantise import Uniform, Variational
from flowgen.models.flows.noisy import NO_LIKELIHOOD
from flowgen.models.flows.statistics import statistics
from flowgen.shares import in_turn


class Scores(GenerativeModel):
    """The scores of a flow, from `log_prob` under one draw of its noise."""

    metric = BITS_PER_DIM
    averages_logs = False  # over draws, where the mean of importance weights bounds no likelihood
    bijection: Bijection
    dequantiser: Uniform | Variational
    means: Tensor | None
    bins: int
    dimensions: int
    class_networks: bool

    def score(self, levels: Tensor, labels: Tensor | None = None, *, draws: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """log p(x) of each image in nats, (batch,): the log of the mean of `draws` importance weights p(x + u) / q(u).

        Raises FlowgenError for a flow of images with noise, as `statistics` does.
        """
        self._check_likelihood()
        return self._over_draws(levels, labels, draws, generator)

    def _over_draws(self, levels: Tensor, labels: Tensor | None, draws: int, generator: torch.Generator | None) -> Tensor:
        each = torch.stack([self.log_prob(levels, generator, labels) for _ in self.progress(range(draws), "draws", draws)])
        return each.mean(0) if self.averages_logs else each.logsumexp(0) - math.log(draws)

    def _check_likelihood(self) -> None:
        if self.metric != BITS_PER_DIM:
            raise FlowgenError(NO_LIKELIHOOD)

    @torch.no_grad()
    def statistics(self, levels: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Beside log p(x) its terms log N(z) and log|det dz/dx|, and those of the last level; over classes as they are likely."""
        self._check_likelihood()
        x, log_q = self._dequantise(levels, generator)
        log_density, found = statistics(self.bijection, x, self.means, self.class_networks)
        return {"log_prob": log_density - log_q - self.dimensions * math.log(self.bins), **found}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Tensor], reference: Iterable[Tensor] = (), how: Evaluation = LOOK) -> Judgement:
        """Bits per dimension over `batches`, with the standard error over images; the noise is the same at every call."""
        generator = torch.Generator(self.device).manual_seed(0)
        per_image = in_turn(
            batches,
            lambda levels: self._bits_per_dim(self._over_draws(levels, None, how.draws, generator)),
            lambda levels: [self.dequantiser.start(levels, self.dtype, generator) for _ in range(how.draws)],
        )
        error = per_image.std().item() / math.sqrt(len(per_image)) if len(per_image) > 1 else math.inf
        return Judgement.of(Measured(self.metric, per_image.mean().item(), error), bits=self.bits, draws=how.draws, images=len(per_image))

    def _bits_per_dim(self, log_prob: Tensor) -> Tensor:
        return -log_prob / (self.dimensions * math.log(2))

    @abstractmethod
    def log_prob(self, levels: Tensor, generator: torch.Generator | None = None, labels: Tensor | None = None) -> Tensor:
        """log p(x) under one draw of the noise, in nats: (batch,)."""

    @abstractmethod
    def _dequantise(self, levels: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The images in [0, 1), and log q(u) in nats, (batch,)."""
