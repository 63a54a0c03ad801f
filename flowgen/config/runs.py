"""Find runs and load their models, by folder, file, name or from the Hugging Face Hub."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flowgen.config.compose import read_config
from flowgen.config.instantiate import build_model, resolve_target
from flowgen.config.settings import group_options
from flowgen.training.checkpoint import (
    EXPORT_SUFFIX,
    ZOO,
    eval_weights,
    read_checkpoint,
    read_safetensors,
    zoo_file,
)
from flowgen.training.run_dir import Run
from flowgen.utils.errors import UserError, user_error
from flowgen.utils.hub import check_name, open_hub
from flowgen.utils.toy2d import is_toy2d

if TYPE_CHECKING:
    from flowgen.models.base import GenerativeModel

ModelT = TypeVar("ModelT", bound="GenerativeModel")
OUTPUTS = Path("outputs")
HUB_PREFIX = "hf:"  # of names on the Hub
HUB_FILE = f"model{EXPORT_SUFFIX}"  # of a model on the Hub


def list_runs(*folders: Path) -> list[Run]:
    """Return all runs under the folders, by default under `outputs/`, the newest first."""
    configs = [
        path
        for folder in folders or (OUTPUTS,)
        if folder.is_dir()
        for path in folder.rglob("config.yaml")
        if path.is_file()
    ]
    configs.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [Run(path.parent) for path in configs]


def find_run(name: str) -> Run:
    """Return a run by its folder, a checkpoint in it, or its name under `outputs/`.

    The run of a file elsewhere, of the zoo or of the Hub is a folder under `outputs/` for what
    commands write.

    Raises:
        UserError: If there is no such run, or if its files are links to other folders.
    """
    run = _find_named(name)
    run.check_contained()
    return run


def _find_named(name: str) -> Run:
    if name.startswith(HUB_PREFIX):
        return Run(OUTPUTS / "hf" / check_name(name.removeprefix(HUB_PREFIX), "model"))
    if name.startswith("zoo/"):
        return Run(OUTPUTS / zoo_file(name).relative_to(ZOO.parent).with_suffix(""))
    file = find_file(name)
    if file is not None:
        in_run = file.parent.name == "checkpoints" and file.suffix != EXPORT_SUFFIX
        return Run(file.parent.parent if in_run else OUTPUTS / "files" / file.stem)
    parts = Path(name).parts
    folders = [path for path in (Path(name), OUTPUTS / name) if (path / "config.yaml").exists()]
    matches = [Run(folder) for folder in folders[:1]] or [
        run for run in list_runs() if parts and run.folder.parts[-len(parts) :] == parts
    ]
    if len(matches) == 1:
        return matches[0]
    problem = "is the name of several runs" if matches else "is not a run"
    raise UserError(f"{name or 'an empty name'} {problem}: `flowgen runs` lists all runs")


def find_file(name: str) -> Path | None:
    """Return the file `name`, here or under `outputs/`, or None if there is no such file."""
    return next((path for path in (Path(name), OUTPUTS / name) if path.is_file()), None)


def find_checkpoint(name: str | None, capability: type = object) -> tuple[Run, dict[str, Any]]:
    """Return a run and its checkpoint, with the results of an evaluation of these weights.

    Args:
        name: A checkpoint file, or a run, of which the last valid checkpoint is read. None: the
            newest run with a checkpoint of a model with the capability.
        capability: A model class or a capability of `flowgen.models.base` that the model must have.

    Raises:
        UserError: If there is no such checkpoint.
    """
    if name is None:
        run, checkpoint = _newest_checkpoint(capability)
    else:
        run = find_run(name)
        checkpoint = _read_named(name, run)
        if not supports(checkpoint["config"], capability):
            raise UserError(
                f"{name} is not a {_kind(capability)}, which this command needs: choose "
                f"another with --run, or {_training_hint(capability)}"
            )
        # The results of an included model or of a file need a folder under outputs/.
        with contextlib.suppress(OSError):  # the command may write elsewhere
            run.folder.mkdir(parents=True, exist_ok=True)
    results = checkpoint.get("metrics", {}) | run.load_evaluation(checkpoint)
    return run, checkpoint | {"metrics": results}


def _newest_checkpoint(capability: type) -> tuple[Run, dict[str, Any]]:
    for run in list_runs():
        checkpoint = run.latest_valid_checkpoint() if _describes(run, capability) else None
        if checkpoint is not None:
            return run, checkpoint
    raise UserError(
        f"no {_kind(capability)} under outputs/ has a checkpoint: {_training_hint(capability)}, "
        "or choose one with --run"
    )


def _read_named(name: str, run: Run) -> dict[str, Any]:
    if name.startswith(HUB_PREFIX):
        return read_safetensors(download(name.removeprefix(HUB_PREFIX)))
    file = zoo_file(name) if name.startswith("zoo/") else find_file(name)
    if file is not None:
        return read_safetensors(file) if file.suffix == EXPORT_SUFFIX else read_checkpoint(file)
    checkpoint = run.latest_valid_checkpoint()
    if checkpoint is None:
        raise UserError(f"{run.folder} has no checkpoint yet: `flowgen resume {run.folder}`")
    return checkpoint


def _describes(run: Run, capability: type) -> bool:
    """Return whether the model of the run's config.yaml, a small file, has the capability."""
    with contextlib.suppress(UserError):
        run.check_contained()
        return supports(read_config(run.config), capability)
    return False


