"""Configurations: composed from conf/ and overrides, changed by overrides, saved and read again."""

import json
from collections.abc import Sequence
from hashlib import blake2s
from pathlib import Path
from typing import Any

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
)
from flowgen.utils.errors import UserError
from flowgen.utils.files import atomic_write

MAX_CONFIG_BYTES = 2**20  # a longer file takes seconds to parse
PATH_KEYS = ("output_dir", "data.root", "init_from")
LOCATION_KEYS = ("output_dir", "resume", "data.root", "trainer.device")  # not in names of runs
EVALUATION_KEYS = ("num_importance_samples", "ais_steps", "ais_chains", "cross_check")
MAX_SHOWN_CHARS = 100  # of an override in an error message
MAX_NAME_BYTES = 200  # of a run's folder in a sweep; file systems allow 255
LAUNCHER_HINT = (
    "or install its plugin: pip install 'flowgen[slurm]' for submitit_slurm and submitit_local, "
    "hydra-joblib-launcher for joblib"
)


def compose_config(overrides: Sequence[str]) -> tuple[dict[str, Any], str, bool]:
    """Compose the configuration of a training run.

    Hydra chooses the options of the groups. The values are set afterwards, with checks that name
    the setting and its likely correction.

    Args:
        overrides: KEY=VALUE and GROUP=NAME, as on the command line.

    Returns:
        The configuration without references, a note about trainer=auto (or an empty string), and
        whether the name of `output_dir` contains the current time.

    Raises:
        UserError: for unknown keys, options and values.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    check_overrides(overrides)
    register_resolvers()
    groups = [text for text in overrides if text.partition("=")[0] in GROUPS]
    values = [text for text in resolve_stop_criterion(overrides) if text not in groups]
    for text in overrides:
        if text.startswith("hydra") or (text in groups and ("," in text or "(" in text)):
            raise UserError(f"{text} is for a sweep: add -m, as in `flowgen train -m {text}`")
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            tree: Any = compose("train", groups, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(first_line(error)) from error
    note = trainer_note(tree.hydra.runtime.choices)
    OmegaConf.set_struct(tree, False)
    set_values(tree, values, references=True)
    output_dir = OmegaConf.masked_copy(tree, "output_dir")
    named_by_time = "${now:" in OmegaConf.to_yaml(output_dir)
    try:
        tree.output_dir = str(tree.output_dir)  # refers to the hydra section
    except OmegaConfBaseException as error:
        raise UserError(first_line(error)) from error
    del tree["hydra"]
    return resolve_config(tree), note, named_by_time


def trainer_note(choices: Any) -> str:
    """Return a log line about the trainer that trainer=auto stands for."""
    if choices["trainer"] != "auto":
        return ""
    return f"trainer=auto is trainer={default_trainer()} on this machine"


def override(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return `config` with KEY=VALUE overrides applied.

    Raises:
        UserError: for unknown keys, lists to sweep over and references to other values.
    """
    from omegaconf import OmegaConf

    check_overrides(overrides)
    tree: Any = OmegaConf.create(config)
    set_values(tree, overrides, references=False)
    return OmegaConf.to_container(tree)  # type: ignore[return-value]


