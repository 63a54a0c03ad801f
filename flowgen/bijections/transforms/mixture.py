"""Distribution functions of mixtures, of single numbers."""

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.bijections.roots import root
from flowgen.bijections.transforms.base import LOG_SCALES, Transform, bounded


class MixtureOfLogistics(Transform):
    """y = exp(l) logit(sum_k pi_k sigmoid((x - mu_k) / s_k)) + t. Flow++ (1902.00275), section 3.2.

    The inverse is found between the smallest and the largest of the components' own solutions.
    """

    def __init__(self, components: int = 4, scale: str = "bounded"):
        self.components = components
        self.log_scale = LOG_SCALES[scale]
        self.count = 2 + 3 * components

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift, mixture = self._read(parameters)
        log_odds, log_slope = self._log_odds(x, *mixture)
        return torch.addcmul(shift, log_odds, log_scale.exp()), log_slope + log_scale

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift, mixture = self._read(parameters)
        target = (y - shift) * (-log_scale).exp()
        _, means, log_deviations = mixture
        ends = means + log_deviations.exp() * target
        x = root(lambda x: self._log_odds(x, *mixture), target, ends.amin(0), ends.amax(0))
        return x, -(self._log_odds(x, *mixture)[1] + log_scale)

    def _read(self, parameters: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        raw, shift, *rest = self.split(parameters).split((1, 1, *[self.components] * 3))
        logits, means, log_deviations = rest
        spread = torch.linspace(-1, 1, self.components, device=means.device, dtype=means.dtype)  # else all would stay alike
        means = means + spread.view(-1, *[1] * (means.dim() - 1))
        return self.log_scale(raw[0]), shift[0], (logits.log_softmax(0), means, bounded(log_deviations))

    @staticmethod
    def _log_odds(x: Tensor, log_share: Tensor, means: Tensor, log_deviations: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture's log-odds at x, and the log of their slope."""
        place = (x - means) * (-log_deviations).exp()
        below, above = F.logsigmoid(place), F.logsigmoid(-place)
        log_below, log_above = (log_share + below).logsumexp(0), (log_share + above).logsumexp(0)
        log_density = (log_share + below + above - log_deviations).logsumexp(0)
        return log_below - log_above, log_density - log_below - log_above
