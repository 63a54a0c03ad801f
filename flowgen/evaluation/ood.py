"""Out-of-distribution detection: scores, conformal p-values, AUROC."""

import math
import zlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.utils.console import log
from flowgen.utils.errors import UserError

DEFAULT_SCORE = "combined"  # works in both directions, where each of its parts fails in one
MIN_HELD_OUT_IMAGES = 4  # two to fit a standard deviation, two to calibrate
# Results of `GenerativeModel.statistics`, and the `complexity` of the images in bits, by name. Each
# tensor has the shape (images,).
Statistics = dict[str, Tensor]


class OODDetector:
    """Out-of-distribution scores, fitted and calibrated on held-out images of the training set.

    A score measures how anomalous an image is. Half of the held-out images fit the scores, the
    others calibrate their p-values. A score that is not finite counts as the most anomalous.

    - likelihood: -log p(x).
    - typicality: |log p(x) - mean log p| (Nalisnick et al., arXiv:1906.02994, section 3).
    - complexity: -log p(x) minus the length of a lossless code (Serra et al., arXiv:1909.11480,
      equation 2).
    - last_level: -log density of the last level of a flow (Schirrmeister et al.,
      arXiv:2006.10848).
    - density_of_states: sum over the statistics of a flow of -log of their kernel densities
      (Morningstar et al., arXiv:2006.09273).
    - combined: the larger one of likelihood and complexity, each in standard deviations from its
      mean.

    The last level and the density of states need statistics that only flows have.

    Args:
        validation: Statistics of held-out images.

    Attributes:
        calibration_scores: Sorted scores of the images that calibrate the p-values, by name.

    Raises:
        UserError: For fewer than four images, or if hardly any has finite statistics.

    Example:
        >>> validation = {"log_prob": torch.arange(8.0), "complexity": torch.zeros(8)}
        >>> detector = OODDetector(validation)
        >>> scores = detector.scores({"log_prob": torch.tensor([4.0, -90.0]),
        ...                           "complexity": torch.zeros(2)})
        >>> detector.p_values(scores)["likelihood"]
        tensor([0.6000, 0.2000], dtype=torch.float64)
    """

    def __init__(self, validation: Statistics):
        count = len(validation["log_prob"])
        if count < MIN_HELD_OUT_IMAGES:
            raise UserError(
                f"out-of-distribution scores need at least {MIN_HELD_OUT_IMAGES} validation "
                "images: choose a run with more data"
            )
        finite = torch.stack([values.isfinite() for values in validation.values()]).all(0)
        if not finite.all():
            log.warning(
                "%d of %d validation images have scores beyond the range of float32: "
                "they count as the most anomalous",
                int((~finite).sum()),
                count,
            )
        if finite[::2].sum() < MIN_HELD_OUT_IMAGES // 2:
            raise UserError(
                "nearly all validation images have scores beyond the range of float32: "
                "choose another run, or an earlier checkpoint"
            )
        self.fitted = {
            name: values[::2][finite[::2]].double() for name, values in validation.items()
        }
        self.moments = {
            name: (scores.mean(), scores.std())
            for name, scores in _one_sided_scores(self.fitted).items()
        }
        validation_scores = self.scores(validation)
        self.likelihood_scores = validation_scores["likelihood"].sort().values
        self.calibration_scores = {
            name: scores[1::2].sort().values for name, scores in validation_scores.items()
        }

    def scores(self, statistics: Statistics) -> dict[str, Tensor]:
        """Return all scores by name, each of shape (batch,); larger is more anomalous."""
        scores = _one_sided_scores(statistics)
        standardized = [(scores[name] - mean) / std for name, (mean, std) in self.moments.items()]
        log_prob = statistics["log_prob"].double()
        scores |= {
            "combined": torch.stack(standardized).amax(0),
            "typicality": (log_prob - self.fitted["log_prob"].mean()).abs(),
        }
        if "last_level" in statistics:
            log_densities = [
                log_kernel_density(values.double(), self.fitted[name])
                for name, values in statistics.items()
                if name != "complexity"
            ]
            scores |= {
                "last_level": -statistics["last_level"].double(),
                "density_of_states": -torch.stack(log_densities).sum(0),
            }
        return {
            name: values.nan_to_num(math.inf, posinf=math.inf) for name, values in scores.items()
        }

    def p_values(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the conformal p-value of each score, see `conformal_p_values`."""
        return {
            name: conformal_p_values(scores[name], calibration)
            for name, calibration in self.calibration_scores.items()
        }

    def percentile(self, scores: dict[str, Tensor]) -> Tensor:
        """Return the percentage of all held-out images that are more likely, (batch,)."""
        num_more_likely = torch.searchsorted(self.likelihood_scores, scores["likelihood"])
        return 100 * num_more_likely / len(self.likelihood_scores)


def _one_sided_scores(statistics: Statistics) -> dict[str, Tensor]:
    """Return -log p(x), and -log p(x) minus the length of a lossless code, in nats."""
    code_length = -statistics["log_prob"].double()
    return {
        "likelihood": code_length,
        "complexity": code_length - statistics["complexity"].double() * math.log(2),
    }


def conformal_p_values(scores: Tensor, calibration: Tensor) -> Tensor:
    """Return (1 + number of calibration scores that are at least as large) / (n + 1).

    An image from the distribution of the n calibration images has a p-value of at most a with
    probability at most a, however good the score is (Vovk et al., Algorithmic Learning in a
    Random World, 2005, section 2.2).

    Args:
        scores: Scores of new images, (batch,).
        calibration: Sorted scores of held-out images, (n,).

    Example:
        >>> conformal_p_values(torch.tensor([2.5, 9.0]), torch.arange(4.0))
        tensor([0.4000, 0.2000], dtype=torch.float64)
    """
    at_least_as_large = len(calibration) - torch.searchsorted(calibration, scores)
    return (1 + at_least_as_large).double() / (len(calibration) + 1)


def log_kernel_density(values: Tensor, points: Tensor) -> Tensor:
    """Return the log of a Gaussian kernel density estimate at `values`, (batch,).

    log 1/n sum_i N(value; point_i, h^2) with the bandwidth h = 1.06 s n^(-1/5) (Silverman,
    Density Estimation, 1986, section 3.4.2).

    Args:
        values: Points at which the density is evaluated, (batch,).
        points: Sample, (n,).
    """
    # The minimum is for a constant statistic.
    bandwidth = (1.06 * points.std() * len(points) ** -0.2).clamp(min=1e-12)
    distance = (values[:, None] - points) / bandwidth
    log_kernels = (-0.5 * distance.square()).logsumexp(1)
    return log_kernels - math.log(len(points)) - bandwidth.log() - 0.5 * math.log(2 * math.pi)


class AUROC(NamedTuple):
    """Area under the ROC curve with its bootstrap error.

    It is the probability that an outlier has a larger score than an inlier. A tie counts as half.
    """

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


def auroc(inliers: Tensor, outliers: Tensor, resamples: int = 200, seed: int = 0) -> AUROC:
    """Return the AUROC of scores, by ranks (Mann and Whitney, 1947).

    Args:
        inliers: Scores of in-distribution images, (N,).
        outliers: Scores of other images, (M,).
        resamples: Number of bootstrap samples of both sets for the error (Efron, 1979).
        seed: Seed of the bootstrap samples.

    Example:
        >>> print(auroc(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])))
        1.0000 ± 0.0000
    """
    generator = torch.Generator().manual_seed(seed)

    def resample(scores: Tensor) -> Tensor:
        return scores[torch.randint(len(scores), (len(scores),), generator=generator)]

    values = [_auroc(resample(inliers), resample(outliers)) for _ in range(resamples)]
    return AUROC(_auroc(inliers, outliers).item(), torch.stack(values).std().item())


def _auroc(inliers: Tensor, outliers: Tensor) -> Tensor:
    inliers = inliers.sort().values
    below = torch.searchsorted(inliers, outliers)
    up_to = torch.searchsorted(inliers, outliers, right=True)
    return (below + up_to).double().mean() / (2 * len(inliers))


def png_complexity(images: Tensor) -> Tensor:
    """Return the length in bits of a lossless code of each image, (batch,).

    The code is deflate after the best one of PNG's five filters, without headers (Serra et al.,
    Input complexity, arXiv:1909.11480, section 3; PNG specification, ISO 15948, section 9).

    Args:
        images: Images on the CPU, uint8 (batch, channels, height, width).

    Example:
        >>> png_complexity(torch.zeros(1, 1, 28, 28, dtype=torch.uint8)).item() < 100
        True
    """
    padded = F.pad(images.int(), (1, 0, 1, 0))  # zeros beyond the left and the upper border
    left = padded[..., 1:, :-1]
    above = padded[..., :-1, 1:]
    neighbors = torch.stack((left, above, padded[..., :-1, :-1]))
    # Paeth: the neighbor nearest to left + above - corner, the first one of equals.
    nearest = (left + above - neighbors[2] - neighbors).abs().argmin(0, keepdim=True)
    paeth = neighbors.gather(0, nearest)[0]
    predictions = torch.stack((torch.zeros_like(left), left, above, (left + above) // 2, paeth))
    residuals = (images - predictions).to(torch.uint8).flatten(0, 1)  # modulo 256
    # Raw deflate streams: -15 omits header and checksum.
    sizes = [len(zlib.compress(image.numpy().tobytes(), 9, -15)) for image in residuals]
    return 8.0 * torch.tensor(sizes).view(len(predictions), -1).amin(0)
