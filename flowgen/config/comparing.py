"""Other data for a trained model: the same shape and bits, another set."""

from pathlib import Path
from typing import Any

from flowgen.config.files import conf_folder, options
from flowgen.config.words import check_words, override
from flowgen.errors import FlowgenError

WHICH = ("_target_", "name", "names", "root")  # what says which images a data section is of


def data_section(words: list[str]) -> dict[str, Any]:
    """What `data=NAME data.KEY=VALUE...` describe, as train would. Raises FlowgenError for a set that there is not."""
    from yaml import safe_load

    check_words(words)
    named = [word.partition("=")[2] for word in words if word.startswith("data=")]
    if len(named) != 1 or named[0] not in options("data"):
        raise FlowgenError(f"{' '.join(words)} names no data: write data= and one of {', '.join(options('data'))}")
    section = safe_load((conf_folder() / "data" / f"{named[0]}.yaml").read_text())
    section = override({"data": section}, [word for word in words if not word.startswith("data=")])["data"]
    if section.get("root") == "???":
        raise FlowgenError(f"data={named[0]} needs data.root: add data.root=FOLDER")
    if section.get("root") is not None:
        section["root"] = str(Path(str(section["root"])).expanduser().resolve())
    return section


def in_shape(section: dict[str, Any], own: dict[str, Any], shape: tuple[int, int, int], bits: int) -> dict[str, Any]:
    """The section with its images made into those that a model of `shape` (channels, height, width) and `bits` takes, as its `own` were."""
    wanted = {"channels": shape[0], "size": shape[1], "bits": bits, "binarise": own.get("binarise", "threshold")}
    return section | {key: value for key, value in wanted.items() if key in section}


def of_the_same_images(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two sections are of one set; where it lies counts only for a folder, which has no other name."""
    keys = WHICH if not one.get("names") and "root" in one else WHICH[:3]
    return all(one.get(key) == other.get(key) for key in keys)
