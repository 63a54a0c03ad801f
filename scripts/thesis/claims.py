"""What the thesis and the slides claim, and what the runs say to it; a claim of the thesis counts from two standard errors on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def sentences(found: Mapping[str, Any], bits: int) -> list[str]:
    """Of what was measured of experiment 1 and 2, see `comparison`."""
    one, two = found.values()
    said = [
        f"Over the same {one['images']} test images the bits/dim of experiment 1 less those of experiment 2 are "
        f"{_difference(_paired(one['bits'], two['bits']), 4)}.",
        "The thesis finds a neutral face at temperature 0 in experiment 2. Whether it is one is for the eye: figures 3.10 and 3.28. The "
        f"distance of that picture from the mean test image is {one['neutral']:.2f} of a test image's in experiment 1, "
        f"{two['neutral']:.2f} in experiment 2.",
        "The thesis finds the samples of experiment 2 more diverse. At temperature 1, "
        f"{_more(one, two, 'coverage', 'the share of test images that are covered')}; "
        f"{_more(one, two, 'spread', 'the mean distance of two samples over that of two test images')}.",
    ]
    walks = [each["walk"]["unevenness"] for each in (one, two)]
    paired = _paired(*walks)
    said.append(
        "The thesis finds the interpolations of experiment 2 smoother. The largest step of a way is "
        f"{_said(mean_and_error(walks[0]))} times the mean one in experiment 1, {_said(mean_and_error(walks[1]))} in experiment 2; over "
        f"the same pairs of images the difference is {_difference(paired)}: {_verdict(paired)}."
    )
    if bits < 8:
        said.append(
            f"The thesis' loss adds 8 bits to data of {bits}: its figures are too high by {8 - bits}, which the right-hand axes show."
        )
    return said


def best_of_prior(likelihoods: Mapping[str, float]) -> str:
    """The slides' claim about priors on the weights, of the likelihoods of machines by name, as l2_1e3_100."""
    said = []
    for prior, claim in (("l2", "300 hidden units"), ("l1", "300 hidden units at 1e-6")):
        names = [name for name in likelihoods if name.startswith(prior)]
        if not {name.rpartition("_")[2] for name in names} >= {"50", "100", "300"}:
            found = "not all of these were trained at this scale"
        else:
            found = f"the highest likelihood, whatever its error, is that of {max(names, key=lambda name: likelihoods[name])}"
        said.append(f"with an {prior.upper()} prior {claim}: {found}")
    return f"The slides find best {'; '.join(said)}."


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error, 0 for a single value."""
    mean, count = math.fsum(values) / len(values), len(values)
    spread = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(spread / (count - 1) / count) if count > 1 else 0.0


def _paired(one: Sequence[float], two: Sequence[float]) -> tuple[float, float]:
    return mean_and_error([a - b for a, b in zip(one, two, strict=True)])


def _more(one: Mapping[str, Any], two: Mapping[str, Any], key: str, what: str) -> str:
    """Whether experiment 2 has more of `key` at temperature 1."""
    first, second = (mean_and_error([repeat[key] for repeat in each["likeness"][-1]]) for each in (one, two))
    difference = (second[0] - first[0], math.hypot(first[1], second[1]))
    return f"{what} is {_said(first)} in experiment 1, {_said(second)} in experiment 2: {_verdict(difference)}"


def _verdict(difference: tuple[float, float]) -> str:
    """Of a claim that the difference is above 0."""
    mean, error = difference
    return "found" if mean > 2 * error else "the opposite is found" if mean < -2 * error else "no difference found"


def _difference(pair: tuple[float, float], digits: int = 2) -> str:
    return f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"


def _said(pair: tuple[float, float]) -> str:
    return _difference(pair, 3)
