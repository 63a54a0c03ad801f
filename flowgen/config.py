"""Finding `conf/`, reading configurations, and building what they describe."""

import difflib
import importlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgen.errors import FlowgenError

if TYPE_CHECKING:
    from flowgen.data import Images
    from flowgen.models import GenerativeModel


def conf_folder() -> Path:
    """The YAML files: inside the installed package, or at the top of the repository."""
    package = Path(__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def options(group: str) -> list[str]:
    """What `group=` can be, as in options("model")."""
    folder = conf_folder() / group
    nested = group == "experiment"  # elsewhere a folder is a group of its own, as model/negative_phase is
    paths = folder.rglob("*.yaml") if nested else folder.glob("*.yaml")
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in paths)


def settings() -> list[str]:
    """Everything that `flowgen train KEY=VALUE` can set, as trainer.steps, and every group, as model."""
    from yaml import safe_load

    groups = ("data", "model", "trainer")
    files = [(group, safe_load((conf_folder() / group / f"{name}.yaml").read_text())) for group in groups for name in options(group)]
    inside = {f"{group}.{key}" for group, file in files for key in file.get(group, file) if key not in ("defaults", "_target_", *groups)}
    return sorted({"out", "seed", "experiment", "model/negative_phase", *groups, *inside})


def no_such_setting(name: str, known: Iterable[str]) -> FlowgenError:
    """What is said of a setting that does not exist, with the likeliest that does."""
    close = difflib.get_close_matches(name, list(known), 1)
    return FlowgenError(f"there is no setting {name}{f', did you mean {close[0]}?' if close else ''}: `flowgen train --help` lists them")


def check_words(words: list[str]) -> None:
    """Raises FlowgenError for what is no KEY=VALUE, and for folders without a name, which would be the one that the user is in."""
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith(("+", "~")):
            raise FlowgenError(f"{word}: settings can be changed, but none can be added or removed: write KEY=VALUE")
        if not equals or not key:
            raise FlowgenError(f"{word!r} is no override: write KEY=VALUE, as in trainer.steps=2000")
        if key in ("out", "data.root") and not value.strip("'\""):
            raise FlowgenError(f"{word} is empty: name a folder, or leave it out")


def save_config(config: dict[str, Any], path: Path) -> None:
    from omegaconf import OmegaConf

    aside = path.with_name(path.name + ".part")
    OmegaConf.save(OmegaConf.create(config), aside)
    aside.replace(path)


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


def plain(cfg: Any) -> dict[str, Any]:
    """A configuration as dicts and lists, every reference resolved. Raises FlowgenError for a value that is missing."""
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue

    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise FlowgenError(f"{error.full_key} is not set: set it, as in {error.full_key}=...") from error


def override(config: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`config` with KEY=VALUE words applied. Raises FlowgenError for a key that it lacks."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
    from yaml import YAMLError

    check_words(overrides)
    for word in overrides:
        group = config.get(word.partition("=")[0])
        if isinstance(group, dict):
            raise FlowgenError(f"{word} would replace a whole section of the run: set its values one by one, as in trainer.device=cuda")
    tree: Any = OmegaConf.create(config)
    OmegaConf.set_struct(tree, True)
    try:
        tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(overrides))
    except ConfigKeyError as error:
        known = [f"{section}.{key}" for section, group in config.items() if isinstance(group, dict) for key in group]
        raise no_such_setting(str(error.full_key), known) from error
    except OmegaConfBaseException as error:
        raise FlowgenError(one_line(error)) from error
    except YAMLError as error:
        raise FlowgenError(f"a value cannot be read: {one_line(error)}") from error
    return OmegaConf.to_container(tree)  # type: ignore[return-value]


def one_end(words: list[str]) -> list[str]:
    """Training ends by steps or by minutes: where only one of them is set by hand, the other's default is dropped."""
    given = [limit for limit in ("steps", "minutes") if any(word.lstrip("+").startswith(f"trainer.{limit}=") for word in words)]
    other = {"steps": "minutes", "minutes": "steps"}
    return [*words, f"trainer.{other[given[0]]}=null"] if len(given) == 1 else words


