"""The YAML files: where `conf/` is, what it offers, and the configuration that a run leaves."""

import json
from pathlib import Path
from typing import Any

from flowgen.errors import FlowgenError
from flowgen.training.formats import MOST_BYTES, in_todays_words

SECTIONS = ("model", "data", "trainer")


def conf_folder() -> Path:
    """The YAML files: inside the installed package, or at the top of the repository."""
    package = Path(__file__).parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def options(group: str) -> list[str]:
    """What `group=` can be, as in options("model")."""
    folder = conf_folder() / group
    nested = group in ("experiment", "scale")  # elsewhere a folder is a group of its own, as model/negative_phase is
    paths = folder.rglob("*.yaml") if nested else folder.glob("*.yaml")
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in paths)


def settings() -> dict[str, list[str]]:
    """Everything that `flowgen train KEY=VALUE` can set, as model.width and model, and the choices that it comes with, as model=glow."""
    from yaml import safe_load

    evaluation = [f"evaluation.{key}" for key in safe_load((conf_folder() / "train.yaml").read_text())["evaluation"] if key != "_target_"]
    top = ("out", "resume", "init", "seed", "experiment", "scale", "model/negative_phase")
    found: dict[str, list[str]] = {name: [] for name in (*top, *evaluation, *SECTIONS)}
    for section in SECTIONS:
        for name in options(section):
            file = safe_load((conf_folder() / section / f"{name}.yaml").read_text())
            for key in file.get(section, file).keys() - {"defaults", "_target_", *SECTIONS}:
                found.setdefault(f"{section}.{key}", []).append(f"{section}={name}")
    return dict(sorted(found.items()))


def save_config(config: dict[str, Any], path: Path) -> None:
    from omegaconf import OmegaConf

    aside = path.with_name(path.name + ".part")
    OmegaConf.save(OmegaConf.create(config), aside)
    aside.replace(path)


def flat(config: dict[str, Any], above: str = "") -> dict[str, Any]:
    """{"model": {"width": 8}} as {"model.width": 8}."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def read_config(path: Path) -> dict[str, Any]:
    """Raises FlowgenError where the file is none of flowgen's, which are short, and where nothing stands for something else."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import AliasEvent, MappingNode, YAMLError, compose, parse

    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            raise ValueError("a pipe would be waited for, and a huge file read for minutes")
        text = path.read_text()
        if "*" in text and any(isinstance(event, AliasEvent) for event in parse(text)):
            raise ValueError("a few aliases of aliases make a configuration of gigabytes")
        if not isinstance(compose(text), MappingNode):
            raise ValueError("a number or a list is none")
        config = OmegaConf.to_container(OmegaConf.create(text))
        json.dumps(config, ensure_ascii=False, default=str).encode()  # half a character could be neither shown nor saved
    except (OSError, OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
        raise FlowgenError(f"{path} cannot be read as a configuration: mend it, or name another run") from error
    if not isinstance(config, dict) or "seed" not in config or not all(isinstance(config.get(name), dict) for name in SECTIONS):
        raise FlowgenError(f"{path} is no configuration of a run")
    try:
        return in_todays_words({str(key): value for key, value in config.items()})
    except TypeError as error:
        raise FlowgenError(f"{path} is no configuration of a run") from error
