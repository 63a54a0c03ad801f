"""How strange images are to a model: scores that grow with strangeness, and what they are worth."""

import logging
import math
import zlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.utils.errors import UserError

DEFAULT = "combined"  # right in both directions where each of its parts fails in one
FEWEST = 4  # two to fit a deviation, two to calibrate
log = logging.getLogger("flowgen")
Statistics = dict[
    str, Tensor
]  # see `GenerativeModel.statistics`, with the images' `complexity` in bits


class OODDetector:
    """Scores of strangeness by what is usual among held-out images, half of which fit the scores while the others calibrate p-values.

    likelihood: -log p(x). typicality: |log p(x) - its mean|, Nalisnick et al. (1906.02994), section 3. complexity: -log p(x) less the bits
    of a lossless code, Serra et al. (1909.11480), equation 2. last_level: minus the density of a flow's last level, Schirrmeister et al.
    (2006.10848). density_of_states: the sum of -log of the kernel densities of a flow's statistics, Morningstar et al. (2006.09273).
    combined: the larger of likelihood and complexity, each in deviations from its mean. A score that is not finite is the strangest of all.
    Raises FlowgenError for fewer than four images, or where hardly any has finite statistics.
    """

    def __init__(self, held_out: Statistics):
        count = len(held_out["log_prob"])
        if count < FEWEST:
            raise UserError(
                f"what is usual cannot be told from fewer than {FEWEST} validation images: use a run of more data"
            )
        fitted, self.calibration = (
            {name: values[half::2].double() for name, values in held_out.items()} for half in (0, 1)
        )
        if broken := int((~_finite(held_out)).sum()):
            log.warning(
                "%d of %d validation images are beyond what float32 holds: they count as the strangest",
                broken,
                count,
            )
        finite = _finite(fitted)
        if finite.sum() < FEWEST // 2:
            raise UserError(
                "nearly all validation images are beyond what float32 holds: name another run, or an earlier checkpoint"
            )
        self.fitted = {name: values[finite] for name, values in fitted.items()}
        self.log_probs = _or_impossible(held_out["log_prob"]).sort().values
        self.moments = {
            name: (values.mean(), values.std()) for name, values in _one_sided(self.fitted).items()
        }
        self.usual = {
            name: scores.sort().values for name, scores in self.scores(self.calibration).items()
        }

    @property
    def names(self) -> list[str]:
        return list(self.usual)

    def scores(self, found: Statistics) -> dict[str, Tensor]:
        """Larger is stranger: (batch,) each."""
        scores = _one_sided(found)
        standardised = [
            (scores[name] - mean) / deviation for name, (mean, deviation) in self.moments.items()
        ]
        scores["combined"] = torch.stack(standardised).amax(0)
        scores["typicality"] = (found["log_prob"].double() - self.fitted["log_prob"].mean()).abs()
        if "last_level" in found:
            scores["last_level"] = -found["last_level"].double()
            states = [name for name in found if name != "complexity"]
            scores["density_of_states"] = -torch.stack(
                [log_kernel_density(found[name].double(), self.fitted[name]) for name in states]
            ).sum(0)
        return {name: each.nan_to_num(math.inf, posinf=math.inf) for name, each in scores.items()}

    def p_values(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """(1 + the number of n calibration images that are as strange) / (n + 1).

        An image like the held-out ones gets at most a with probability at most a. Vovk et al., Algorithmic Learning in a Random World
        (2005), section 2.2.
        """
        return {name: conformal(scores[name], usual) for name, usual in self.usual.items()}

    def percentile(self, log_prob: Tensor) -> Tensor:
        """The share of all held-out images that are likelier, in percent."""
        likelier = len(self.log_probs) - torch.searchsorted(
            self.log_probs, _or_impossible(log_prob), right=True
        )
        return 100 * likelier / len(self.log_probs)


def _finite(found: Statistics) -> Tensor:
    """Which images have statistics that are all finite, (batch,)."""
    return torch.stack([values.isfinite() for values in found.values()]).all(0)


def _or_impossible(log_prob: Tensor) -> Tensor:
    """With log 0 for what is no number."""
    return log_prob.double().nan_to_num(-math.inf, math.inf, -math.inf)


def _one_sided(found: Statistics) -> dict[str, Tensor]:
    """In nats: what the model asks for an image, and how much more than a lossless code that is."""
    payload = -found["log_prob"].double()
    return {
        "likelihood": payload,
        "complexity": payload - found["complexity"].double() * math.log(2),
    }


def conformal(scores: Tensor, usual: Tensor) -> Tensor:
    """See `Outliers.p_values`; `usual` (n,) are in order."""
    return (1 + len(usual) - torch.searchsorted(usual, scores)).double() / (len(usual) + 1)


def log_kernel_density(values: Tensor, points: Tensor) -> Tensor:
    """log of the mean of N(value; point, h^2) over `points`, h = 1.06 s n^(-1/5). Silverman, Density Estimation (1986), section 3.4.2."""
    width = (1.06 * points.std() * len(points) ** -0.2).clamp(min=1e-12)
    far = (values[:, None] - points) / width
    return (
        (-0.5 * far.square()).logsumexp(1)
        - math.log(len(points))
        - width.log()
        - 0.5 * math.log(2 * math.pi)
    )


class AUROC(NamedTuple):
    """The probability that an outlier gets a larger score than an inlier, ties counting half, and its bootstrap error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


def auroc(inliers: Tensor, outliers: Tensor, resamples: int = 200, seed: int = 0) -> AUROC:
    """By ranks: Mann and Whitney (1947). The error is the deviation over `resamples` of both sets: Efron, Bootstrap methods (1979)."""
    generator = torch.Generator().manual_seed(seed)

    def resampled(scores: Tensor) -> Tensor:
        return scores[torch.randint(len(scores), (len(scores),), generator=generator)]

    again = torch.stack(
        [_shared(resampled(inliers), resampled(outliers)) for _ in range(resamples)]
    )
    return AUROC(_shared(inliers, outliers).item(), again.std().item())


def _shared(inliers: Tensor, outliers: Tensor) -> Tensor:
    inliers = inliers.sort().values
    below, up_to = (
        torch.searchsorted(inliers, outliers, right=right).double() for right in (False, True)
    )
    return (below + up_to).mean() / (2 * len(inliers))


def complexity(images: Tensor) -> Tensor:
    """Bits of the shortest lossless code of each image, (batch,): deflate behind the best of PNG's five filters, without headers.

    Serra et al., Input complexity (1909.11480), section 3. PNG specification (ISO 15948), section 9.
    """
    left, above, corner = (
        F.pad(images, pad)[..., : -1 or None, : -1 or None]
        for pad in ((1, 0, 0, 1), (0, 1, 1, 0), (1, 0, 1, 0))
    )
    a, b, c = left.int(), above.int(), corner.int()
    from_a, from_b, from_c = (b - c).abs(), (a - c).abs(), (a + b - 2 * c).abs()
    nearest = torch.where(
        (from_a <= from_b) & (from_a <= from_c), left, torch.where(from_b <= from_c, above, corner)
    )
    filtered = [
        images,
        images - left,
        images - above,
        images - ((a + b) // 2).to(torch.uint8),
        images - nearest,
    ]
    codes = [[_deflated(each) for each in residuals.cpu()] for residuals in filtered]
    return 8.0 * torch.tensor(codes).amin(0)


def _deflated(numbers: Tensor) -> int:
    """Bytes; the negative window leaves zlib's header and checksum out."""
    code = zlib.compressobj(9, zlib.DEFLATED, -15)
    return len(code.compress(numbers.contiguous().numpy().tobytes()) + code.flush())
