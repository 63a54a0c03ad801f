"""Instantiate objects from configurations; only allow-listed classes."""

import inspect
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import hydra
from hydra.errors import InstantiationException
from omegaconf.errors import OmegaConfBaseException

from flowgen.config.settings import did_you_mean, yaml_file
from flowgen.utils.errors import UserError, user_error
from flowgen.utils.memory import free_memory

if TYPE_CHECKING:
    from flowgen.data.dataset import ImageDataset
    from flowgen.models.base import GenerativeModel

# A configuration may come from a stranger's checkpoint and must not run other code: a section
# names a subclass of its base, and inside of it other classes of the same package.
BASES = {
    "model": "flowgen.models.base.GenerativeModel",
    "data": "flowgen.data.dataset.ImageDataset",
    "trainer": "flowgen.training.trainer.TrainerConfig",
    "evaluation": "flowgen.models.base.EvalConfig",
}
DATASET_KEYS = ("_target_", "name", "search_dirs")  # identify a data set


def resolve_target(section: str, config: dict[str, Any], nested: bool = False) -> type[Any]:
    """Return the class that `_target_` names in a section of a configuration.

    Args:
        section: model, data, trainer or evaluation.
        config: The section, or a part of it.
        nested: Allow any class of the package (for nested objects).

    Raises:
        UserError: For any other class.
    """
    path = str(config.get("_target_"))
    if not path.startswith("flowgen."):
        raise UserError(f"{section}._target_={path} is not part of flowgen")
    with user_error(f"{section}._target_={path} does not exist"):
        target = resolve_name(path)
    package = ".".join(BASES[section].split(".")[:2])
    if not isinstance(target, type) or not target.__module__.startswith(f"{package}."):
        raise UserError(f"{section}._target_={path} is not a class of {package}")
    if not nested and not issubclass(target, resolve_name(BASES[section])):
        raise UserError(f"{section}._target_={path} does not extend {BASES[section]}")
    return target


def instantiate(section: str, config: dict[str, Any]) -> Any:
    """Instantiate the class that a section of a configuration names.

    Args:
        section: model, data, trainer or evaluation.
        config: `_target_`, a class of the section's package, and its keyword arguments.

    Raises:
        UserError: For any other class and for arguments that the class refuses.
    """
    check_section(section, section, config)
    try:
        return hydra.utils.instantiate(config, _convert_="all")
    except (InstantiationException, OmegaConfBaseException) as error:
        cause = error.__cause__
        if isinstance(cause, InstantiationException):  # of an object in the section
            cause = cause.__cause__
        if cause is not None and not isinstance(cause, UserError | TypeError):
            raise cause from None
        message = str(cause or error).partition("\n")[0]
        prefix = "" if f"{section}." in message else f"{section}: "
        raise UserError(f"{prefix}{message}") from error


def check_section(section: str, key: str, node: Any) -> None:
    """Check everything in a section that `hydra.utils.instantiate` would act on.

    Args:
        section: Section of the configuration, such as "model".
        key: Position of the node in it, as in "model.negative_phase".
        node: The value at this position.

    Raises:
        UserError: For classes outside the allow-list, arguments that they do not have, and
            references to other values.
    """
    if isinstance(node, dict):
        group = key.replace(".", "/")
        known = set(node)
        if "_target_" in node or key == section:
            classes = resolve_target(section, node, nested=key != section).__mro__
            known = {name for cls in classes for name in inspect.signature(cls).parameters}
        for name, value in node.items():
            if name != "_target_" and (str(name).startswith("_") or name not in known):
                raise UserError(
                    f"{key}.{name} is not a setting{did_you_mean(str(name), known)}: "
                    f"see {yaml_file(group, node.get('_target_'))}"
                )
            check_section(section, f"{key}.{name}", value)
    elif isinstance(node, list):
        for value in node:
            check_section(section, key, value)
    elif isinstance(node, str) and ("${" in node or node == "???"):
        raise UserError(f"{key}={node} is a reference, not a value: write its value")


def build_data(config: dict[str, Any]) -> "ImageDataset":
    """Build the data set of a configuration."""
    return instantiate("data", config["data"])


