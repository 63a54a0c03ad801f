"""What older runs wrote otherwise, put into today's words when they are read."""

import re
from typing import Any

FORMAT = 3  # of the checkpoints that are written
MOST_BYTES = 2**20  # of a configuration, which reading takes seconds of
NAMES = ((re.compile(r"\bdequantiser\.networks\.(\d+)\."), r"dequantiser.bijection.bijections.\1.network."),)  # of parameters
TARGETS = {  # classes that have moved
    f"flowgen.models.negative_phase.{name}": f"flowgen.models.rbm.negative_phase.{name}" for name in ("CD", "MeanField", "PCD", "Tempering")
}
REPEATED = {  # what was said of data that has but one value for it
    "flowgen.data.MNIST": {"channels"},
    "flowgen.data.MNISTSample": {"channels", "size"},
    "flowgen.data.Toy": {"channels", "size"},
}
OF_THE_EVALUATION = ("draws", "betas", "chains")  # once settings of the model
AS_IT_WAS: dict[str, dict[str, Any]] = {  # where a configuration does not say it yet
    "data": {"binarise": "threshold"},
    "trainer": {
        "devices": None,
        "threads": "auto",
        "memory": "keep",
        "betas": [0.9, 0.999],
        "weight_decay": 0.0,
        "patience": None,
        "sample_temperature": 1.0,
    },
    "evaluation": {"_target_": "flowgen.models.Evaluation", "draws": 1, "betas": 10000, "chains": 256, "thorough": True},
}


def renewed(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of any format in today's; optimisers count parameters, whose order has not changed.

    The first format kept the state of the random generators, which a step has taken from the seed since, and the counters of failures
    among the figures. Raises AttributeError, KeyError or TypeError where parts are of another kind.
    """
    state = state | {"config": in_todays_words(state["config"])}
    if "format" in state:
        return state
    figures = {name: state["metrics"][name] for name in ("best", "seconds")}
    failures = {name: value for name, value in state["metrics"].items() if name not in figures}
    weights = {key: _renamed(state[key]) for key in ("model", "ema")}
    kept = {key: value for key, value in state.items() if key != "random"}
    return kept | weights | {"format": FORMAT, "metrics": figures, "rescue": failures}


def in_todays_words(config: dict[str, Any]) -> dict[str, Any]:
    """A run's whole configuration, where it is of any age. Raises AttributeError, KeyError or TypeError where it is none."""
    config = _retargeted(config)
    model, repeated = config["model"], REPEATED.get(str(config["data"].get("_target_")), set())
    moved = {key: model[key] for key in OF_THE_EVALUATION if key in model}
    said = {
        "model": {key: value for key, value in model.items() if key not in moved},
        "data": AS_IT_WAS["data"] | {key: value for key, value in config["data"].items() if key not in repeated},
        "trainer": AS_IT_WAS["trainer"] | config["trainer"],
        "evaluation": AS_IT_WAS["evaluation"] | moved | config.get("evaluation", {}),
    }
    return config | said


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
