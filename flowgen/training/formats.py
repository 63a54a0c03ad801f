"""What older checkpoints wrote otherwise, put into today's words when they are read."""

import re
from typing import Any

FORMAT = 2  # of the checkpoints that are written
NAMES = ((re.compile(r"\bdequantiser\.networks\.(\d+)\."), r"dequantiser.bijection.bijections.\1.network."),)  # of parameters
TARGETS = {  # classes that have moved
    f"flowgen.models.negative_phase.{name}": f"flowgen.models.rbm.negative_phase.{name}" for name in ("CD", "MeanField", "PCD", "Tempering")
}


def renewed(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of any format in today's; optimisers count parameters, whose order has not changed.

    The first format kept the state of the random generators, which a step has taken from the seed since, and the counters of failures
    among the figures.
    """
    if "format" in state:
        return state
    figures = {name: state["metrics"][name] for name in ("best", "seconds")}
    failures = {name: value for name, value in state["metrics"].items() if name not in figures}
    weights = {key: _renamed(state[key]) for key in ("model", "ema")}
    kept = {key: value for key, value in state.items() if key != "random"}
    config = _retargeted(state["config"])
    return kept | weights | {"format": FORMAT, "config": config, "metrics": figures, "rescue": failures}


def _renamed(weights: dict[str, Any] | None) -> dict[str, Any] | None:
    if weights is None:
        return None
    for pattern, name in NAMES:
        weights = {pattern.sub(name, key): value for key, value in weights.items()}
    return weights


def _retargeted(config: Any) -> Any:
    """Every section with its class where it is today."""
    if not isinstance(config, dict):
        return config
    sections = {key: _retargeted(value) for key, value in config.items()}
    return sections | ({"_target_": TARGETS.get(config["_target_"], config["_target_"])} if "_target_" in config else {})
