"""The grammar of overrides, KEY=VALUE."""

from pathlib import Path
from typing import Any

from flowgen.config.files import options
from flowgen.config.sentences import no_such_setting, one_line
from flowgen.errors import FlowgenError
from flowgen.training.formats import OF_THE_EVALUATION

FOLDERS = ("out", "data.root", "init")
SHOWN = 100  # characters of a word that cannot be read
GROUPS = ("data", "model", "trainer")  # of which every run has one
CHOSEN = (*GROUPS, "experiment", "scale", "model/negative_phase")


def check_words(words: list[str]) -> None:
    """Raises FlowgenError for what is no KEY=VALUE, and for folders without a name, which would be the one that the user is in."""
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith(("+", "~")):
            raise FlowgenError(f"{word}: settings can be changed, but none can be added or removed: write KEY=VALUE")
        if not equals or not key or key.startswith("-"):
            raise FlowgenError(f"{word!r} is no override: write KEY=VALUE, as in trainer.steps=2000")
        if key in GROUPS and value.strip() in ("", "null"):
            raise FlowgenError(f"{word} chooses nothing: write {key}=NAME, one of {', '.join(options(key))}")
        if key in FOLDERS and not value.strip("'\" "):
            raise FlowgenError(f"{word} is empty: name a folder, or leave it out")
        section, _, name = key.partition(".")
        if section == "model" and name in OF_THE_EVALUATION:
            raise FlowgenError(f"{key} is no setting of the model: write evaluation.{name}={value}, or `flowgen evaluate {name}={value}`")


def in_grammar(words: list[str]) -> list[str]:
    """`words` as Hydra's grammar reads them: quotes around folders that it cannot read bare, as in data.root=~/faces=(new).

    Raises FlowgenError for any other value that it cannot read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()

    def read(word: str) -> str:
        key, equals, value = word.partition("=")
        if not equals:
            return word
        try:
            number = isinstance(parser.parse_override(word).value(), int | float | dict)
            return f"{key}='{value}'" if number and key in CHOSEN else word  # no choice, as Hydra can say of words alone
        except (HydraException, ValueError) as error:  # ValueError: a number of thousands of digits
            if key in FOLDERS:
                value = str(Path(value).expanduser()).replace("'", r"\'")
                return f"{key}='{value}'"
            shown = word if len(word) < SHOWN else f"{word[:SHOWN]}..."
            raise FlowgenError(
                f"{shown} cannot be read: close its brackets, and put quotes around odd characters, as in \"{key}='...'\""
            ) from error

    return [read(word) for word in words]


def one_end(words: list[str]) -> list[str]:
    """Training ends by steps or by minutes: where only one of them is set by hand, the other's default is dropped."""
    given = [limit for limit in ("steps", "minutes") if any(word.lstrip("+").startswith(f"trainer.{limit}=") for word in words)]
    other = {"steps": "minutes", "minutes": "steps"}
    return [*words, f"trainer.{other[given[0]]}=null"] if len(given) == 1 else words


def name_folders(words: list[str]) -> str:
    """The word by which Hydra names the folders of a sweep's runs."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    swept = [word.key_or_group for word in OverridesParser.create().parse_overrides(words) if word.is_sweep_override()]
    return f"hydra.sweep.subdir=${{flowgen.folder:[{','.join(swept)}]}}"


def override(config: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`config` with KEY=VALUE words applied, in Hydra's grammar. Raises FlowgenError for a key that it lacks, or a list to sweep over."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigAttributeError, OmegaConfBaseException

    check_words(overrides)
    tree: Any = OmegaConf.create(config)
    OmegaConf.set_struct(tree, True)
    try:
        for word in OverridesParser.create().parse_overrides(in_grammar(overrides)):
            if word.is_sweep_override():
                raise FlowgenError(f"{word.input_line} names several values: give one, or sweep with `flowgen train -m`")
            if "${" in str(word.value()):
                raise FlowgenError(
                    f"{word.input_line} refers by ${{...}} to something else, which is for `flowgen train` alone: write the value"
                )
            if isinstance(config.get(word.key_or_group), dict):
                raise FlowgenError(
                    f"{word.input_line} would replace a whole section of the run: set its values one by one, as in trainer.device=cuda"
                )
            OmegaConf.update(tree, word.key_or_group, word.value(), merge=True)
    except ConfigAttributeError as error:
        known = [f"{section}.{key}" for section, group in config.items() if isinstance(group, dict) for key in group]
        raise no_such_setting(str(error.full_key), known) from error
    except OmegaConfBaseException as error:
        raise FlowgenError(one_line(error)) from error
    return OmegaConf.to_container(tree)  # type: ignore[return-value]


def plain(cfg: Any) -> dict[str, Any]:
    """A configuration as dicts and lists, every reference resolved. Raises FlowgenError for a value that is missing, or refers to none."""
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise FlowgenError(f"{error.full_key} is not set: set it, as in {error.full_key}=...") from error
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None) or "a value"
        raise FlowgenError(f"{key} refers by ${{...}} to what there is not, or to itself: write its value") from error