def with_image_shape(
    config: dict[str, Any], shape: tuple[int, int, int], bits: int
) -> dict[str, Any]:
    """Return `config` with the image shape and bits of the data in its model section.

    Args:
        config: A configuration.
        shape: Channels, height and width.
        bits: Bits per pixel value.
    """
    image_kwargs = resolve_target("model", config["model"]).image_kwargs(
        shape, bits, config["data"]
    )
    return config | {"model": image_kwargs | config["model"]}


def build_model(config: dict[str, Any]) -> "GenerativeModel":
    """Build the untrained model of a configuration with an image shape.

    The weights depend on the random state of torch.
    """
    _check_memory(config["model"])
    return instantiate("model", config["model"])


def _check_memory(section: dict[str, Any]) -> None:
    """Raise UserError if the weights alone need more memory than is free."""
    import torch

    try:
        with torch.device("meta"):  # shapes without values
            state = instantiate("model", section).state_dict()
    except (NotImplementedError, RuntimeError):  # a constructor that computes with values
        return
    needed = sum(value.nbytes for value in state.values()) / 2**30
    free = free_memory() / 2**30
    if needed > free:
        raise UserError(
            f"the model needs {needed:,.0f} GiB of memory for its weights alone, and "
            f"{free:,.1f} GiB are free: choose a smaller model.width, model.hidden or data.size"
        )


def build_model_and_data(
    config: dict[str, Any],
) -> tuple["GenerativeModel", "ImageDataset", dict[str, Any]]:
    """Build the model and the data of a configuration.

    Returns:
        The model, the data, and the configuration with the image shape in its model section.

    Raises:
        UserError: If the model and the data do not fit each other.
    """
    data = build_data(config)
    config = with_image_shape(config, data.image_shape, data.bits)
    model = build_model(config)
    check_fits_data(model, data)
    return model, data, config


def check_fits_data(model: "GenerativeModel", data: "ImageDataset") -> None:
    """Raise UserError if the images or classes of the data do not fit the model."""
    for name, expected, actual in zip(
        ("channels", "height", "width", "bits"),
        (*model.image_shape, model.bits),
        (*data.image_shape, data.bits),
        strict=True,
    ):
        if expected != actual:
            raise UserError(
                f"a model with {name}={expected} does not fit data with {name}={actual}: "
                "keep the settings of the run, or train another model"
            )
    density = getattr(model, "density", None)  # that a flow is fitted to
    if density is not None and density != getattr(data, "density", None):
        raise UserError(
            f"a flow fitted to the density {density} does not fit this data: "
            f"set data=energy data.name={density}, or train another model"
        )
    if model.num_classes is not None and data.num_classes is None:
        raise UserError(
            f"model.num_classes={model.num_classes} needs labels, but this data has none: "
            "leave it out, or sort the images into one folder per class"
        )
    if model.num_classes not in (None, data.num_classes):
        raise UserError(
            f"model.num_classes={model.num_classes} does not fit the {data.num_classes} classes "
            f"of the data: set it to {data.num_classes}"
        )


def match_data_to_model(
    section: dict[str, Any], own: dict[str, Any], shape: tuple[int, int, int], bits: int
) -> dict[str, Any]:
    """Return a data section whose images have the shape and bits of a model.

    Args:
        section: The data section to change.
        own: The data section that the model was trained with.
        shape: Channels, height and width of the model's images.
        bits: Bits per pixel value of the model's images.
    """
    changes = {
        "channels": shape[0],
        "size": shape[1] if shape[1] == shape[2] else list(shape[1:]),
        "bits": bits,
        "binarization": own.get("binarization", "threshold"),
    }
    return section | {key: value for key, value in changes.items() if key in section}


def same_dataset(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return whether two data sections describe the same data set.

    The root counts only for folders, which have no other name.
    """
    is_folder = not first.get("search_dirs") and "root" in first
    keys = (*DATASET_KEYS, "root") if is_folder else DATASET_KEYS
    return all(first.get(key) == second.get(key) for key in keys)
