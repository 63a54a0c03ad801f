"""Models from checkpoints, and data sections for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flowgen.config.compose import compose_config
from flowgen.config.instantiate import build_model
from flowgen.config.runs import find_checkpoint
from flowgen.config.settings import group_options
from flowgen.training.checkpoint import eval_weights
from flowgen.training.run_dir import Run
from flowgen.utils.errors import UserError

if TYPE_CHECKING:
    from flowgen.models.base import GenerativeModel

ModelT = TypeVar("ModelT", bound="GenerativeModel")
DATASET_KEYS = ("_target_", "name", "search_dirs")  # identify a data set


def find_model(
    run: str | None, device: str, capability: type[ModelT]
) -> tuple[Run, dict[str, Any], ModelT]:
    """Find a run, or the most recent one with a capability, and load its model.

    Returns:
        The run, its checkpoint and the model.

    Raises:
        UserError: if there is no such run, or its model lacks the capability.
    """
    found, checkpoint = find_checkpoint(run, capability)
    return found, checkpoint, load_from_checkpoint(checkpoint, device)  # type: ignore[return-value]


def load_from_checkpoint(checkpoint: dict[str, Any], device: str = "cpu") -> "GenerativeModel":
    """Build the model of a checkpoint with its EMA weights, if any, and its evaluation results."""
    from flowgen.training.device import choose_device

    model = build_model(checkpoint["config"])
    load_weights(model, eval_weights(checkpoint))
    model.load_eval_results(checkpoint.get("metrics", {}))
    return model.to(choose_device(device)).eval()


def load_weights(model: "GenerativeModel", weights: dict[str, Any]) -> None:
    """Load weights into a model.

    Raises:
        UserError: if they are not finite or belong to another model.
    """
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UserError(
                f"{name} of the checkpoint is not finite: choose an earlier checkpoint, "
                "or train again with a lower trainer.lr"
            )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            "the weights of the checkpoint do not fit the model of its configuration: "
            "keep the model settings of the run"
        ) from error


def data_section(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the data section of `data=NAME data.KEY=VALUE...`, as `flowgen train` composes it.

    Raises:
        UserError: for an unknown data set or a data set without its root.
    """
    keys = [text.partition("=")[0] for text in overrides]
    if keys.count("data") != 1 or not all(key.partition(".")[0] == "data" for key in keys):
        names = ", ".join(group_options("data"))
        raise UserError(
            f"{' '.join(overrides)} does not name a data set: write data= and one of {names}"
        )
    section: dict[str, Any] = compose_config(overrides)[0]["data"]
    if section.get("root") is not None:
        section["root"] = absolute_path(section["root"])
    return section


def absolute_path(path: Any) -> str:
    """Return a path that stays valid in another working directory."""
    return str(Path(str(path)).expanduser().resolve())


def match_model(
    section: dict[str, Any], own: dict[str, Any], shape: tuple[int, int, int], bits: int
) -> dict[str, Any]:
    """Return a data section whose images have the shape and bits of a model.

    Args:
        section: the data section to change.
        own: the data section that the model was trained with.
        shape: channels, height and width of the model's images.
        bits: bits per pixel value of the model's images.
    """
    wanted = {
        "channels": shape[0],
        "size": shape[1],
        "bits": bits,
        "binarization": own.get("binarization", "threshold"),
    }
    return section | {key: value for key, value in wanted.items() if key in section}


def same_dataset(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return whether two data sections describe the same data set.

    The root counts only for folders, which have no other name.
    """
    is_folder = not first.get("search_dirs") and "root" in first
    keys = (*DATASET_KEYS, "root") if is_folder else DATASET_KEYS
    return all(first.get(key) == second.get(key) for key in keys)
