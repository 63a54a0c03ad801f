"""The YAML files: where `conf/` is, what it offers, and the configuration that a run leaves."""

import difflib
import json
import re
from collections.abc import Iterable
from hashlib import blake2s
from pathlib import Path
from typing import Any

from flowgen.training.checkpoint import MAX_CONFIG_BYTES
from flowgen.utils.errors import UserError
from flowgen.utils.files import atomic_write

SECTIONS = ("model", "data", "trainer")


def conf_folder() -> Path:
    """The YAML files: inside the installed package, or at the top of the repository."""
    package = Path(__file__).parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def group_options(group: str) -> list[str]:
    """What `group=` can be, as in options("model")."""
    folder = conf_folder() / group
    nested = group in (
        "experiment",
        "preset",
    )  # elsewhere a folder is a group of its own, as model/negative_phase is
    paths = folder.rglob("*.yaml") if nested else folder.glob("*.yaml")
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in paths)


def setting_names() -> dict[str, list[str]]:
    """Everything that `flowgen train KEY=VALUE` can set, as model.width and model, and the choices that it comes with, as model=glow."""
    from yaml import safe_load

    evaluation = [
        f"evaluation.{key}"
        for key in safe_load((conf_folder() / "train.yaml").read_text())["evaluation"]
        if key != "_target_"
    ]
    top = (
        "output_dir",
        "resume",
        "init_from",
        "seed",
        "experiment",
        "preset",
        "model/negative_phase",
    )
    found: dict[str, list[str]] = {name: [] for name in (*top, *evaluation, *SECTIONS)}
    for section in SECTIONS:
        for name in group_options(section):
            file = safe_load((conf_folder() / section / f"{name}.yaml").read_text())
            for key in file.get(section, file).keys() - {"defaults", "_target_", *SECTIONS}:
                found.setdefault(f"{section}.{key}", []).append(f"{section}={name}")
    return dict(sorted(found.items()))


def save_config(config: dict[str, Any], path: Path) -> None:
    from omegaconf import OmegaConf

    with atomic_write(path) as temporary:
        OmegaConf.save(OmegaConf.create(config), temporary)


def flatten(config: dict[str, Any], above: str = "") -> dict[str, Any]:
    """{"model": {"width": 8}} as {"model.width": 8}."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= (
            flatten(value, f"{above}{key}.")
            if isinstance(value, dict)
            else {f"{above}{key}": value}
        )
    return found


def read_config(path: Path) -> dict[str, Any]:
    """Raises FlowgenError where the file is none of flowgen's, which are short, and where nothing stands for something else."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import AliasEvent, MappingNode, YAMLError, compose, parse

    try:
        if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("a pipe would be waited for, and a huge file read for minutes")
        text = path.read_text()
        if "*" in text and any(isinstance(event, AliasEvent) for event in parse(text)):
            raise ValueError("a few aliases of aliases make a configuration of gigabytes")
        if not isinstance(compose(text), MappingNode):
            raise ValueError("a number or a list is none")
        config = OmegaConf.to_container(OmegaConf.create(text))
        json.dumps(
            config, ensure_ascii=False, default=str
        ).encode()  # half a character could be neither shown nor saved
    except (OSError, OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as a configuration: mend it, or name another run"
        ) from error
    if (
        not isinstance(config, dict)
        or "seed" not in config
        or not all(isinstance(config.get(name), dict) for name in SECTIONS)
    ):
        raise UserError(f"{path} is no configuration of a run")
    try:
        return {str(key): value for key, value in config.items()}
    except TypeError as error:
        raise UserError(f"{path} is no configuration of a run") from error


LAUNCHERS = "pip install 'flowgen[slurm]' for submitit_slurm and submitit_local, hydra-joblib-launcher for joblib"


def unknown_key_error(name: str, known: Iterable[str]) -> UserError:
    """What is said of a setting that does not exist, with the likeliest that does: one of the same name elsewhere, or of a name like it."""
    known = list(known)
    close = [
        other for other in known if other.partition(".")[2] == name.partition(".")[2] != ""
    ] or difflib.get_close_matches(name, known, 1)
    return UserError(
        f"there is no setting {name}{f', did you mean {close[0]}?' if close else ''}: `flowgen train --help` lists them"
    )


