"""Models out of checkpoints."""

import os
from typing import TYPE_CHECKING, Any, TypeVar

from flowgen.config.building import build_model
from flowgen.errors import FlowgenError

if TYPE_CHECKING:
    from flowgen.models import GenerativeModel
    from flowgen.training.run import Run


Able = TypeVar("Able", bound="GenerativeModel")


def load_model(run: str | os.PathLike[str], device: str = "cpu") -> "GenerativeModel":
    """See `flowgen.load`."""
    from flowgen.training.find import find_checkpoint

    return model_of(find_checkpoint(str(run))[1], device)


def find_model(name: str | None, device: str, ability: type[Able]) -> tuple["Run", dict[str, Any], Able]:
    """The run of `find_checkpoint`, its checkpoint and its model, which has this ability. Raises FlowgenError where there is none."""
    from flowgen.training.find import find_checkpoint

    run, checkpoint = find_checkpoint(name, ability)
    return run, checkpoint, model_of(checkpoint, device)  # type: ignore[return-value]


def model_of(checkpoint: dict[str, Any], device: str = "cpu") -> "GenerativeModel":
    """The model of a checkpoint that has been read, with its averaged weights where there are any, and what was found of them."""
    from flowgen.training.checkpoint import weights_of
    from flowgen.training.device import choose_device

    model = build_model(checkpoint["config"])
    load_weights(model, weights_of(checkpoint))
    model.recall(checkpoint.get("figures", {}))
    return model.to(choose_device(device)).eval()


def load_weights(model: "GenerativeModel", weights: dict[str, Any]) -> None:
    """Raises FlowgenError where they are another model's, or no numbers."""
    spoilt = [name for name, value in weights.items() if not value.isfinite().all()]
    if spoilt:
        raise FlowgenError(
            f"the checkpoint's {spoilt[0]} is not finite: name an earlier checkpoint, or train again with a lower trainer.lr"
        )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise FlowgenError(
            "the checkpoint's weights are not those of the model that its configuration describes: leave what shapes the model as it was"
        ) from error
