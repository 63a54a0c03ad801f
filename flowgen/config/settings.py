"""Settings of `flowgen train` and their meaning, read from the comments of the YAML files in conf/.

A comment belongs to the key on its line and continues on the indented comment lines below it.
The first comment line of a file describes it.
To answer at once, nothing here imports Hydra. On a machine with a GPU driver, torch is imported to
find out which option trainer=auto stands for.
"""

import difflib
import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from flowgen.utils.errors import UserError

SECTIONS = ("model", "data", "trainer")  # every run has one option of each
GROUPS = (*SECTIONS, "experiment", "preset", "model/negative_phase")
NESTED_GROUPS = ("experiment", "preset")  # their options lie in folders, as thesis/toy does
GENERAL = {"evaluation": "settings of `flowgen evaluate`", "general": "settings of the run"}
GPU_DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, WSL
REFERENCES = {  # in defaults, and what they stand for
    "${now:%Y-%m-%d}": "DATE",
    "${now:%H-%M-%S}": "TIME",
    "${hydra.runtime.choices.model}": "MODEL",
    "${hydra.runtime.choices.data}": "DATA",
}
KEY = re.compile(r"(?P<indent> *)(?P<key>\w+):(?: .*?)??(?: +# (?P<comment>.*))?")
COMMENT = re.compile(r"(?P<indent> *)# (?P<comment>.*)")
MAX_KEY_WIDTH = 36  # characters of the columns of a table of settings
MAX_DEFAULT_WIDTH = 14


class Setting(NamedTuple):
    """A key that `flowgen train KEY=VALUE` can set."""

    key: str
    default: Any
    meaning: str


def conf_folder() -> Path:
    """Return the folder of the YAML files: in the installed package or in the repository."""
    package = Path(__file__).parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def group_options(group: str) -> list[str]:
    """Return the options of a group.

    Example:
        >>> group_options("model/negative_phase")
        ['cd', 'mean_field', 'pcd', 'tempering']
    """
    folder = conf_folder() / group
    paths = folder.rglob("*.yaml") if group in NESTED_GROUPS else folder.glob("*.yaml")
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in paths)


