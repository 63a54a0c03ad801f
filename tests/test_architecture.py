"""Rules of the code base: layers, import budgets, short functions, complete configurations."""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from flowgen.cli import HELP_SECTIONS, cli
from flowgen.config.compose import compose_config
from flowgen.config.instantiate import build_model, with_image_shape
from flowgen.config.settings import (
    SECTIONS,
    conf_folder,
    group_options,
    settings_of_file,
    settings_of_option,
)

PACKAGE = Path(__file__).parents[1] / "flowgen"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [  # from the top; a module imports only its own package and lower layers
    {"__main__"},
    {"cli"},
    {"serving"},
    {"commands"},
    {"__init__"},
    {"api"},
    {"config"},
    {"training", "evaluation", "coding"},
    {"models", "data"},
    {"bijections"},
    {"utils"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
TEXT_SUFFIXES = {".css", ".html", ".js", ".md", ".py", ".rst", ".sh", ".toml", ".yaml", ".yml"}
MAX_FUNCTION_LINES = 60  # below the signature and the docstring
MAX_MODULES_TRAIN = 63  # of flowgen before the first optimizer step
MAX_MODULES_SAMPLE = 49
CHOICES = re.compile(r"One of ([^.]+)\.")  # in the meaning of a setting
ONLY_IN = {  # files that may import a library
    "hydra": {"config/compose.py", "config/instantiate.py", "commands/train.py"},
    "omegaconf": {"config/compose.py", "config/instantiate.py", "commands/train.py"},
    "click": {"cli.py", "commands/shell_completion.py"},
    "torchvision": set(),
    "tqdm": {"utils/console.py", "training/logger.py"},
}
WINDOWS = """
import importlib, importlib.abc, os, signal, sys

HIDDEN = ("fcntl", "grp", "pwd", "resource", "termios")

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

# Libraries have their own code for Windows, which is not tested here.
import filelock, psutil

if "torch" in sys.argv[1]:
    import torch

for name in HIDDEN:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Hide())
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL"):
    delattr(signal, name)
for name in ("sched_getaffinity", "fork", "sysconf", "getuid", "geteuid"):
    delattr(os, name)
"""


def relative_name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("flowgen", *parts)).removesuffix(".__init__")


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.module == "flowgen":
                names += [f"flowgen.{alias.name}" for alias in node.names]
            else:
                names.append(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=relative_name)
def test_imports_point_down_the_layers(path):
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        library, _, rest = name.partition(".")
        if library == "flowgen":
            other = rest.split(".")[0]
            assert other == layer or LAYER[other] > LAYER[layer], f"{path} imports {name}"
        if library in ONLY_IN:
            assert {relative_name(path), layer} & ONLY_IN[library], f"{path} imports {name}"


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """Return all modules of flowgen that a file imports, including imports in functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found |= submodules or {str(node.module)}
    return found & modules


def test_modules_do_not_import_each_other_in_a_cycle():
    modules = {module_name(path): path for path in FILES}
    graph = {name: imported_modules(path, set(modules)) for name, path in modules.items()}
    del graph["flowgen"]  # its exports are lazy
    graph = {name: others - {"flowgen"} for name, others in graph.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("path", FILES, ids=relative_name)
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            first = body[0].lineno if body else node.lineno
            assert (node.end_lineno or 0) - first <= MAX_FUNCTION_LINES, node.name


def run_python(code: str, *arguments: str) -> str:
    completed = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def count_modules(code: str) -> int:
    names = json.loads(run_python(code).splitlines()[-1])
    print(*names, sep="\n")
    return len(names)


def test_training_imports_few_modules_before_its_first_step():
    """The first step begins with the first call of backward."""
    code = """if True:
        import json, os, sys, torch
        from flowgen.cli import main

        def stop(*arguments, **kwargs):
            names = sorted(name for name in sys.modules if name.partition(".")[0] == "flowgen")
            print(json.dumps(names), flush=True)
            os._exit(0)

        torch.Tensor.backward = stop
        main(["train", "model=glow", "model.width=4", "trainer.steps=1", "trainer.init_images=8"])
    """
    assert count_modules(code) <= MAX_MODULES_TRAIN


def test_sampling_imports_few_modules():
    code = """if True:
        import json, sys
        from flowgen.cli import main

        main(["sample", "--run", "zoo/glow_mnist", "--count", "1", "--out", "a.png"])
        names = sorted(name for name in sys.modules if name.partition(".")[0] == "flowgen")
        print(json.dumps(names))
    """
    assert count_modules(code) <= MAX_MODULES_SAMPLE


def test_command_line_starts_without_modules_that_windows_lacks():
    code = WINDOWS + "from flowgen.cli import main\nmain(['--help'])\nmain(['train', '--help'])"
    output = run_python(code, "")
    assert "interpolate" in output
    assert "trainer.steps" in output


def test_every_module_can_be_imported_without_modules_that_windows_lacks():
    """Each module is imported on its own, without the modules that others have imported."""
    names = [module_name(path) for path in FILES]
    code = f"""{WINDOWS}
import traceback
failed = []
for module in {names!r}:
    before = set(sys.modules)
    try:
        importlib.import_module(module)
    except Exception:
        failed.append(f"{{module}}: {{traceback.format_exc()}}")
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "flowgen":
            del sys.modules[name]
sys.exit("\\n".join(failed) or 0)
"""
    run_python(code, "torch")


SHAPES = {  # channels and size of the images of a class, where its configuration has neither
    "CIFAR10": (3, 32),
    "DownsampledImageNet": (3, 32),
    "Energy2D": (2, 1),
    "MNIST": (1, 28),
    "MNISTSample": (1, 28),
    "SVHN": (3, 32),
    "Toy2D": (2, 1),
}


def image_shape(data: dict) -> tuple[int, int, int]:
    """Return the shape of the images of a data section, even if they are missing."""
    name = data["_target_"].rpartition(".")[2]
    default_channels, default_size = SHAPES.get(name, (None, None))
    channels = data.get("channels", default_channels)
    size = data.get("size", default_size)
    assert channels and size, f"add channels and size of {name} to SHAPES"
    return channels, size, size


@pytest.mark.parametrize("name", group_options("experiment"))
def test_every_experiment_composes_and_builds_its_model(name):
    text = (conf_folder() / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n# "), "the first comment describes the experiment"
    config = compose_config([f"experiment={name}"]).config
    if "width" in config["model"]:
        config["model"]["width"] = 4
    build_model(with_image_shape(config, image_shape(config["data"]), config["data"]["bits"]))


@pytest.fixture(scope="module")
def image_formats() -> list[tuple[tuple[int, int, int], int]]:
    """Return image shape and bits of all data sets."""
    names = [name for name in group_options("data") if name not in ("folder", "hub")]
    sections = [compose_config([f"data={name}"]).config["data"] for name in names]
    return sorted({(image_shape(section), section["bits"]) for section in sections})


# Reverse KL fits to data=energy alone.
@pytest.mark.parametrize("name", sorted({*group_options("model")} - {"reverse_kl"}))
def test_every_model_fits_every_data_set(name, image_formats):
    config = compose_config([f"model={name}"]).config
    for key in ("width", "hidden"):
        if key in config["model"]:
            config["model"][key] = 16
    for shape, bits in image_formats:
        build_model(with_image_shape(config, shape, min(bits, config["data"]["bits"])))


@pytest.mark.parametrize(
    ("section", "name"),
    [(section, name) for section in SECTIONS for name in group_options(section)],
)
def test_every_setting_has_a_meaning(section, name):
    for key, setting in settings_of_option(section, name).items():
        assert setting.meaning, f"conf/{section}/{name}.yaml: {key} has no comment"
        choices = CHOICES.search(setting.meaning)
        if choices and isinstance(setting.default, str):
            assert setting.default in choices[1].split(", "), key


def test_every_general_setting_has_a_meaning():
    assert all(setting.meaning for setting in settings_of_file("train").values())


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_help_has_every_command_in_one_section(name):
    names = [listed for section in HELP_SECTIONS.values() for listed in section]
    assert names.count(name) == 1, f"add {name} to one section of HELP_SECTIONS in flowgen/cli.py"


@pytest.mark.parametrize(
    "name",
    sorted(
        command.name
        for command in cli.commands.values()
        if (PACKAGE / "commands" / f"{command.name}.py").exists()
    ),
)
def test_functions_of_commands_take_keywords_only(name):
    function = getattr(importlib.import_module(f"flowgen.commands.{name}"), name)
    parameters = inspect.signature(function).parameters.values()
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)


@pytest.mark.parametrize("path", sorted(conf_folder().rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_has_a_description(path):
    assert path.read_text().startswith("# ")
    yaml.safe_load(path.read_text())


def test_no_text_installs_flowgen_from_the_package_index():
    """The name belongs to another project there: a clone is installed with `pip install .`."""
    root = PACKAGE.parent
    folders = [root / name for name in ("flowgen", "conf", "docs", "scripts", "tests")]
    paths = [path for folder in folders for path in folder.rglob("*")]
    paths += [*root.glob("*.md"), root / "Makefile"]
    install = re.compile(r"flowgen\[[a-z]|(pip|uv) [^`\n]*install [^`\n]*['\" ]flowgen['\" `\n]")
    for path in paths:
        if path.suffix in TEXT_SUFFIXES or path.name == "Makefile":
            match = install.search(path.read_text())
            assert match is None, f"{path}: {match[0]}"


PACKAGES = {  # of imports with another name
    "PIL": "pillow",
    "hydra": "hydra-core",
    "telegram": "python-telegram-bot",
    "torch_fidelity": "torch-fidelity",
    "yaml": "pyyaml",
}


def test_every_import_is_declared_and_every_requirement_has_a_floor_below_its_pin():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    required = {
        requirement.name.lower(): requirement.specifier
        for requirement in map(Requirement, project["dependencies"] + extras)
        if requirement.name != "flowgen"
    }
    libraries = {name.partition(".")[0] for path in FILES for name in imports(path)}
    libraries -= {*sys.stdlib_module_names, "flowgen"}
    assert {PACKAGES.get(name, name) for name in libraries} <= set(required)
    constraints = (PACKAGE.parent / "constraints.txt").read_text().lower()
    pinned = dict(line.split("==") for line in constraints.splitlines())
    for name, specifier in required.items():
        assert any(part.operator == ">=" for part in specifier), f"{name} has no floor"
        assert specifier.contains(pinned[name]), f"{name} is pinned below its floor, or not at all"
