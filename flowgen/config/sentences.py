"""What is wrong with a word or a configuration, in one plain sentence."""

import difflib
import re
from collections.abc import Iterable

from flowgen.config.files import options, settings
from flowgen.errors import FlowgenError

LAUNCHERS = "pip install 'flowgen[slurm]' for submitit_slurm and submitit_local, hydra-joblib-launcher for joblib"


def no_such_setting(name: str, known: Iterable[str]) -> FlowgenError:
    """What is said of a setting that does not exist, with the likeliest that does: one of the same name elsewhere, or of a name like it."""
    known = list(known)
    close = [other for other in known if other.partition(".")[2] == name.partition(".")[2] != ""] or difflib.get_close_matches(
        name, known, 1
    )
    return FlowgenError(f"there is no setting {name}{f', did you mean {close[0]}?' if close else ''}: `flowgen train --help` lists them")


def plain_error(error: BaseException) -> FlowgenError:
    """What Hydra or OmegaConf object to, in flowgen's words."""
    if found := re.search(r"Could not override '([^']+)'", str(error)):
        known = settings()
        if choices := known.get(found[1]):
            return FlowgenError(f"{found[1]} is a setting of {' and '.join(choices)} alone: take one of them, or leave it out")
        return no_such_setting(found[1], known)
    if found := re.search(r"Could not find '([^']+)'\s+Available options in '([^']+)':\n((?:\t.*\n)*)", str(error)):
        path, group, offered = found.groups()
        more = f", or install what brings it: {LAUNCHERS}" * (group == "hydra/launcher")
        name = path.removeprefix(f"{group}/")
        return FlowgenError(f"there is no {group}={name}: choose one of {', '.join(options(group) or offered.split())}{more}")
    return FlowgenError(one_line(error))


def one_line(error: BaseException) -> str:
    """An error's message without the line breaks and the tree that Hydra and OmegaConf print below it."""
    lines = [line.strip() for line in str(error).splitlines()]
    noise = ("full_key:", "object_type=", "reference_type=", "See https", "Config search path", "provider=")
    lines = [line for line in lines if line and not line.startswith(noise)]
    return " ".join(lines) or type(error).__name__