def set_values(tree: Any, overrides: Sequence[str], references: bool) -> None:
    """Set the values of KEY=VALUE overrides in an OmegaConf tree, in place."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for text, parsed in zip(
        overrides,
        OverridesParser.create().parse_overrides(quote_overrides(overrides)),
        strict=True,
    ):
        key = parsed.key_or_group
        if parsed.is_sweep_override():
            raise UserError(
                f"{text} has several values: give one, or sweep with `flowgen train -m`"
            )
        value = parsed.value()
        if not references and "${" in str(value):
            raise UserError(
                f"{text} refers to another value, which only `flowgen train` allows: "
                "write the value"
            )
        check_key(tree, key)
        if isinstance(OmegaConf.select(tree, key, throw_on_resolution_failure=False), type(tree)):
            group = key.replace(".", "/")
            raise UserError(
                f"{key} is a group of settings: write {text.replace(key, group, 1)} with a slash"
                if group_options(group)
                else f"{text} would replace a whole section: set values one by one, "
                "as in trainer.device=cuda"
            )
        try:
            OmegaConf.update(tree, key, value, merge=True)
        except OmegaConfBaseException as error:
            raise UserError(first_line(error)) from error


def check_key(tree: Any, key: str) -> None:
    """Raise UserError unless the tree has the key."""
    node: Any = tree
    for name in key.split("."):
        if not hasattr(node, "keys") or name not in node.keys():  # noqa: SIM118
            break
        node = node._get_node(name)
    else:
        return
    names = setting_names()
    if options := names.get(key):
        raise UserError(
            f"{key} is a setting of {' and '.join(options)} only: "
            "choose one of them, or leave it out"
        )
    known = [full for full in flatten(_keys(tree)) if not full.endswith("_target_")]
    raise unknown_key_error(key, [*known, *names])


def _keys(tree: Any) -> dict[str, Any]:
    """Return the keys of a tree as nested dicts, without resolving values."""
    nodes = {name: tree._get_node(name) for name in tree if name != "hydra"}
    return {
        str(name): _keys(node) if isinstance(node, type(tree)) else None
        for name, node in nodes.items()
    }


def unknown_key_error(key: str, known: Sequence[str]) -> UserError:
    """Return an error that names the closest known key: in another section, or spelled alike."""
    name = key.partition(".")[2]
    same = [other for other in known if name and other.partition(".")[2] == name]
    hint = f", did you mean {same[0]}?" if same else did_you_mean(key, known)
    return UserError(f"there is no setting {key}{hint}: `flowgen train --help` lists all settings")


def check_overrides(overrides: Sequence[str]) -> None:
    """Check the syntax of overrides and the options of groups.

    Raises:
        UserError: for an override that is not KEY=VALUE, an unknown option or an empty path.
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        if text.startswith(("+", "~")):
            raise UserError(
                f"{text}: settings can be changed, not added or removed: write KEY=VALUE"
            )
        if not equals or not key or key.startswith("-"):
            raise UserError(
                f"{text!r} is not an override: write KEY=VALUE, as in trainer.steps=2000"
            )
        if key in SECTIONS and value.strip() in ("", "null"):
            options = ", ".join(group_options(key))
            raise UserError(f"{text} chooses nothing: write {key}=NAME, one of {options}")
        if key in GROUPS and "(" not in value and value != "null":
            for name in value.split(","):
                check_option(key, name.strip(" '\""))
        if key in PATH_KEYS and not value.strip("'\" "):
            raise UserError(f"{text} is empty: name a folder, or leave it out")
        section, _, name = key.partition(".")
        if section == "model" and name in EVALUATION_KEYS:
            raise UserError(
                f"{key} is not a setting of the model: write evaluation.{name}={value}, "
                f"or `flowgen evaluate {name}={value}`"
            )