def check_option(group: str, name: str) -> None:
    """Raise UserError unless `group` has the option `name`."""
    known = group_options(group)
    if name not in known and (name != "null" or group in SECTIONS):
        hint = did_you_mean(name, known)
        raise UserError(f"there is no {group}={name}{hint}: choose one of {', '.join(known)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f", did you mean {close[0]}?" if close else ""


@cache
def read_yaml(name: str) -> dict[str, Any]:
    """Return the content of conf/NAME.yaml, such as model/glow."""
    from yaml import safe_load

    return dict(safe_load(read_text(name)) or {})


def yaml_file(group: str, target: object) -> str:
    """Return the first file with the settings of a class, or the folder for an unknown class.

    Example:
        >>> yaml_file("model", "flowgen.models.flows.glow.Glow")
        'conf/model/glow.yaml'
    """
    names = [f"{group}/{name}" for name in group_options(group)]
    files = {read_yaml(name).get("_target_"): f"{name}.yaml" for name in reversed(names)}
    return f"conf/{files.get(str(target), f'{group}/' if files else 'train.yaml')}"


def read_text(name: str) -> str:
    """Return the text of a file in `conf`, such as "trainer/cpu"."""
    return (conf_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def description(name: str) -> str:
    """Return the first comment line of conf/NAME.yaml.

    Example:
        >>> description("model/negative_phase/cd")
        'Contrastive divergence (CD-k): chains start at the data (Hinton 2002)'
    """
    comments = [line for line in read_text(name).splitlines() if line.startswith("# ")]
    return next(line[2:] for line in comments if not line.startswith("# @package"))


def likelihood(model: str) -> str:
    """Return the kind of likelihood that conf/model/NAME.yaml says its model has.

    Example:
        >>> likelihood("glow")
        'bound'
    """
    match = re.search(r"^# Likelihood: (\w+)", read_text(f"model/{model}"), re.M)
    return match[1] if match else "unknown"


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `config` with full keys.

    Example:
        >>> flatten({"model": {"width": 8}, "seed": 0})
        {'model.width': 8, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        full_key = f"{prefix}{key}"
        flat |= flatten(value, f"{full_key}.") if isinstance(value, dict) else {full_key: value}
    return flat


def read_comments(text: str) -> dict[str, str]:
    """Return the comments of a YAML text by full key, such as `model.width`."""
    comments: dict[str, str] = {}
    parents: dict[int, str] = {}  # names by indentation, down to the current key
    for line in text.splitlines():
        if match := COMMENT.fullmatch(line):
            if parents and len(match["indent"]) > max(parents):
                key = ".".join(parents.values())
                comments[key] = f"{comments[key]} {match['comment']}".strip()
        elif match := KEY.fullmatch(line):
            indent = len(match["indent"])
            parents = {width: name for width, name in parents.items() if width < indent}
            parents[indent] = match["key"]
            comments[".".join(parents.values())] = match["comment"] or ""
    return comments


@cache
def settings_of_file(name: str) -> dict[str, Setting]:
    """Return the settings that conf/NAME.yaml defines in its own section, by full key."""
    section = "" if name == "train" else name.rpartition("/")[0].replace("/", ".")
    prefix = f"{section}." if section else ""
    # A model may also change the defaults of other sections.
    skipped = {"defaults", "hydra", *SECTIONS} - {section}
    comments = read_comments(read_text(name))
    settings = {}
    for key, default in flatten(read_yaml(name)).items():
        if key.partition(".")[0] not in skipped and not key.endswith("_target_"):
            full_key = prefix + key.removeprefix(prefix)
            settings[full_key] = Setting(full_key, default, comments[key])
    return settings


def default_trainer() -> str:
    """Return the option that trainer=auto stands for: gpu if torch can use one, else cpu."""
    if not any(Path(driver).exists() for driver in GPU_DRIVERS):
        return "cpu"  # without importing torch
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def settings_of_option(section: str, name: str) -> dict[str, Setting]:
    """Return the settings of an option by full key, with those of the options it builds on."""
    if (section, name) == ("trainer", "auto"):
        name = default_trainer()
    settings: dict[str, Setting] = {}
    own = dict(settings_of_file(f"{section}/{name}"))
    for entry in read_yaml(f"{section}/{name}").get("defaults", []):
        if isinstance(entry, dict):  # negative_phase@model.negative_phase: pcd
            own |= settings_of_file(f"{section}/negative_phase/{next(iter(entry.values()))}")
        elif entry != "_self_":
            settings |= settings_of_option(section, entry)
    for key, setting in own.items():
        # An option that repeats a key without a comment changes only its default.
        inherited = key in settings and not setting.meaning
        settings[key] = settings[key]._replace(default=setting.default) if inherited else setting
    return settings


def setting_names() -> dict[str, list[str]]:
    """Return every key and group of `flowgen train` and the options that have it, as model=glow.

    The list is empty for groups and for keys that every run has.
    """
    names: dict[str, list[str]] = {name: [] for name in (*GROUPS, *settings_of_file("train"))}
    for group in (*SECTIONS, "model/negative_phase"):
        for option in group_options(group):
            # All trainers have the same keys, and trainer=auto would import torch.
            concrete = "cpu" if (group, option) == ("trainer", "auto") else option
            for key in settings_of_option(group, concrete):
                names.setdefault(key, []).append(f"{group}={option}")
    return dict(sorted(names.items()))


def settings_help(topics: Sequence[str] = (), width: int = 100) -> str:
    """Return tables of settings with defaults and meanings.

    Args:
        topics: Groups to show, as in `model` or `model=rbm`. All by default. Overrides of single
            settings are ignored.
        width: Maximum length of a line.

    Raises:
        UserError: For an unknown group or option.
    """
    options = {
        key: value
        for entry in read_yaml("train")["defaults"]
        if isinstance(entry, dict)
        for key, value in entry.items()
    }
    shown = []
    for topic in topics:
        group, equals, option = topic.partition("=")
        if equals and group in GROUPS:
            check_option(group, option)
            options[group] = option
        if group in GROUPS or group in GENERAL:
            shown.append(group)
        elif not equals:
            known = ", ".join([*GROUPS, *GENERAL])
            raise UserError(f"there is no group {topic!r}: choose one of {known}")
    tables = [_table(group, options, width) for group in shown or (*SECTIONS, *GENERAL)]
    if not shown:
        others = ", ".join(group for group in GROUPS if group not in SECTIONS)
        text = (
            f"Further groups: {others}. `flowgen train --help GROUP` lists the options of a group, "
            "and `flowgen train --help GROUP=NAME` the settings of an option."
        )
        tables.append(textwrap.fill(text, width, break_on_hyphens=False))
    return "\n\n".join(tables)


def _table(group: str, options: dict[str, str], width: int) -> str:
    if group in GENERAL:
        head = f"{group}: {GENERAL[group]}"
        settings = [
            setting
            for setting in settings_of_file("train").values()
            if setting.key.startswith("evaluation.") == (group == "evaluation")
        ]
    elif group in SECTIONS:
        name = options[group]
        head = textwrap.fill(f"{group}={name}: {description(f'{group}/{name}')}", width)
        choices = f"{group}= is one of {', '.join(group_options(group))}."
        head += f"\n{textwrap.fill(choices, width)}"
        if (group, name) == ("trainer", "auto"):
            head += f"\ntrainer=auto is trainer={default_trainer()} on this machine."
        changed = flatten({group: read_yaml(f"model/{options['model']}").get(group, {})})
        settings = [
            setting._replace(default=changed.get(setting.key, setting.default))
            for setting in settings_of_option(group, name).values()
        ]
    else:
        head = f"{group}="
        settings = [
            Setting(name, "", description(f"{group}/{name}")) for name in group_options(group)
        ]
    return "\n".join([head, *_format_rows(settings, width)])


def format_value(value: Any) -> str:
    """Return a default as YAML writes it, with words in place of references.

    Example:
        >>> format_value(None), format_value(True), format_value([0.9, 0.999])
        ('null', 'true', '[0.9,0.999]')
        >>> format_value("outputs/${now:%Y-%m-%d}")
        'outputs/DATE'
    """
    if not isinstance(value, str):
        return json.dumps(value, separators=(",", ":"))
    for reference, word in REFERENCES.items():
        value = value.replace(reference, word)
    return value


def _format_rows(settings: Sequence[Setting], width: int) -> list[str]:
    """Align keys, defaults and meanings; the meanings are wrapped."""
    values = [format_value(setting.default) for setting in settings]
    key_width = min(MAX_KEY_WIDTH, max(len(setting.key) for setting in settings))
    value_width = min(MAX_DEFAULT_WIDTH, max(map(len, values)))
    indent = " " * (key_width + value_width + 6)
    wrap = textwrap.TextWrapper(width, subsequent_indent=indent, break_on_hyphens=False)
    lines = []
    for setting, value in zip(settings, values, strict=True):
        start = f"  {setting.key:{key_width}}  {value:{value_width}}  "
        if len(start) > len(indent):  # the meaning begins on the next line
            lines += textwrap.wrap(start, width, subsequent_indent="    ", break_long_words=False)
            start = indent
        wrap.initial_indent = start
        lines += wrap.wrap(setting.meaning)
    return lines
