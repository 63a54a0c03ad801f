"""The density of a flow on dequantized images, and its terms for out-of-distribution detection."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from flowgen.bijections.base import Bijection, standard_normal_log_prob
from flowgen.bijections.reshape import FactorOut
from flowgen.models.likelihood import LikelihoodModel

CLASS_MEAN_STD = 0.3  # initial standard deviation of the class means


class FlowDensity(LikelihoodModel):
    """The density of points x in [0, 1): a bijection to latents z with base N(0, I).

    With classes, the latents of class y are distributed as N(means[y], I). With
    `condition_networks`, the class, one-hot, is also the condition of the bijection.

    Args:
        bijection: Maps points (batch, channels, height, width) to vectors (batch, D).
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        num_classes: Number of classes, or None.
        condition_networks: With classes, make the class the condition of the bijection.

    Attributes:
        means: Learned means of the latents of each class, (classes, D), or zeros (1, D).
    """

    means: Tensor

    def __init__(
        self,
        bijection: Bijection,
        image_shape: Sequence[int],
        bits: int,
        num_classes: int | None,
        condition_networks: bool,
    ):
        super().__init__(image_shape, bits, num_classes)
        self.bijection = bijection
        self.condition_networks = condition_networks and num_classes is not None
        if num_classes is None:
            self.register_buffer("means", torch.zeros(1, self.dimensions), persistent=False)
        else:
            self.means = nn.Parameter(CLASS_MEAN_STD * torch.randn(num_classes, self.dimensions))

    def log_density(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return log p(x), or log p(x | labels), in nats: (batch,).

        Args:
            x: Points in [0, 1), (batch, channels, height, width).
            labels: Classes (batch,), or None.
        """
        one_hot = self.one_hot(labels)
        if one_hot is None:
            return self.class_log_density(x).logsumexp(1) - math.log(len(self.means))
        z, log_det = self.bijection(x, self.network_condition(one_hot))
        return self.log_base(z, one_hot) + log_det

    def class_log_density(self, x: Tensor) -> Tensor:
        """Return log p(x | y) in nats for every class y: (batch, classes)."""
        if self.condition_networks:
            labels = torch.arange(len(self.means), device=x.device)
            return torch.stack([self.log_density(x, y.expand(len(x))) for y in labels], 1)
        z, log_det = self.bijection(x)
        return _log_base_per_mean(z, self.means) + log_det[:, None]

    def log_base(self, z: Tensor, one_hot: Tensor | None) -> Tensor:
        """Return the log-density of latents under the base in nats, (batch,).

        Args:
            z: Latents (batch, D).
            one_hot: Classes (batch, classes), which select p(z | class). None selects p(z), the
                mean of p(z | class) over the classes.
        """
        if one_hot is None:
            return _log_base_per_mean(z, self.means).logsumexp(1) - math.log(len(self.means))
        return standard_normal_log_prob(z - one_hot @ self.means)

    def log_density_terms(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return log p(x) in nats, (batch,), and a dictionary of its terms, each (batch,).

        The terms are

        - `log_base`: log N(z; mean, I).
        - `log_det`: log|det dz/dx|.
        - `last_level`: log p(h), where h is the input of the last level of a multi-scale flow,
          which carries the coarse content of the image. Schirrmeister et al. (2006.10848),
          section 4. In flows with a single level, h is x.

        In flows with classes, p(x) is averaged over the classes, and each term is weighted by
        p(y | x).
        """
        one_hots = torch.eye(len(self.means)).to(x)[:, None].expand(-1, len(x), -1)
        conditions = one_hots if self.condition_networks else [None]
        splits = [module for module in self.bijection.modules() if isinstance(module, FactorOut)]
        last_level = splits[-1].inner if splits else self.bijection
        last_outputs: list[tuple[Tensor, Tensor]] = []
        with last_level.register_forward_hook(
            lambda module, args, output: last_outputs.append(output)
        ):
            outputs = [self.bijection(x, condition) for condition in conditions]
        log_base, log_det = self._class_terms(outputs)
        log_density = log_base + log_det
        posterior = log_density.softmax(1)
        return log_density.logsumexp(1) - math.log(len(self.means)), {
            "log_base": (posterior * log_base).sum(1),
            "log_det": (posterior * log_det).sum(1),
            "last_level": (posterior * self._class_terms(last_outputs).sum(0)).sum(1),
        }

    def _class_terms(self, outputs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Return log N(z; mean, I) and the log-det of each class: (2, batch, classes).

        Args:
            outputs: Latents z and log-dets: for each class if the class conditions the
                networks, else once. z may hold only the last level; it uses the first entries of
                the means.
        """
        groups = self.means.split(1) if self.condition_networks else [self.means]
        terms = [
            torch.stack(
                torch.broadcast_tensors(
                    _log_base_per_mean(z, means[:, : z.shape[1]]), log_det[:, None]
                )
            )
            for (z, log_det), means in zip(outputs, groups, strict=True)
        ]
        return torch.cat(terms, 2)

    def network_condition(self, one_hot: Tensor | None) -> Tensor | None:
        """Return the condition of the bijection."""
        return one_hot if self.condition_networks else None


def _log_base_per_mean(z: Tensor, means: Tensor) -> Tensor:
    """Return log N(z; mean, I) for each of `means`: (batch, means)."""
    return torch.stack([standard_normal_log_prob(z - mean) for mean in means], 1)
