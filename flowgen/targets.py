"""The classes that configurations name."""

import importlib
from typing import Any

from flowgen.errors import FlowgenError

ROOMS = {"data": "flowgen.data", "trainer": "flowgen.training.trainer"}  # where the classes of a section are; the others' are models


def class_of(section: str, config: dict[str, Any]) -> type[Any]:
    """The class that `_target_` names in a section of a configuration.

    Raises FlowgenError for what is no class of flowgen's for this purpose, so that a configuration from a stranger's checkpoint can run
    no code.
    """
    module, _, name = str(config.get("_target_")).rpartition(".")
    if not module.startswith("flowgen."):
        raise FlowgenError(f"{section}._target_={config.get('_target_')} is not part of flowgen")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise FlowgenError(f"{section}._target_={module}.{name} does not exist") from error
    room = ROOMS.get(section, "flowgen.models")
    if not isinstance(target, type) or not f"{target.__module__}.".startswith(f"{room}."):
        raise FlowgenError(f"{section}._target_={module}.{name} is not a class of {room}")
    return target
