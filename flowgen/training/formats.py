"""What older checkpoints wrote otherwise, put into today's words when they are read."""

import re
from typing import Any

NAMES = ((re.compile(r"\bdequantiser\.networks\.(\d+)\."), r"dequantiser.bijection.bijections.\1.network."),)  # of parameters


def renewed(state: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint with the parameters' names of today; optimisers count parameters, whose order has not changed."""
    return state | {key: _renamed(state[key]) for key in ("model", "ema") if isinstance(state[key], dict)}


def _renamed(weights: dict[str, Any]) -> dict[str, Any]:
    for pattern, name in NAMES:
        weights = {pattern.sub(name, key): value for key, value in weights.items()}
    return weights
