"""The YAML files: where `conf/` is, what it offers, and the configuration that a run leaves."""

from pathlib import Path
from typing import Any

from flowgen.errors import FlowgenError


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

    groups = ("data", "model", "trainer")
    evaluation = [f"evaluation.{key}" for key in evaluation_defaults() if key != "_target_"]
    top = ("out", "resume", "init", "seed", "experiment", "scale", "model/negative_phase")
    found: dict[str, list[str]] = {name: [] for name in (*top, *evaluation, *groups)}
    for section in groups:
        for name in options(section):
            file = safe_load((conf_folder() / section / f"{name}.yaml").read_text())
            for key in file.get(section, file).keys() - {"defaults", "_target_", *groups}:
                found.setdefault(f"{section}.{key}", []).append(f"{section}={name}")
    return dict(sorted(found.items()))


def evaluation_defaults() -> dict[str, Any]:
    """How `flowgen evaluate` judges where a run does not say it."""
    from yaml import safe_load

    defaults: dict[str, Any] = safe_load((conf_folder() / "train.yaml").read_text())["evaluation"]
    return defaults


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
    """Raises FlowgenError where the file is none of flowgen's."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise FlowgenError(f"{path} cannot be read as a configuration: mend it, or name another run") from error
    if not isinstance(config, dict) or not config.keys() >= {"model", "data", "trainer"}:
        raise FlowgenError(f"{path} is no configuration of a run")
    return {str(key): value for key, value in config.items()}
