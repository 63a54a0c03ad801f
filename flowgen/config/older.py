"""Configurations of older runs in today's words."""

from typing import Any

from flowgen.config.files import evaluation_defaults

OF_THE_EVALUATION = ("draws", "betas", "chains")  # once settings of the model


def in_todays_words(config: dict[str, Any]) -> dict[str, Any]:
    """A run's `config` with a section `evaluation`, where older ones say in the model's how to evaluate."""
    moved = {key: value for key, value in config["model"].items() if key in OF_THE_EVALUATION}
    model = {key: value for key, value in config["model"].items() if key not in OF_THE_EVALUATION}
    return config | {"model": model, "evaluation": evaluation_defaults() | moved | config.get("evaluation", {})}
