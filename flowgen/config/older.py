"""Configurations of older runs in today's words."""

from typing import Any

from flowgen.config.files import evaluation_defaults

OF_THE_EVALUATION = {"draws": 1, "betas": 10000, "chains": 256}  # once settings of the model, with these defaults

AS_IT_WAS = {"devices": None, "memory": "keep"}


def in_todays_words(config: dict[str, Any]) -> dict[str, Any]:
    """A run's `config` with a section `evaluation`, where older ones say in the model's how to evaluate, if they say it at all.

    What its trainer does not say yet is as it was.
    """
    moved = {key: config["model"][key] for key, default in OF_THE_EVALUATION.items() if config["model"].get(key, default) != default}
    model = {key: value for key, value in config["model"].items() if key not in OF_THE_EVALUATION}
    trainer = {"trainer": AS_IT_WAS | config["trainer"]} if "trainer" in config else {}
    return config | trainer | {"model": model, "evaluation": evaluation_defaults() | moved | config.get("evaluation", {})}
