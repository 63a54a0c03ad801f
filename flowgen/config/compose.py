"""Compose configurations from conf/ and overrides, change, save and read them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2s
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from flowgen.config.settings import (
    GROUPS,
    SECTIONS,
    check_option,
    conf_folder,
    default_trainer,
    did_you_mean,
    flatten,
    group_options,
    setting_names,
    yaml_file,
)
from flowgen.training.untrusted import MAX_CONFIG_BYTES
from flowgen.utils.errors import UserError, user_error
from flowgen.utils.files import atomic_write

LIMITS = ("trainer.steps", "trainer.minutes")
PATH_KEYS = ("output_dir", "data.root", "init_from")
LOCATION_KEYS = ("output_dir", "resume", "data.root", "trainer.device")  # not in names of runs
MAX_SHOWN_CHARS = 100  # of an override in an error message
MAX_NAME_BYTES = 200  # of a run's folder in a sweep; file systems allow 255


@dataclass(frozen=True)
class ComposedConfig:
    """The configuration of a training run.

    Attributes:
        config: The configuration without references.
        note: A note about trainer=auto, or an empty string.
        numbered: True if the name of `output_dir` contains the current time, so that a number can
            be appended to it.
    """

    config: dict[str, Any]
    note: str
    numbered: bool


def compose_config(overrides: Sequence[str]) -> ComposedConfig:
    """Compose the configuration of a training run.

    Hydra composes the options of the groups. The values are set afterwards, with checks that name
    the nearest setting.

    Args:
        overrides: KEY=VALUE and GROUP=NAME, as on the command line.

    Raises:
        UserError: For unknown keys, options and values.
    """
    register_resolvers()
    parsed = parse_overrides(unset_other_limit(overrides))
    groups = [item for item in parsed if item.get_key_element() in GROUPS]
    with hydra_errors(), initialize_config_dir(str(conf_folder()), version_base="1.3"):
        tree: Any = compose(
            "train", [str(item.input_line) for item in groups], return_hydra_config=True
        )
    note = trainer_note(tree.hydra.runtime.choices)
    OmegaConf.set_struct(tree, False)
    set_values(tree, [item for item in parsed if item not in groups])
    numbered = "${now:" in str(OmegaConf.to_container(tree)["output_dir"])  # type: ignore
    with hydra_errors():
        tree.output_dir = str(tree.output_dir)  # refers to the hydra section
    del tree["hydra"]
    return ComposedConfig(resolve_config(tree), note, numbered)


def trainer_note(choices: Any) -> str:
    """Return a log line about the trainer that trainer=auto stands for."""
    return (
        f"trainer=auto is trainer={default_trainer()} on this machine"
        if choices["trainer"] == "auto"
        else ""
    )


def override(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return `config` with KEY=VALUE overrides applied.

    Raises:
        UserError: For unknown keys, lists to sweep over and references to other values.
    """
    parsed = parse_overrides(overrides)
    for item in parsed:
        if "${" in str(item.value()):
            raise UserError(
                f"{item.input_line} refers to another value, which only `flowgen train` allows: "
                "write the value"
            )
    tree: Any = OmegaConf.create(config)
    set_values(tree, parsed)
    return OmegaConf.to_container(tree)  # type: ignore[return-value]


def set_values(tree: Any, overrides: Sequence[Override]) -> None:
    """Set the values of KEY=VALUE overrides in an OmegaConf tree, in place."""
    known = flatten(OmegaConf.to_container(tree))  # type: ignore[arg-type]
    for item in overrides:
        key = item.get_key_element()
        if any(name.startswith(f"{key}.") for name in known):
            group = key.replace(".", "/")
            raise UserError(
                f"{key} is a group of settings: write it with a slash, as in {group}=NAME"
                if group != key and group_options(group)
                else f"{item.input_line} would replace a whole section: set values one by one, "
                "as in trainer.device=cuda"
            )
        if key not in known:
            raise unknown_key_error(key, known)
        with hydra_errors():
            OmegaConf.update(tree, key, item.value(), merge=True)