def hydra_error(error: BaseException) -> UserError:
    """What Hydra or OmegaConf object to, in flowgen's words."""
    if found := re.search(r"Could not override '([^']+)'", str(error)):
        known = setting_names()
        if choices := known.get(found[1]):
            return UserError(
                f"{found[1]} is a setting of {' and '.join(choices)} alone: take one of them, or leave it out"
            )
        return unknown_key_error(found[1], known)
    if found := re.search(
        r"Could not find '([^']+)'\s+Available options in '([^']+)':\n((?:\t.*\n)*)", str(error)
    ):
        path, group, offered = found.groups()
        more = f", or install what brings it: {LAUNCHERS}" * (group == "hydra/launcher")
        name = path.removeprefix(f"{group}/")
        return UserError(
            f"there is no {group}={name}: choose one of {', '.join(group_options(group) or offered.split())}{more}"
        )
    return UserError(first_line(error))


def first_line(error: BaseException) -> str:
    """An error's message without the line breaks and the tree that Hydra and OmegaConf print below it."""
    lines = [line.strip() for line in str(error).splitlines()]
    noise = (
        "full_key:",
        "object_type=",
        "reference_type=",
        "See https",
        "Config search path",
        "provider=",
    )
    lines = [line for line in lines if line and not line.startswith(noise)]
    return " ".join(lines) or type(error).__name__


FOLDERS = ("output_dir", "data.root", "init_from")
SHOWN = 100  # characters of a word that cannot be read
GROUPS = ("data", "model", "trainer")  # of which every run has one
CHOSEN = (*GROUPS, "experiment", "preset", "model/negative_phase")


def check_overrides(words: list[str]) -> None:
    """Raises FlowgenError for what is no KEY=VALUE, and for folders without a name, which would be the one that the user is in."""
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith(("+", "~")):
            raise UserError(
                f"{word}: settings can be changed, but none can be added or removed: write KEY=VALUE"
            )
        if not equals or not key or key.startswith("-"):
            raise UserError(f"{word!r} is no override: write KEY=VALUE, as in trainer.steps=2000")
        if key in GROUPS and value.strip() in ("", "null"):
            raise UserError(
                f"{word} chooses nothing: write {key}=NAME, one of {', '.join(group_options(key))}"
            )
        if key in FOLDERS and not value.strip("'\" "):
            raise UserError(f"{word} is empty: name a folder, or leave it out")
        section, _, name = key.partition(".")
        if section == "model" and name in ("num_importance_samples", "ais_steps", "ais_chains"):
            raise UserError(
                f"{key} is no setting of the model: write evaluation.{name}={value}, or `flowgen evaluate {name}={value}`"
            )


def quote_overrides(words: list[str]) -> list[str]:
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
            return (
                f"{key}='{value}'" if number and key in CHOSEN else word
            )  # no choice, as Hydra can say of words alone
        except (HydraException, ValueError) as error:  # ValueError: a number of thousands of digits
            if key in FOLDERS:
                value = str(Path(value).expanduser()).replace("'", r"\'")
                return f"{key}='{value}'"
            shown = word if len(word) < SHOWN else f"{word[:SHOWN]}..."
            raise UserError(
                f"{shown} cannot be read: close its brackets, and put quotes around odd characters, as in \"{key}='...'\""
            ) from error

    return [read(word) for word in words]


def resolve_stop_criterion(words: list[str]) -> list[str]:
    """Training ends by steps or by minutes: where only one of them is set by hand, the other's default is dropped."""
    given = [
        limit
        for limit in ("steps", "minutes")
        if any(word.lstrip("+").startswith(f"trainer.{limit}=") for word in words)
    ]
    other = {"steps": "minutes", "minutes": "steps"}
    return [*words, f"trainer.{other[given[0]]}=null"] if len(given) == 1 else words


