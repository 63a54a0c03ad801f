"""What judges samples, interpolations and differences, beside a model's own likelihood."""

from flowgen.judging.classifier import Classifier, train_classifier
from flowgen.judging.complexity import complexity
from flowgen.judging.differences import Mean, mean, paired_difference
from flowgen.judging.flows import bits_per_image, judge_flow
from flowgen.judging.likeness import Likeness, PrincipalComponents, distance_from_mean, likeness
from flowgen.judging.outliers import AUROC, Outliers, auroc
from flowgen.judging.walks import changes, great_circle, line, unevenness, walk

__all__ = [
    "AUROC",
    "Classifier",
    "Likeness",
    "Mean",
    "Outliers",
    "PrincipalComponents",
    "auroc",
    "bits_per_image",
    "changes",
    "complexity",
    "distance_from_mean",
    "great_circle",
    "judge_flow",
    "likeness",
    "line",
    "mean",
    "paired_difference",
    "train_classifier",
    "unevenness",
    "walk",
]