def unknown_key_error(key: str, known: Mapping[str, Any] = {}) -> UserError:
    """Return an error for an unknown key, with the options that have it or the nearest key.

    Args:
        key: The unknown key.
        known: Keys and values of the configuration, if it is composed already.
    """
    names = setting_names()
    if options := names.get(key):
        return UserError(
            f"{key} is a setting of {', '.join(options)} only: choose one of them, or leave it out"
        )
    candidates = [
        name
        for name in (*known, *names)
        if not name.startswith("hydra.") and not name.endswith("_target_")
    ]
    name = key.partition(".")[2]
    same = [other for other in candidates if name and other.partition(".")[2] == name]
    hint = f", did you mean {same[0]}?" if same else did_you_mean(key, candidates)
    section = (same[0] if same else key).partition(".")[0]
    file = yaml_file(section, known.get(f"{section}._target_"))
    return UserError(f"there is no setting {key}{hint}: see {file}, or `flowgen train --help`")


def parse_overrides(overrides: Sequence[str], multirun: bool = False) -> list[Override]:
    """Check and parse overrides. Paths such as data.root=~/faces=(new) need no quotes.

    Args:
        overrides: KEY=VALUE and GROUP=NAME.
        multirun: Whether they may have several values and settings of Hydra.

    Raises:
        UserError: For overrides that are not KEY=VALUE, and for unknown options.
    """
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        key, value = _split_override(text)
        try:
            item = parser.parse_override(text)
        except (HydraException, ValueError) as error:  # ValueError: a number of thousands of digits
            if key not in PATH_KEYS:
                shown = text if len(text) < MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."
                raise UserError(
                    f"{shown} cannot be parsed: close its brackets, and put quotes around special "
                    f"characters, as in \"{key}='...'\""
                ) from error
            path = str(Path(value).expanduser()).replace("'", r"\'")
            item = parser.parse_override(f"{key}='{path}'")
        if not multirun and (item.is_sweep_override() or key.startswith("hydra")):
            raise UserError(
                f"{text} is for a sweep over several values: give one value, "
                "or sweep with `flowgen train -m`"
            )
        parsed.append(item)
    return parsed


def _split_override(text: str) -> tuple[str, str]:
    """Return the key and the value of an override, after a check of its form."""
    key, equals, value = text.partition("=")
    if text.startswith(("+", "~")):
        raise UserError(f"{text}: settings can be changed, not added or removed: write KEY=VALUE")
    if not equals or not key or key.startswith("-"):
        raise UserError(f"{text!r} is not an override: write KEY=VALUE, as in trainer.steps=2000")
    if key in GROUPS and "(" not in value:
        for name in value.split(","):
            check_option(key, name.strip(" '\""))
    if key in PATH_KEYS and not value.strip("'\" "):
        raise UserError(f"{text} is empty: name a folder, or leave it out")
    return key, value


def unset_other_limit(overrides: Sequence[str]) -> list[str]:
    """Unset trainer.minutes if only trainer.steps is set, and vice versa."""
    pairs = [text.partition("=")[::2] for text in overrides]
    limits = {key: value for key, value in pairs if key in LIMITS}
    if len(limits) == 1 and "null" not in map(str.lower, limits.values()):
        return [*overrides, *(f"{key}=null" for key in LIMITS if key not in limits)]
    return list(overrides)


def resolve_config(tree: Any) -> dict[str, Any]:
    """Return an OmegaConf tree as plain dicts and lists, with all references resolved.

    Raises:
        UserError: For a value that is missing or refers to an unknown one.
    """
    try:
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key} is not set: set it, as in {error.full_key}=..."
        ) from error
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(
            f"{getattr(error, 'full_key', None) or 'a value'} refers to an unknown value or to "
            "itself by ${...}: write its value"
        ) from error


