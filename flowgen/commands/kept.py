"""What was found of a run's weights, which takes long and is kept with the run."""

import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from flowgen.training.checkpoint import digest_of
from flowgen.training.run import Run


def kept(run: Run, checkpoint: dict[str, Any], kind: str, settings: object, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `find` finds of these weights under these `settings`: numbers and tensors, in a file of the run's folder from then on.

    Those of this `kind` that were found of other weights make room for it.
    """
    weights, how = digest_of(checkpoint), hashlib.blake2s(repr(settings).encode(), digest_size=4).hexdigest()
    path = run.folder / f"{kind}_{weights}_{how}.pt"
    with suppress(Exception):  # none yet, or one that is damaged, over which the unpickler may stumble in any way
        return torch.load(path, weights_only=True)
    found, aside = find(), path.with_name(f"{path.name}.part")
    with suppress(OSError, RuntimeError):  # a folder that is not ours to write to, or a full disk, which torch.save reports as the latter
        try:
            torch.save(found, aside)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        for older in run.folder.iterdir():
            if re.fullmatch(rf"{kind}_[0-9a-f]{{16}}_[0-9a-f]{{8}}\.pt", older.name) and weights not in older.name:
                older.unlink()
    return found
