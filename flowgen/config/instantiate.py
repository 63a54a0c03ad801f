"""Objects of the classes that configurations name, from an allow-list of packages."""

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf.errors import OmegaConfBaseException

from flowgen.utils.errors import UserError
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


def resolve_target(section: str, config: dict[str, Any], nested: bool = False) -> type[Any]:
    """Return the class that `_target_` names in a section of a configuration.

    Args:
        section: model, data, trainer or evaluation.
        config: the section, or a part of it.
        nested: whether it is a part, which may name any class of the section's package.

    Raises:
        UserError: for any other class.
    """
    path = str(config.get("_target_"))
    if not path.startswith("flowgen."):
        raise UserError(f"{section}._target_={path} is not part of flowgen")
    try:
        target = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{section}._target_={path} does not exist") from error
    package = ".".join(BASES[section].split(".")[:2])
    if not isinstance(target, type) or not target.__module__.startswith(f"{package}."):
        raise UserError(f"{section}._target_={path} is not a class of {package}")
    if not nested and not issubclass(target, resolve_name(BASES[section])):
        raise UserError(f"{section}._target_={path} does not extend {BASES[section]}")
    return target


def build(section: str, config: dict[str, Any]) -> Any:
    """Build the object that a section of a configuration describes.

    Args:
        section: model, data, trainer or evaluation.
        config: `_target_`, a class of the section's package, and its keyword arguments.

    Raises:
        UserError: for any other class and for arguments that the class refuses.
    """
    check_section(section, section, config)
    try:
        return instantiate(config, _convert_="all")
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

    Raises:
        UserError: for classes outside the allow-list, other keys that start with an underscore,
            and references to other values.
    """
    if isinstance(node, dict):
        if "_target_" in node or key == section:
            resolve_target(section, node, nested=key != section)
        for name, value in node.items():
            if str(name).startswith("_") and name != "_target_":
                raise UserError(f"{key}.{name} is not a setting")
            check_section(section, f"{key}.{name}", value)
    elif isinstance(node, list):
        for value in node:
            check_section(section, key, value)
    elif isinstance(node, str) and ("${" in node or node == "???"):
        raise UserError(f"{key}={node} is a reference, not a value: write its value")


def build_data(config: dict[str, Any]) -> "ImageDataset":
    """Build the data set of a configuration."""
    return build("data", config["data"])


def with_image_shape(
    config: dict[str, Any], shape: tuple[int, int, int], bits: int
) -> dict[str, Any]:
    """Return `config` with the image shape and bits of the data in its model section.

    Args:
        config: a configuration.
        shape: channels, height and width.
        bits: bits per pixel value.
    """
    image_kwargs = resolve_target("model", config["model"]).image_kwargs(shape, bits)
    return config | {"model": image_kwargs | config["model"]}


def build_model(config: dict[str, Any]) -> "GenerativeModel":
    """Build the untrained model of a configuration with an image shape.

    The weights depend on the random state of torch.
    """
    _check_memory(config["model"])
    return build("model", config["model"])


def _check_memory(section: dict[str, Any]) -> None:
    """Raise UserError if the weights alone need more memory than is free."""
    import torch

    try:
        with torch.device("meta"):  # shapes without values
            state = build("model", section).state_dict()
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
        UserError: if the model and the data do not fit each other.
    """
    data = build_data(config)
    config = with_image_shape(config, data.image_shape, data.bits)
    model = build_model(config)
    check_fits_data(model, data)
    return model, data, config


def check_fits_data(model: "GenerativeModel", data: "ImageDataset") -> None:
    """Raise UserError if the images or classes of the data do not fit the model."""
    model_values = (*model.image_shape, model.bits)
    data_values = (*data.image_shape, data.bits)
    for name, expected, actual in zip(
        ("channels", "height", "width", "bits"), model_values, data_values, strict=True
    ):
        if expected != actual:
            raise UserError(
                f"a model with {name}={expected} does not fit data with {name}={actual}: "
                "keep the settings of the run, or train another model"
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
