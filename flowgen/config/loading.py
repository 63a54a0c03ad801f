"""Models out of checkpoints."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flowgen.config.compose import check_overrides, conf_folder, group_options, override
from flowgen.config.instantiate import build_model
from flowgen.utils.errors import UserError

if TYPE_CHECKING:
    from flowgen.models.base import GenerativeModel
    from flowgen.training.run_dir import Run


Able = TypeVar("Able", bound="GenerativeModel")


def load_model(run: str | os.PathLike[str], device: str = "cpu") -> "GenerativeModel":
    """See `flowgen.load`."""
    from flowgen.config.runs import find_checkpoint

    return load_from_checkpoint(find_checkpoint(str(run))[1], device)


def find_model(
    name: str | None, device: str, ability: type[Able]
) -> tuple["Run", dict[str, Any], Able]:
    """The run of `find_checkpoint`, its checkpoint and its model, which has this ability. Raises FlowgenError where there is none."""
    from flowgen.config.runs import find_checkpoint

    run, checkpoint = find_checkpoint(name, ability)
    return run, checkpoint, load_from_checkpoint(checkpoint, device)  # type: ignore[return-value]


def load_from_checkpoint(checkpoint: dict[str, Any], device: str = "cpu") -> "GenerativeModel":
    """The model of a checkpoint that has been read, with its averaged weights where there are any, and what was found of them."""
    from flowgen.training.checkpoint import eval_weights
    from flowgen.training.device import choose_device

    model = build_model(checkpoint["config"])
    load_weights(model, eval_weights(checkpoint))
    model.load_eval_results(checkpoint.get("metrics", {}))
    return model.to(choose_device(device)).eval()


def load_weights(model: "GenerativeModel", weights: dict[str, Any]) -> None:
    """Raises FlowgenError where they are another model's, or no numbers."""
    spoilt = [name for name, value in weights.items() if not value.isfinite().all()]
    if spoilt:
        raise UserError(
            f"the checkpoint's {spoilt[0]} is not finite: name an earlier checkpoint, or train again with a lower trainer.lr"
        )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            "the checkpoint's weights are not those of the model that its configuration describes: leave what shapes the model as it was"
        ) from error


WHICH = ("_target_", "name", "search_dirs", "root")  # what says which images a data section is of


def data_section(words: list[str]) -> dict[str, Any]:
    """What `data=NAME data.KEY=VALUE...` describe, as train would. Raises FlowgenError for a set that there is not."""
    from yaml import safe_load

    check_overrides(words)
    named = [word.partition("=")[2] for word in words if word.startswith("data=")]
    if len(named) != 1 or named[0] not in group_options("data"):
        raise UserError(
            f"{' '.join(words)} names no data: write data= and one of {', '.join(group_options('data'))}"
        )
    section = safe_load((conf_folder() / "data" / f"{named[0]}.yaml").read_text())
    section = override({"data": section}, [word for word in words if not word.startswith("data=")])[
        "data"
    ]
    if section.get("root") == "???":
        raise UserError(f"data={named[0]} needs data.root: add data.root=FOLDER")
    if section.get("root") is not None:
        section["root"] = str(Path(str(section["root"])).expanduser().resolve())
    return section


def match_model(
    section: dict[str, Any], own: dict[str, Any], shape: tuple[int, int, int], bits: int
) -> dict[str, Any]:
    """The section with its images made into those that a model of `shape` (channels, height, width) and `bits` takes, as its `own` were."""
    wanted = {
        "channels": shape[0],
        "size": shape[1],
        "bits": bits,
        "binarization": own.get("binarization", "threshold"),
    }
    return section | {key: value for key, value in wanted.items() if key in section}


def same_dataset(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two sections are of one set; where it lies counts only for a folder, which has no other name."""
    keys = WHICH if not one.get("search_dirs") and "root" in one else WHICH[:3]
    return all(one.get(key) == other.get(key) for key in keys)
