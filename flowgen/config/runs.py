"""Runs by name: a folder, a checkpoint file, or a name under `outputs/`."""

import contextlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from yaml import YAMLError, safe_load

from flowgen.config.instantiate import resolve_target
from flowgen.training.checkpoint import (
    MAX_CONFIG_BYTES,
    SUFFIX,
    ZOO,
    read_checkpoint,
    read_safetensors,
    zoo_file,
)
from flowgen.training.run_dir import Run
from flowgen.utils.errors import UserError

if TYPE_CHECKING:
    from flowgen.models.base import Capability

OUTPUTS = Path("outputs")


def list_runs(*folders: Path) -> list[Run]:
    """Every run under these folders, by default under `outputs/`, the newest first."""
    configs = [
        path
        for folder in folders or (OUTPUTS,)
        if folder.is_dir()
        for path in folder.rglob("config.yaml")
        if path.is_file()
    ]
    return [
        Run(path.parent)
        for path in sorted(configs, key=lambda path: path.stat().st_mtime, reverse=True)
    ]


def find_run(name: str) -> Run:
    """The run whose folder, checkpoint or name under `outputs/` this is; of a file elsewhere and of zoo and Hub, where its pictures go.

    Raises FlowgenError where there is none, and where its files lead elsewhere.
    """
    run = _named(name)
    run.check_contained()
    return run


def _named(name: str) -> Run:
    if name.startswith(PREFIX):
        return Run(OUTPUTS / "hf" / check_name(name.removeprefix(PREFIX)))
    if name.startswith("zoo/"):
        return Run(OUTPUTS / zoo_file(name).relative_to(ZOO.parent).with_suffix(""))
    file = find_file(name)
    if file is not None:
        return Run(file.parent.parent if _lies_in_a_run(file) else OUTPUTS / "files" / file.stem)
    for path in (Path(name), OUTPUTS / name):
        if path.is_dir() and (path / "config.yaml").exists():
            return Run(path)
    parts = Path(name).parts
    matches = [run for run in list_runs() if parts and run.folder.parts[-len(parts) :] == parts]
    if len(matches) == 1:
        return matches[0]
    raise UserError(
        f"{name or 'an empty name'} is {'several runs' if matches else 'no run'}: `flowgen runs` lists them"
    )


def find_file(name: str) -> Path | None:
    """The file that this names, here or under `outputs/`, None of a run by another name."""
    return next((path for path in (Path(name), OUTPUTS / name) if path.is_file()), None)


def _lies_in_a_run(file: Path) -> bool:
    return file.parent.name == "checkpoints" and file.suffix != SUFFIX


