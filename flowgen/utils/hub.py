"""The Hugging Face Hub, and sentences for its errors."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flowgen.utils.errors import UserError, user_error

NAME = re.compile(r"[A-Za-z0-9][\w-]*(\.[\w-]+)*/[A-Za-z0-9][\w-]*(\.[\w-]+)*", re.ASCII)


def check_name(name: str, kind: str) -> str:
    """Return a name on the Hub if it has the form OWNER/NAME, else raise UserError.

    Args:
        name: A name.
        kind: The noun for it, such as "model".
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is not the name of a {kind} on the Hub: write OWNER/NAME with letters and "
            "digits, and - _ . between them"
        )
    return name


@contextmanager
def open_hub(name: str, missing: str) -> Iterator[Any]:
    """Yield the package huggingface_hub and turn its errors into UserError.

    Args:
        name: OWNER/NAME on the Hub.
        missing: Message for a file that does not exist on the Hub.
    """
    with user_error("the Hub needs the package huggingface_hub: pip install huggingface_hub"):
        import huggingface_hub
        from huggingface_hub import errors
    try:
        yield huggingface_hub
    except UserError:
        raise
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{name} is not in the cache and the Hub does not answer: try again later"
        ) from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} is gated: accept its terms on its page on the Hub, and log in with HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name} is not on the Hub or is private: check the name, or log in with HF_TOKEN"
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(missing) from error
    except Exception as error:  # errors of the package and its HTTP client have no common base
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"the request to the Hub failed for {name} ({reason}): log in with HF_TOKEN, "
            "or try again later"
        ) from error