def sweep_folder_override(words: list[str]) -> str:
    """The word by which Hydra names the folders of a sweep's runs."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    swept = [
        word.key_or_group
        for word in OverridesParser.create().parse_overrides(words)
        if word.is_sweep_override()
    ]
    return f"hydra.sweep.subdir=${{flowgen.folder:[{','.join(swept)}]}}"


def override(config: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`config` with KEY=VALUE words applied, in Hydra's grammar. Raises FlowgenError for a key that it lacks, or a list to sweep over."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigAttributeError, OmegaConfBaseException

    check_overrides(overrides)
    tree: Any = OmegaConf.create(config)
    OmegaConf.set_struct(tree, True)
    try:
        for word in OverridesParser.create().parse_overrides(quote_overrides(overrides)):
            if word.is_sweep_override():
                raise UserError(
                    f"{word.input_line} names several values: give one, or sweep with `flowgen train -m`"
                )
            if "${" in str(word.value()):
                raise UserError(
                    f"{word.input_line} refers by ${{...}} to something else, which is for `flowgen train` alone: write the value"
                )
            if isinstance(config.get(word.key_or_group), dict):
                raise UserError(
                    f"{word.input_line} would replace a whole section of the run: set its values one by one, as in trainer.device=cuda"
                )
            OmegaConf.update(tree, word.key_or_group, word.value(), merge=True)
    except ConfigAttributeError as error:
        known = [
            f"{section}.{key}"
            for section, group in config.items()
            if isinstance(group, dict)
            for key in group
        ]
        raise unknown_key_error(str(error.full_key), known) from error
    except OmegaConfBaseException as error:
        raise UserError(first_line(error)) from error
    return OmegaConf.to_container(tree)  # type: ignore[return-value]


def resolve_config(cfg: Any) -> dict[str, Any]:
    """A configuration as dicts and lists, every reference resolved. Raises FlowgenError for a value that is missing, or refers to none."""
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key} is not set: set it, as in {error.full_key}=..."
        ) from error
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None) or "a value"
        raise UserError(
            f"{key} refers by ${{...}} to what there is not, or to itself: write its value"
        ) from error


DRIVERS = (
    "/proc/driver/nvidia",
    "/dev/nvidiactl",
    "/dev/kfd",
    "/dev/dxg",
)  # NVIDIA's, AMD's, and WSL's to either

UNNAMED = (
    "output_dir",
    "resume",
    "data.root",
    "trainer.device",
)  # in the names of a sweep's folders: they say where, not what
LONGEST = 200  # bytes of a folder's name; file systems take 255


def default_trainer() -> str:
    """What trainer=auto is on this machine: `gpu` where torch can use one, else `cpu`."""
    if not any(Path(driver).exists() for driver in DRIVERS):
        return (
            "cpu"  # without torch, which takes seconds to import, and for which help need not wait
        )
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def choice(group: str, *, _root_: Any) -> str:
    """What was chosen for a group: `glow` for model=glow."""
    from hydra.core.hydra_config import HydraConfig

    composed = (
        _root_.hydra if "hydra" in _root_ else HydraConfig.get()
    )  # a sweep has but the first, a job but the second
    return str(composed.runtime.choices[group])


def folder_name(swept: list[str], *, _root_: Any) -> str:
    """One folder for each run of a sweep, side by side, by what tells them apart: `experiment=a-b,seed=1`.

    Where that is too long, by what is swept over and a hash of all.
    """
    pairs = sorted(str(word).partition("=")[::2] for word in _root_.hydra.overrides.task)
    named = [
        (key, value)
        for key, value in pairs
        if key in swept or (key not in UNNAMED and value != "null")
    ]
    full, short = (
        ",".join(f"{key}={value}".replace("/", "-").replace("'", "") for key, value in chosen)
        for chosen in (named, [pair for pair in named if pair[0] in swept])
    )
    digest = blake2s(full.encode(), digest_size=4).hexdigest()
    return full if len(full.encode()) <= LONGEST else f"{short[: LONGEST // 2]},{digest}"


def register_resolvers() -> None:
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("flowgen.trainer", default_trainer, replace=True)
    OmegaConf.register_new_resolver("flowgen.choice", choice, replace=True)
    OmegaConf.register_new_resolver("flowgen.folder", folder_name, replace=True)