def supports(config: dict[str, Any], capability: type) -> bool:
    """Return whether the model of a run has a capability with its settings."""
    return bool(resolve_target("model", config["model"]).supports(capability, config["model"]))


def _kind(capability: type) -> str:
    """Return a phrase such as `run of a model that fills in missing pixels`."""
    from flowgen.models.base import GenerativeModel

    if issubclass(GenerativeModel, capability):  # any model will do
        return "run"
    if description := vars(capability).get("description"):  # of a capability
        return f"run of a model that {description}"
    return f"run of {'an' if capability.__name__.isupper() else 'a'} {capability.__name__}"


def _training_hint(capability: type) -> str:
    """Return the command that trains a model with the capability."""
    name = capability.__name__.lower()
    default = f"model={name if name in group_options('model') else 'glow'}"
    return f"train one with `flowgen train {vars(capability).get('train_hint', default)}`"


def find_model(
    run: str | None, device: str, capability: type[ModelT]
) -> tuple[Run, dict[str, Any], ModelT]:
    """Find a run, or the newest one with a capability, and load its model.

    Args:
        run: The run, or None for the newest one.
        device: "cpu", "cuda" or "auto".
        capability: A model class or a capability of `flowgen.models.base`.

    Returns:
        The run, its checkpoint and the model.

    Raises:
        UserError: If there is no such run, or its model lacks the capability.
    """
    found, checkpoint = find_checkpoint(run, capability)
    return found, checkpoint, load_from_checkpoint(checkpoint, device)  # type: ignore[return-value]


def load_from_checkpoint(checkpoint: dict[str, Any], device: str = "cpu") -> "GenerativeModel":
    """Build the model of a checkpoint with its EMA weights, if any, and its evaluation results."""
    import torch

    from flowgen.training.device import choose_device

    model = build_model(checkpoint["config"])
    load_weights(model, eval_weights(checkpoint))
    model.load_eval_results(checkpoint.get("metrics", {}))
    model.to(choose_device(device))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as in training
    return model.eval()


def default_temperature(config: dict[str, Any], image_shape: Sequence[int]) -> float:
    """Return the temperature of samples if none is given: that of the run, or 1 for points."""
    return 1.0 if is_toy2d(image_shape) else config["trainer"]["sample_temperature"]


def load_weights(model: "GenerativeModel", weights: dict[str, Any]) -> None:
    """Load weights into a model.

    Raises:
        UserError: If they are not finite or belong to another model.
    """
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UserError(
                f"{name} of the checkpoint is not finite: choose an earlier checkpoint, "
                "or train again with a lower trainer.lr"
            )
    with user_error(
        "the weights of the checkpoint do not fit the model of its configuration: "
        "keep the model settings of the run"
    ):
        model.load_state_dict(weights)


def download(name: str) -> Path:
    """Download the model OWNER/NAME if it is not in the cache, and return its file."""
    with _open_hub(name) as hub:
        return Path(hub.hf_hub_download(name, HUB_FILE, library_name="flowgen"))


def upload(folder: Path, name: str, private: bool) -> str:
    """Upload the files of a folder as the model OWNER/NAME and return its URL.

    Args:
        folder: Folder with the files.
        name: OWNER/NAME.
        private: Whether a new model is private.
    """
    with _open_hub(name) as hub:
        api = hub.HfApi(library_name="flowgen")
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="A model of flowgen")
    return str(url)


def _open_hub(name: str) -> contextlib.AbstractContextManager[Any]:
    return open_hub(
        check_name(name, "model"),
        f"{name} on the Hub is not a model of flowgen, because it has no {HUB_FILE}: "
        "choose another with --run",
    )
