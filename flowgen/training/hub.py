"""Models on the Hugging Face Hub, by the package huggingface_hub; HF_ENDPOINT names another server of its kind, HF_TOKEN who one is."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowgen.errors import FlowgenError
from flowgen.training.portable import SUFFIX

PREFIX = "hf:"
FILE = f"model{SUFFIX}"
NAME = re.compile(r"[A-Za-z0-9][\w-]*(\.[\w-]+)*/[A-Za-z0-9][\w-]*(\.[\w-]+)*", re.ASCII)


def check_name(name: str) -> str:
    """Raises FlowgenError for what is no OWNER/NAME."""
    if not NAME.fullmatch(name):
        raise FlowgenError(f"{name!r} is no name of a model on the Hub: write OWNER/NAME, of letters, digits, and - _ . between them")
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
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise FlowgenError("models on the Hub need the package huggingface_hub: pip install 'flowgen[hub]'") from error
    try:
        yield huggingface_hub
    except LocalEntryNotFoundError as error:
        raise FlowgenError(f"{name} is not here yet, and the Hub does not answer: try again when it does") from error
    except RepositoryNotFoundError as error:
        raise FlowgenError(f"{name} is not on the Hub, or not yours to see: check its name, or log in with HF_TOKEN") from error
    except EntryNotFoundError as error:
        raise FlowgenError(f"{name} on the Hub is no model of flowgen, which has a {FILE}: name another with --run") from error
    except Exception as error:  # what the package and its clients raise has no base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FlowgenError(f"the Hub did not do it for {name} ({reason}): log in with HF_TOKEN, or try again later") from error