def quote_overrides(overrides: Sequence[str]) -> list[str]:
    """Quote paths that Hydra's grammar cannot read, as in data.root=~/faces=(new).

    Raises:
        UserError: for other values that the grammar cannot read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    quoted = []
    for text in overrides:
        key, _, value = text.partition("=")
        try:
            parser.parse_override(text).value()
        except (HydraException, ValueError) as error:  # ValueError: a number of thousands of digits
            if key not in PATH_KEYS:
                shown = text if len(text) < MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."
                raise UserError(
                    f"{shown} cannot be parsed: close its brackets, and put quotes around special "
                    f"characters, as in \"{key}='...'\""
                ) from error
            path = str(Path(value).expanduser()).replace("'", r"\'")
            text = f"{key}='{path}'"
        quoted.append(text)
    return quoted


def resolve_stop_criterion(overrides: Sequence[str]) -> list[str]:
    """Unset the default of trainer.minutes if only trainer.steps is given, and vice versa."""
    given = [
        name
        for name in ("steps", "minutes")
        if any(text.startswith(f"trainer.{name}=") for text in overrides)
    ]
    if len(given) != 1:
        return list(overrides)
    other = "minutes" if given == ["steps"] else "steps"
    return [*overrides, f"trainer.{other}=null"]


def resolve_config(tree: Any) -> dict[str, Any]:
    """Return an OmegaConf tree as plain dicts and lists, with all references resolved.

    Raises:
        UserError: for a value that is missing or refers to an unknown one.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        key = error.full_key
        raise UserError(f"{key} is not set: set it, as in {key}=...") from error
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None) or "a value"
        raise UserError(
            f"{key} refers to an unknown value or to itself by ${{...}}: write its value"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the message of Hydra or OmegaConf without the tree that they print below it."""
    lines = [line.strip() for line in str(error).splitlines()]
    noise = ("full_key:", "object_type=", "reference_type=", "See https", "Config search path")
    return " ".join(line for line in lines if line and not line.startswith(noise)) or repr(error)


def sweep_error(error: BaseException) -> UserError:
    """Return the message of a sweep that Hydra refuses."""
    from hydra.errors import MissingConfigException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = ", ".join(error.options or [])
        hint = f", {LAUNCHER_HINT}" if group == "hydra/launcher" else ""
        return UserError(f"there is no {group}={name}: choose one of {options}{hint}")
    return UserError(first_line(error))


def check_sweep(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a sweep for Hydra, with the names of the runs' folders.

    Raises:
        UserError: for unknown keys, options and values.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    check_overrides([text for text in overrides if not text.startswith("hydra")])
    register_resolvers()
    quoted = resolve_stop_criterion(quote_overrides(overrides))
    names = setting_names()
    parsed = OverridesParser.create().parse_overrides(quoted)
    for key in (each.key_or_group for each in parsed):
        if key not in names and not key.startswith("hydra"):
            raise unknown_key_error(key, list(names))
    swept = ",".join(each.key_or_group for each in parsed if each.is_sweep_override())
    return [*quoted, f"hydra.sweep.subdir=${{flowgen.folder:[{swept}]}}"]


def chosen_option(group: str, *, _root_: Any) -> str:
    """Return the chosen option of a group: glow for model=glow."""
    from hydra.core.hydra_config import HydraConfig

    composed = _root_.hydra if "hydra" in _root_ else HydraConfig.get()
    return str(composed.runtime.choices[group])


def sweep_folder(swept: list[str], *, _root_: Any) -> str:
    """Return the folder of a run in a sweep, named by its overrides: `experiment=a-b,seed=1`.

    A name that is too long has the swept values and a hash of all overrides.
    """
    pairs = sorted(str(text).partition("=")[::2] for text in _root_.hydra.overrides.task)
    in_sweep = [pair for pair in pairs if pair[0] in swept]
    named = [
        (key, value)
        for key, value in pairs
        if key in swept or (key not in LOCATION_KEYS and value != "null")
    ]
    full = ",".join(f"{key}={value}" for key, value in named).replace("/", "-").replace("'", "")
    if len(full.encode()) <= MAX_NAME_BYTES:
        return full
    short = ",".join(f"{key}={value}" for key, value in in_sweep).replace("/", "-").replace("'", "")
    digest = blake2s(full.encode(), digest_size=4).hexdigest()
    return f"{short[: MAX_NAME_BYTES // 2]},{digest}"


def register_resolvers() -> None:
    """Register the functions that conf/ refers to."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("flowgen.trainer", default_trainer, replace=True)
    OmegaConf.register_new_resolver("flowgen.choice", chosen_option, replace=True)
    OmegaConf.register_new_resolver("flowgen.folder", sweep_folder, replace=True)


def save_config(config: dict[str, Any], path: Path) -> None:
    from omegaconf import OmegaConf

    with atomic_write(path) as temporary:
        OmegaConf.save(OmegaConf.create(config), temporary)


def read_config(path: Path) -> dict[str, Any]:
    """Read the configuration of a run. References in it are not resolved.

    Raises:
        UserError: for a file that is not the configuration of a run.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import AliasEvent, MappingNode, YAMLError, compose, parse

    try:
        if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("not a file of normal size")
        text = path.read_text(encoding="utf-8")
        if "*" in text and any(isinstance(event, AliasEvent) for event in parse(text)):
            raise ValueError("nested aliases can expand to gigabytes")
        if not isinstance(compose(text), MappingNode):
            raise ValueError("not a mapping")
        config = OmegaConf.to_container(OmegaConf.create(text))
        json.dumps(config, ensure_ascii=False, default=str).encode()  # refuses lone surrogates
    except (OSError, OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as a configuration: fix it, or choose another run"
        ) from error
    if (
        not isinstance(config, dict)
        or "seed" not in config
        or not all(isinstance(config.get(name), dict) for name in SECTIONS)
    ):
        raise UserError(f"{path} is not the configuration of a run")
    return {str(key): value for key, value in config.items()}
