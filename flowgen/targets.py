"""The classes that configurations name."""

import importlib
from typing import Any

from flowgen.errors import FlowgenError


def class_of(section: str, config: dict[str, Any]) -> type[Any]:
    """The class that `_target_` names in a section of a configuration.

    Raises FlowgenError for what is no class of flowgen's, so that a configuration from a stranger's checkpoint can run no code.
    """
    module, _, name = str(config.get("_target_")).rpartition(".")
    if not module.startswith("flowgen."):
        raise FlowgenError(f"{section}._target_={config.get('_target_')} is not part of flowgen")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise FlowgenError(f"{section}._target_={module}.{name} does not exist") from error
    if not isinstance(target, type) or not target.__module__.startswith("flowgen."):
        raise FlowgenError(f"{section}._target_={module}.{name} is not a class of flowgen")
    return target
