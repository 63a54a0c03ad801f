"""The rules of the house: who may import whom, how long files get, what every configuration must do."""

import ast
import importlib
import inspect
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from packaging.requirements import Requirement

from flowgen.cli import COMMANDS
from flowgen.config.compose import conf_folder, group_options, register_resolvers, resolve_config
from flowgen.config.instantiate import build_model, with_image_shape

PACKAGE = Path(__file__).parents[1] / "flowgen"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [  # from the top; a module imports only its own package and layers below it
    {"__main__"},
    {"cli"},
    {"serving"},
    {"commands"},
    {"api", "__init__"},
    {"config"},
    {"training", "evaluation"},
    {"models", "data"},
    {"bijections"},
    {"utils"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
SCREEN = 60  # lines of a function below its signature and docstring
ONLY_IN = {
    "hydra": {"config/compose.py", "commands/train.py"},
    "omegaconf": {"config/compose.py", "commands/train.py"},
    "click": {"cli.py"},
    "tqdm": {"utils/console.py", "training/logger.py", "data/cache.py"},
}


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "flowgen"
                else [node.module or ""]
            )
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    relative = path.relative_to(PACKAGE)
    floor = relative.parts[0].removesuffix(".py")
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == "flowgen":
            other = rest.split(".")[0]
            assert other == floor or LAYER[other] > LAYER[floor], f"{relative} imports {name}"
        if first in ONLY_IN:
            assert {str(relative), floor} & ONLY_IN[first], f"{relative} imports {name}"


def module_of(path: Path) -> str:
    return ".".join(("flowgen", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    )


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """The modules of flowgen that a file imports anywhere in it, under TYPE_CHECKING and inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {
                name if (name := f"{node.module}.{alias.name}") in modules else str(node.module)
                for alias in node.names
            }
    return found & modules


def test_no_module_imports_itself_by_way_of_others():
    modules = {module_of(path): path for path in FILES}
    graph = {name: imported_modules(path, set(modules)) for name, path in modules.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def length(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_fit_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            first = body[0].lineno if body else node.lineno
            assert (node.end_lineno or 0) - first <= SCREEN, node.name


def compose_config(*overrides: str) -> dict:
    register_resolvers()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose(
            "train",
            [*overrides, "output_dir=somewhere", "hydra.runtime.output_dir=somewhere"],
            return_hydra_config=True,
        )
        HydraConfig.instance().set_config(cfg)
        return resolve_config(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]))


def shape_of(data: dict) -> tuple[int, int, int]:
    """What the data would say of its images if it lay here."""
    if data["_target_"].rpartition(".")[2] in ("CIFAR10", "SVHN", "DownsampledImageNet"):
        return 3, data.get("size", 32), data.get("size", 32)
    side = data.get("size", 28)
    return (
        (2, 1, 1) if data["_target_"].endswith("Toy2D") else (data.get("channels", 1), side, side)
    )


@pytest.mark.parametrize("name", group_options("experiment"))
def test_every_experiment_composes_and_builds_its_model(name):
    text = (conf_folder() / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n# "), (
        "the first comment says which figure, and what to expect"
    )
    config = compose_config(f"experiment={name}")
    config["model"] |= {"width": 4} if "width" in config["model"] else {}
    build_model(with_image_shape(config, shape_of(config["data"]), config["data"]["bits"]))


@pytest.fixture(scope="module")
def kinds() -> list[tuple[tuple[int, int, int], int]]:
    """Shapes and bits of all data sets."""
    sections = [
        compose_config(f"data={name}")["data"] for name in group_options("data") if name != "folder"
    ]
    return sorted({(shape_of(section), section["bits"]) for section in sections})


@pytest.mark.parametrize("name", group_options("model"))
def test_every_model_fits_every_data_set(name, kinds):
    config = compose_config(f"model={name}")
    config["model"] |= {key: 16 for key in ("width", "hidden") if key in config["model"]}
    for shape, bits in kinds:
        build_model(
            with_image_shape(config, shape, min(bits, config["data"]["bits"]))
        )  # of an RBM 1


@pytest.mark.parametrize(
    "name",
    sorted(each.name for each in COMMANDS if (PACKAGE / "commands" / f"{each.name}.py").exists()),
)
def test_the_function_of_a_command_takes_keywords_alone(name):
    function = getattr(importlib.import_module(f"flowgen.commands.{name}"), name)
    assert all(
        each.kind is each.KEYWORD_ONLY for each in inspect.signature(function).parameters.values()
    )


@pytest.mark.parametrize("path", sorted(conf_folder().rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_says_what_it_is(path):
    assert path.read_text().startswith("# ")
    yaml.safe_load(path.read_text())


def test_every_import_is_declared_and_every_requirement_has_a_floor_that_the_pins_meet():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = [word for words in project["optional-dependencies"].values() for word in words]
    required = {
        each.name.lower(): each.specifier
        for each in map(Requirement, project["dependencies"] + extras)
        if each.name != "flowgen"
    }
    names = {
        "PIL": "pillow",
        "yaml": "pyyaml",
        "hydra": "hydra-core",
        "torch_fidelity": "torch-fidelity",
        "telegram": "python-telegram-bot",
    }
    found = (
        {name.partition(".")[0] for path in FILES for name in imports(path)}
        - set(sys.stdlib_module_names)
        - {"flowgen"}
    )
    assert {names.get(name, name) for name in found} <= set(required)
    pinned = dict(
        line.lower().split("==")
        for line in (PACKAGE.parent / "constraints.txt").read_text().splitlines()
    )
    for name, specifier in required.items():
        assert any(each.operator == ">=" for each in specifier), f"{name} has no floor"
        assert specifier.contains(pinned[name]), f"{name} is pinned below its floor, or not at all"
