"""Building what a configuration describes."""

import importlib
from typing import TYPE_CHECKING, Any

from flowgen.errors import FlowgenError

if TYPE_CHECKING:
    from flowgen.data import Images
    from flowgen.models import GenerativeModel


def build(section: str, config: dict[str, Any]) -> Any:
    """The object that a section of a configuration describes: `_target_`, a class of flowgen, called with all the rest.

    Raises FlowgenError for any other target, so that a configuration from a stranger's checkpoint can run no code, and for
    arguments that the class refuses.
    """
    arguments = {key: build(key, value) if _is_node(value) else value for key, value in config.items() if key != "_target_"}
    module, _, name = str(config.get("_target_")).rpartition(".")
    if not module.startswith("flowgen."):
        raise FlowgenError(f"{section}._target_={config.get('_target_')} is not part of flowgen")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise FlowgenError(f"{section}._target_={module}.{name} does not exist") from error
    if not isinstance(target, type) or not target.__module__.startswith("flowgen."):
        raise FlowgenError(f"{section}._target_={module}.{name} is not a class of flowgen")
    try:
        return target(**arguments)
    except FlowgenError as error:
        message = str(error)
        raise FlowgenError(message if f"{section}." in message else f"{section}: {message}") from error
    except TypeError as error:
        raise FlowgenError(f"{section}: {error}") from error


def _is_node(value: object) -> bool:
    return isinstance(value, dict) and "_target_" in value


def build_data(config: dict[str, Any]) -> "Images":
    return build("data", config["data"])


def build_model(config: dict[str, Any]) -> "GenerativeModel":
    """The untrained model; its weights depend on torch's random state."""
    return build("model", config["model"])


def build_model_and_data(config: dict[str, Any]) -> tuple["GenerativeModel", "Images"]:
    """Raises FlowgenError where the two do not speak of the same images: every figure would be wrong."""
    model = build_model(config)
    of_data = (*(config["data"].get(key) for key in ("channels", "size", "size")), config["data"].get("bits"))
    for key, of_model, wanted in zip(("channels", "size", "size", "bits"), (*model.shape, model.bits), of_data, strict=True):
        if of_model != wanted:
            raise FlowgenError(f"a model of {key}={of_model} does not fit data.{key}={wanted}: give them the same value, or train another")
    data = build_data(config)
    if model.classes is not None and data.labels is None:
        raise FlowgenError(f"model.classes={model.classes} needs labels, which this data has not: leave it out, or take data=mnist")
    if model.classes is not None and data.labels is not None and (most := int(data.labels[0].max())) != model.classes - 1:
        raise FlowgenError(f"model.classes={model.classes} does not fit labels from 0 to {most}: set it to {most + 1}")
    return model, data
