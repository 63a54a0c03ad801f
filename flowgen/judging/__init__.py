"""What judges samples, interpolations and differences, beside a model's own likelihood."""

from flowgen.judging.classifier import Classifier, train_classifier
from flowgen.judging.differences import Mean, mean, paired_difference
from flowgen.judging.likeness import Likeness, PrincipalComponents, distance_from_mean, likeness
from flowgen.judging.walks import changes, unevenness

__all__ = [
    "Classifier",
    "Likeness",
    "Mean",
    "PrincipalComponents",
    "changes",
    "distance_from_mean",
    "likeness",
    "mean",
    "paired_difference",
    "train_classifier",
    "unevenness",
]
