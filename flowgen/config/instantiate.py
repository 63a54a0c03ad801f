"""The classes that configurations name."""

import importlib
from typing import TYPE_CHECKING, Any

from flowgen.utils.errors import UserError
from flowgen.utils.memory import free_memory

ROOMS = {
    "data": "flowgen.data",
    "trainer": "flowgen.training.trainer",
}  # where the classes of a section are; the others' are models


def resolve_target(section: str, config: dict[str, Any]) -> type[Any]:
    """The class that `_target_` names in a section of a configuration.

    Raises FlowgenError for what is no class of flowgen's for this purpose, so that a configuration from a stranger's checkpoint can run
    no code.
    """
    module, _, name = str(config.get("_target_")).rpartition(".")
    if not module.startswith("flowgen."):
        raise UserError(f"{section}._target_={config.get('_target_')} is not part of flowgen")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{section}._target_={module}.{name} does not exist") from error
    room = ROOMS.get(section, "flowgen.models")
    if not isinstance(target, type) or not f"{target.__module__}.".startswith(f"{room}."):
        raise UserError(f"{section}._target_={module}.{name} is not a class of {room}")
    return target


if TYPE_CHECKING:
    from flowgen.data.dataset import ImageDataset
    from flowgen.models.base import GenerativeModel


def build(section: str, config: dict[str, Any]) -> Any:
    """The object that a section of a configuration describes: `_target_`, a class of flowgen, called with all the rest.

    Raises FlowgenError for any other target, and for arguments that the class refuses.
    """
    arguments = {
        key: build(key, value) if _is_node(value) else value
        for key, value in config.items()
        if key != "_target_"
    }
    target = resolve_target(section, config)
    try:
        return target(**arguments)
    except UserError as error:
        message = str(error)
        raise UserError(message if f"{section}." in message else f"{section}: {message}") from error
    except TypeError as error:
        raise UserError(f"{section}: {error}") from error


def _is_node(value: object) -> bool:
    return isinstance(value, dict) and "_target_" in value


def build_data(config: dict[str, Any]) -> "ImageDataset":
    from flowgen.data.dataset import ImageDataset

    section = config["data"]
    data = build("data", section)
    if not isinstance(data, ImageDataset):
        raise UserError(f"data._target_={section['_target_']} is no data set")
    return data


def with_image_shape(
    config: dict[str, Any], shape: tuple[int, int, int], bits: int
) -> dict[str, Any]:
    """`config` with a model section that says what images the model is of, as a run keeps it: all that `build_model` needs."""
    stated = _model_class(config["model"]).image_kwargs(shape, bits)
    return config | {"model": stated | config["model"]}


def build_model(config: dict[str, Any]) -> "GenerativeModel":
    """The untrained model of a configuration from `model_for`; its weights depend on torch's random state."""
    section = config["model"]
    _model_class(section)
    _check_memory(section)
    return build("model", section)


def _check_memory(section: dict[str, Any]) -> None:
    """Raise FlowgenError where its numbers alone are more than the memory that is free: counted on a device that has shapes alone."""
    import torch

    try:
        with torch.device("meta"):
            state = build("model", section).state_dict()
    except (NotImplementedError, RuntimeError):  # a constructor that looks at values
        return
    needed, free = sum(value.nbytes for value in state.values()), free_memory()
    if needed > free:
        of_it = f"needs {needed / 2**30:,.0f} GiB of memory for its weights alone, and {free / 2**30:,.1f} GiB are free"
        raise UserError(
            f"model: it {of_it}: choose a smaller model.width, model.hidden or data.size"
        )


def _model_class(section: dict[str, Any]) -> type["GenerativeModel"]:
    from flowgen.models.base import GenerativeModel

    found = resolve_target("model", section)
    if not issubclass(found, GenerativeModel):
        raise UserError(f"model._target_={section['_target_']} is no model")
    return found


def build_model_and_data(
    config: dict[str, Any],
) -> tuple["GenerativeModel", "ImageDataset", dict[str, Any]]:
    """The model, its data, and the configuration from `model_for`.

    Raises FlowgenError where a trained model is of other images than the data: every figure would be wrong.
    """
    data = build_data(config)
    config = with_image_shape(config, data.image_shape, data.bits)
    model = build_model(config)
    check_fits_data(model, data)
    return model, data, config


def check_fits_data(model: "GenerativeModel", data: "ImageDataset") -> None:
    """Raise FlowgenError where a model is of other images than the data."""
    pairs = zip(
        ("channels", "height", "width", "bits"),
        (*model.image_shape, model.bits),
        (*data.image_shape, data.bits),
        strict=True,
    )
    for name, of_model, of_data in pairs:
        if of_model != of_data:
            raise UserError(
                f"a model of {name}={of_model} does not fit data of {name}={of_data}: leave it as it was, or train another"
            )
    if model.num_classes is not None and data.num_classes is None:
        raise UserError(
            f"model.num_classes={model.num_classes} needs labels, which this data has not: leave it out, or give every class a folder"
        )
    if model.num_classes not in (None, data.num_classes):
        raise UserError(
            f"model.num_classes={model.num_classes} does not fit the {data.num_classes} classes of the data: set it to {data.num_classes}"
        )
