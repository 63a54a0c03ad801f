"""What judges samples, interpolations and differences, beside a model's own likelihood."""

from flowgen.judging.classifier import Classifier, train_classifier
from flowgen.judging.differences import Mean, mean, paired_difference
from flowgen.judging.flows import bits_per_image, judge_flow
from flowgen.judging.likeness import Likeness, PrincipalComponents, distance_from_mean, likeness
from flowgen.judging.walks import changes, great_circle, line, unevenness, walk

__all__ = [
    "Classifier",
    "Likeness",
    "Mean",
    "PrincipalComponents",
    "bits_per_image",
    "changes",
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