def find_checkpoint(name: str | None, wanted: type | None = None) -> tuple[Run, dict[str, Any]]:
    """The checkpoint file `name`, else the last good checkpoint of the run `name`, else of the newest run.

    It is of a `wanted` model, named by its class or by an ability of `flowgen.models.base`, and comes with the `figures` that an
    evaluation has found for these weights. Raises FlowgenError where there is none.
    """
    if name is None:
        for run in list_runs():
            if (
                _says_it_is_of(run, wanted)
                and (checkpoint := run.latest_valid_checkpoint()) is not None
            ):
                return run, _evaluated(run, checkpoint)
        raise UserError(
            f"no {_kind(wanted)} under outputs/ has a checkpoint: {_how_to_train(wanted)}, or name one with --run"
        )
    run = find_run(name)
    path = find_file(name)
    if name.startswith(("zoo/", PREFIX)):
        checkpoint = read_safetensors(
            download(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else zoo_file(name)
        )
    elif path is not None and path.suffix == SUFFIX:
        checkpoint = read_safetensors(path)
    else:
        checkpoint = read_checkpoint(path) if path else run.latest_valid_checkpoint()
    if checkpoint is None:
        raise UserError(
            f"{run.folder} has no checkpoint yet: `flowgen resume {run.folder}` goes on with it"
        )
    if not _is_of(checkpoint["config"], wanted):
        raise UserError(
            f"{name} is no {_kind(wanted)}, which this command needs: name another with --run, or {_how_to_train(wanted)}"
        )
    with contextlib.suppress(
        OSError
    ):  # of a file elsewhere, for what the command makes, unless --out says where
        run.folder.mkdir(parents=True, exist_ok=True)
    return run, _evaluated(run, checkpoint)


def _evaluated(run: Run, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """With the `figures` that an evaluation found for these weights: a portable file brings its own."""
    return checkpoint | {"metrics": checkpoint.get("metrics", {}) | run.load_evaluation(checkpoint)}


def _says_it_is_of(run: Run, wanted: type | None) -> bool:
    """Whether the run's folder describes a `wanted` model: it is read sooner than a checkpoint."""
    with contextlib.suppress(OSError, YAMLError, ValueError, RecursionError):
        run.check_contained()
        config = (
            safe_load(run.config.read_text())
            if run.config.stat().st_size <= MAX_CONFIG_BYTES
            else None
        )
        return isinstance(config, dict) and _is_of(config, wanted)
    return False


def _is_of(config: dict[str, Any], wanted: type | None) -> bool:
    """Whether it describes a `wanted` model. Raises FlowgenError where its model is none of flowgen's classes."""
    if wanted is None:
        return True
    from flowgen.models.base import GenerativeModel

    model = resolve_target("model", config.get("model") or {})
    return issubclass(model, GenerativeModel) and model.supports(wanted, config["model"])


def _is_ability(wanted: type) -> TypeGuard[type["Capability"]]:
    from flowgen.models.base import Capability

    return Capability in wanted.__bases__


def _kind(wanted: type | None) -> str:
    from flowgen.models.base import GenerativeModel

    if wanted in (None, GenerativeModel):
        return "run"
    if _is_ability(wanted):
        return f"run of a model that {wanted.description}"
    return f"run of {'an' if wanted.__name__.isupper() else 'a'} {wanted.__name__}"


def _how_to_train(wanted: type | None) -> str:
    from flowgen.models.flows.glow import Glow

    if wanted is None or (issubclass(Glow, wanted) and not _is_ability(wanted)):
        words = ""
    else:
        words = (
            f" {wanted.train_hint}" if _is_ability(wanted) else f" model={wanted.__name__.lower()}"
        )
    return f"train one with `flowgen train{words}`"


PREFIX = "hf:"
FILE = f"model{SUFFIX}"
NAME = re.compile(r"[A-Za-z0-9][\w-]*(\.[\w-]+)*/[A-Za-z0-9][\w-]*(\.[\w-]+)*", re.ASCII)


def check_name(name: str) -> str:
    """Raises FlowgenError for what is no OWNER/NAME."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no name of a model on the Hub: write OWNER/NAME, of letters, digits, and - _ . between them"
        )
    return name


def download(name: str) -> Path:
    """The file of the model OWNER/NAME, in the package's own cache, got anew where it has changed. Raises FlowgenError."""
    with _hub(check_name(name)) as hub:
        return Path(hub.hf_hub_download(name, FILE, library_name="flowgen"))


def upload(folder: Path, name: str, private: bool) -> str:
    """The files of a folder as the model OWNER/NAME, which is made where it is not there: its address. Raises FlowgenError."""
    with _hub(check_name(name)) as hub:
        api = hub.HfApi(library_name="flowgen")
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="A model of flowgen")
    return str(address)


@contextmanager
def _hub(name: str) -> Iterator[Any]:
    try:
        import huggingface_hub
        from huggingface_hub.errors import (
            EntryNotFoundError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise UserError(
            "models on the Hub need the package huggingface_hub: pip install 'flowgen[hub]'"
        ) from error
    try:
        yield huggingface_hub
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name} is not here yet, and the Hub does not answer: try again when it does"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name} is not on the Hub, or not yours to see: check its name, or log in with HF_TOKEN"
        ) from error
    except EntryNotFoundError as error:
        raise UserError(
            f"{name} on the Hub is no model of flowgen, which has a {FILE}: name another with --run"
        ) from error
    except Exception as error:  # what the package and its clients raise has no base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"the Hub did not do it for {name} ({reason}): log in with HF_TOKEN, or try again later"
        ) from error