def plain_error(error: BaseException) -> FlowgenError:
    """What Hydra or OmegaConf object to, in flowgen's words."""
    if found := re.search(r"Could not override '([^']+)'", str(error)):
        return no_such_setting(found[1], settings())
    if found := re.search(r"Could not find '([^/']+)/([^']+)'", str(error)):
        return FlowgenError(f"there is no {found[1]}={found[2]}: choose one of {', '.join(options(found[1]))}")
    return FlowgenError(one_line(error))


def one_line(error: BaseException) -> str:
    """An error's message without the line breaks and the tree that Hydra and OmegaConf print below it."""
    lines = [line.strip() for line in str(error).splitlines()]
    noise = ("full_key:", "object_type=", "reference_type=", "See https", "Config search path", "provider=")
    lines = [line for line in lines if line and not line.startswith(noise)]
    return " ".join(lines) or type(error).__name__


def build(section: str, config: dict[str, Any]) -> Any:
    """The object that a section of a configuration describes: `_target_`, a class of flowgen, called with all the rest.

    Raises FlowgenError for any other target, so that a configuration from a stranger's checkpoint can run no code, and for
    arguments that the class refuses.
    """
    arguments = {key: build(key, value) if _is_node(value) else value for key, value in config.items() if key != "_target_"}
    module, _, name = str(config.get("_target_")).rpartition(".")
    if not module.startswith("flowgen."):
        raise FlowgenError(f"{section}._target_={config.get('_target_')} is not part of flowgen")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise FlowgenError(f"{section}._target_={module}.{name} does not exist") from error
    if not isinstance(target, type) or not target.__module__.startswith("flowgen."):
        raise FlowgenError(f"{section}._target_={module}.{name} is not a class of flowgen")
    try:
        return target(**arguments)
    except FlowgenError as error:
        message = str(error)
        raise FlowgenError(message if f"{section}." in message else f"{section}: {message}") from error
    except TypeError as error:
        raise FlowgenError(f"{section}: {error}") from error


def _is_node(value: object) -> bool:
    return isinstance(value, dict) and "_target_" in value


def build_data(config: dict[str, Any]) -> "Images":
    return build("data", config["data"])


def build_model(config: dict[str, Any]) -> "GenerativeModel":
    """The untrained model; its weights depend on torch's random state."""
    return build("model", config["model"])


def build_model_and_data(config: dict[str, Any]) -> tuple["GenerativeModel", "Images"]:
    """Raises FlowgenError where the two do not speak of the same images: every figure would be wrong."""
    model = build_model(config)
    of_data = (*(config["data"].get(key) for key in ("channels", "size", "size")), config["data"].get("bits"))
    for key, of_model, wanted in zip(("channels", "size", "size", "bits"), (*model.shape, model.bits), of_data, strict=True):
        if of_model != wanted:
            raise FlowgenError(f"a model of {key}={of_model} does not fit data.{key}={wanted}: give them the same value, or train another")
    data = build_data(config)
    if model.classes is not None and data.labels is None:
        raise FlowgenError(f"model.classes={model.classes} needs labels, which this data has not: leave it out, or take data=mnist")
    if model.classes is not None and data.labels is not None and (most := int(data.labels[0].max())) != model.classes - 1:
        raise FlowgenError(f"model.classes={model.classes} does not fit labels from 0 to {most}: set it to {most + 1}")
    return model, data


def load_model(run: str | os.PathLike[str], device: str = "cpu") -> "GenerativeModel":
    """See `flowgen.load`."""
    from flowgen.training.find import find_checkpoint

    return model_of(find_checkpoint(str(run))[1], device)


def model_of(checkpoint: dict[str, Any], device: str = "cpu") -> "GenerativeModel":
    """The model of a checkpoint that has been read, with its averaged weights where there are any."""
    from flowgen.training.device import choose_device

    model = build_model(checkpoint["config"])
    weights = checkpoint["model"]
    if checkpoint["ema"] is not None:
        weights = {name.removeprefix("module."): value for name, value in checkpoint["ema"].items() if name.startswith("module.")}
    load_weights(model, weights)
    return model.to(choose_device(device)).eval()


def load_weights(model: "GenerativeModel", weights: dict[str, Any]) -> None:
    """Raises FlowgenError where they are another model's."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise FlowgenError(
            "the checkpoint's weights are not those of the model that its configuration describes: leave what shapes the model as it was"
        ) from error