@contextmanager
def hydra_errors() -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf into `UserError`."""
    try:
        yield
    except MissingConfigException as error:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        raise UserError(
            f"there is no {group}={name}: choose one of {', '.join(error.options or [])}, "
            "or install its plugin: pip install hydra-submitit-launcher for submitit_slurm and "
            "submitit_local, pip install hydra-joblib-launcher for joblib"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """Return the first line of a message; Hydra and OmegaConf add types and keys below it."""
    return str(error).partition("\n")[0] or repr(error)


def sweep_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a sweep for Hydra, with the names of the runs' folders.

    Raises:
        UserError: For unknown keys, options and values.
    """
    register_resolvers()
    parsed = parse_overrides(unset_other_limit(overrides), multirun=True)
    names = setting_names()
    for item in parsed:
        if item.get_key_element() not in names and not item.get_key_element().startswith("hydra"):
            raise unknown_key_error(item.get_key_element())
    swept = ",".join(item.get_key_element() for item in parsed if item.is_sweep_override())
    lines = [str(item.input_line) for item in parsed]
    return [*lines, f"hydra.sweep.subdir=${{flowgen.folder:[{swept}]}}"]


def sweep_folder(swept: list[str], *, _root_: Any) -> str:
    """Return the folder of a run in a sweep, named by its overrides: `experiment=a-b,seed=1`.

    A name that is too long has the swept values and a hash of all overrides.
    """
    pairs = sorted(str(text).split("=", 1) for text in _root_.hydra.overrides.task)
    names = [
        (key, f"{key}={value}".replace("/", "-").replace("'", ""))
        for key, value in pairs
        if key in swept or (key not in LOCATION_KEYS and value != "null")
    ]
    full = ",".join(name for _, name in names)
    if len(full.encode()) <= MAX_NAME_BYTES:
        return full
    short = ",".join(name for key, name in names if key in swept)
    digest = blake2s(full.encode(), digest_size=4).hexdigest()
    return f"{short[: MAX_NAME_BYTES // 2]},{digest}"


def register_resolvers() -> None:
    """Register the functions that conf/ refers to."""
    OmegaConf.register_new_resolver("flowgen.trainer", default_trainer, replace=True)
    OmegaConf.register_new_resolver("flowgen.folder", sweep_folder, replace=True)


def data_section(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the data section of `data=NAME data.KEY=VALUE...`, as `flowgen train` composes it.

    Raises:
        UserError: For an unknown data set or a data set without its root.
    """
    keys = [text.partition("=")[0] for text in overrides]
    if keys.count("data") != 1 or not all(key.partition(".")[0] == "data" for key in keys):
        names = ", ".join(group_options("data"))
        raise UserError(
            f"{' '.join(overrides)} does not name a data set: write data= and one of {names}"
        )
    section: dict[str, Any] = compose_config(overrides).config["data"]
    if section.get("root") is not None:
        section["root"] = absolute_path(section["root"])
    return section


def absolute_path(path: Any) -> str:
    """Return a path that stays valid in another working directory."""
    return str(Path(str(path)).expanduser().resolve())


def save_config(config: dict[str, Any], path: Path) -> None:
    """Write a configuration to a YAML file, whole or not at all."""
    with atomic_write(path) as temporary:
        OmegaConf.save(OmegaConf.create(config), temporary)


def read_config(path: Path) -> dict[str, Any]:
    """Read the configuration of a run. References in it are not resolved.

    Raises:
        UserError: For a file that is not the configuration of a run.
    """
    with user_error(f"{path} cannot be read as a configuration: fix it, or choose another run"):
        if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("not a file of normal size")
        text = path.read_text(encoding="utf-8")
        if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("nested aliases can expand to gigabytes")
        config: Any = OmegaConf.to_container(OmegaConf.load(path))
        json.dumps(config, ensure_ascii=False, default=str).encode()  # refuses lone surrogates
    if (
        not isinstance(config, dict)
        or "seed" not in config
        or not all(isinstance(config.get(name), dict) for name in SECTIONS)
    ):
        raise UserError(f"{path} is not the configuration of a run")
    return {str(key): value for key, value in config.items()}
