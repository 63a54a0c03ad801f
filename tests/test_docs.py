"""Run the code of the README and of the documentation, and check its pages in a browser.

Every page is read with Sybil. Its `bash` and `python` blocks run in order, in a new folder, with
small settings: training runs take two optimizer steps of four images (`SMALL_SETTINGS`), samplers
a few steps (`SMALL_OPTIONS`), and data sets have about a hundred random images. Targets of `make`
only have to exist, except in slow blocks. An `output` block is the output of the command before
it, where `...` stands for any text. Blocks of other languages are not run.

An HTML comment before a block changes this:

    <!-- slow -->      only checked: its options and settings exist; `make docs-long` runs it
    <!-- network -->   only checked: it needs a network, other programs or a display;
                       `make docs-long` runs those of its commands that need no account or server

The commands of docs/results are records of measurements, so they are checked too, but not run.
The commands in `<!-- picture ... -->` (scripts/reproduce/docs_pictures.py) are only checked.
`make docs-long` also runs the cells of docs/notebook.ipynb.
"""

import doctest
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import torch
from conftest import save_image, trained
from docs_pictures import all_pictures
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser

from flowgen import cli
from flowgen.config.compose import compose_config
from flowgen.config.settings import group_options, settings_of_file
from flowgen.models.flows import inpainting

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
BUILD = DOCS / "_build"
LONG = os.environ.get("FLOWGEN_DOCS") == "long"
PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *DOCS.rglob("*.md")]
    if BUILD not in path.parents
)
MARKER = re.compile(r"<!-- *(slow|network) *-->\s*$")
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b")  # RUN, FACES: only in docs/results
PROMPT = re.compile(r"^\$ ", re.M)
LENGTH = re.compile(r'"trainer\.(steps|minutes)=\d+"')  # in Python
OUTPUT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SMALL_SETTINGS = [
    "trainer.steps=2",
    "trainer.minutes=null",
    "trainer.batch_size=4",
    "trainer.init_images=16",
    "trainer.eval_images=8",
    "trainer.device=cpu",
]
SMALL_SIZES = {"model.width": "8", "model.hidden": "8", "model.steps_per_level": "1"}
SMALL_OPTIONS = {  # they replace the values in the text
    "score": {"--count": "10"},
    "complete": {"--steps": "5"},
    "chain": {"--frames": "3"},
    "compress": {"--count": "4"},
}
SERVERS = ("explore", "bot", "push")  # they run until interrupted, or need a network
OTHER_PROGRAMS = (
    ".ci/run",
    "cd",
    "curl",
    "docker",
    "eval",
    "export",
    "git",
    "huggingface-cli",
    "pip",
    "python",
    "python3",
    "source",
    "tensorboard",
    "torchrun",
    "uv",
)
NEEDS_AN_ACCOUNT = ("submitit", "hf:", "data=hub")  # or a cluster or server: parts of words
# Runs that pages use without training them, by the name of their folder under outputs/
RUNS = {
    "digits": ["experiment=demo"],
    "faces": ["model=glow", "data=celeba", "data.root=~/celeba"],
    "rbm": ["model=rbm", "data=mnist"],
    "pictures": ["data=folder", "data.root=~/pictures", "data.size=32"],
}


def shrink(overrides: list[str]) -> list[str]:
    """Replace the length and the sizes of a training by small ones, except for swept values."""
    replaced = {setting.split("=")[0] for setting in SMALL_SETTINGS}
    result = []
    for override in overrides:
        key = override.split("=")[0]
        if key in replaced:
            continue
        if key in SMALL_SIZES and "," not in override:
            override = f"{key}={SMALL_SIZES[key]}"
        result.append(override)
    known = settings_of_model(overrides)
    given = {override.split("=")[0] for override in result}
    missing = [f"{key}={SMALL_SIZES[key]}" for key in SMALL_SIZES if key in known - given]
    return [*result, *SMALL_SETTINGS, *missing]


def settings_of_model(overrides: list[str]) -> set[str]:
    """Return the settings of the model that a training uses."""
    config = compose_config(single_values(overrides)).config
    return {f"model.{key}" for key in config["model"]}


def single_values(overrides: list[str]) -> list[str]:
    """Return the overrides without the lists of a sweep."""
    return [word for word in overrides if "," not in word or "[" in word]


class Commands:
    """Runs the `bash` blocks of one page in this process, and checks their outputs."""

    def __init__(
        self,
        page: str,
        run: Callable[..., tuple[int, str, str]],
        setenv: Callable[[str, str], None] = lambda name, value: None,
    ):
        self.run = run
        self.setenv = setenv
        self.is_record = page.startswith("docs/results")
        self.output = ""
        self.steps = 2  # of the run that `flowgen resume` continues

    def bash(self, example: Example) -> None:
        text = example.parsed.replace("\\\n", " ")
        assert not PROMPT.search(text), "write commands without a prompt"
        marker = marker_of(example)
        for words in filter(None, (shlex.split(line, comments=True) for line in text.splitlines())):
            is_checked = words[0] == "make" and marker != "slow"
            if marker:
                is_checked = not LONG
            if marker == "network":
                is_checked = is_checked or not runs_here(words)
            if self.is_record or is_checked:
                check(words)
            else:
                self.execute(words)

    def expected(self, example: Example) -> str | None:
        """Compare an `output` block with the output of the commands before it."""
        wanted = example.parsed
        if doctest.OutputChecker().check_output(wanted, self.output, OUTPUT):
            return None
        return f"the output is\n{self.output}and not\n{wanted}"

    def execute(self, words: list[str]) -> None:
        if words[0] != "flowgen":
            self.execute_other(words)
            return
        if len(words) > 1 and words[1] in SERVERS:
            check(words)
            return
        arguments = small_command(words[1:])
        if arguments[0] == "resume":
            self.steps += 2
            arguments.append(f"trainer.steps={self.steps}")
        status, self.output, error = self.run(*arguments)
        assert status == 0, f"{shlex.join(words)}: {error}"

    def execute_other(self, words: list[str]) -> None:
        if words[:2] == ["python", "-m"] and words[2] in ("zipfile", "flowgen"):
            words = [sys.executable, *words[1:]]
            result = subprocess.run(words, capture_output=True, text=True, check=True)
            self.output = result.stdout
        elif words[0] == "torchrun":
            start = words.index("train")
            words = [*words[1:start], *small_command(words[start:])]
            subprocess.run([sys.executable, "-m", "torch.distributed.run", *words], check=True)
        elif words[0] == "export":
            name, _, value = words[1].partition("=")
            self.setenv(name, str(Path(value).expanduser()))
        elif words[0] == "mkdir":
            Path(words[-1]).expanduser().mkdir(parents=True, exist_ok=True)
        else:
            assert words[0] == "make", f"{words[0]} cannot run here: mark the block as network"
            subprocess.run(["make", "-C", REPOSITORY, *words[1:]], check=True)


def runs_here(words: list[str]) -> bool:
    """Return True if a command of a network block needs no account, server or installation."""
    needs_an_account = any(part in word for word in words for part in NEEDS_AN_ACCOUNT)
    return words[0] in ("flowgen", "torchrun", "export") and not needs_an_account


def small_command(words: list[str]) -> list[str]:
    """Return the arguments of a `flowgen` command with small settings."""
    if words[0] == "train" and not {"--help", "--cfg"} & set(words):
        options = [word for word in words if word.startswith("-")]
        return ["train", *options, *shrink([word for word in words[1:] if word not in options])]
    if words[0] == "resume":
        return [word for word in words if not word.startswith(("trainer.minutes", "trainer.steps"))]
    if words[0] == "sample" and "zoo/rbm_mnist" in words:
        words = [*words, "--steps", "5"]
    small_options = SMALL_OPTIONS.get(words[0], {})
    if "--log-prob" in words:
        small_options = {}  # an estimate from a few steps is refused
    for option, value in small_options.items():
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words = [*words, option, value]
    if words[0] == "evaluate":  # the small MNIST has fewer images
        words = [word for word in words if word != "samples=1000"]
    return [str(Path(word).expanduser()) if word.startswith("~") else word for word in words]


def marker_of(example: Example) -> str:
    match = MARKER.search(example.document.text[: example.start])
    return match[1] if match else ""


def check(words: list[str]) -> None:
    """Check that a command exists, with its options and settings; nothing is run."""
    if "flowgen" in words[1:]:  # torchrun ... -m flowgen train
        words = words[words.index("flowgen") :]
    program, *arguments = words
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
        assert {word for word in arguments if "=" not in word} <= targets, words
    elif program == "flowgen":
        check_flowgen(arguments)
    elif program == "python" and arguments[0] != "-m":
        assert (REPOSITORY / arguments[0]).exists(), words
    else:
        assert program in OTHER_PROGRAMS or program.startswith(("PYTHON", "FLOWGEN_")), words
    if program == "pip":
        check_extras(arguments)


def check_extras(arguments: list[str]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for word in arguments:
        if match := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(match[1].split(",")) <= set(project["optional-dependencies"]), word


def check_flowgen(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        return
    command = cli.cli.commands[arguments[0]]
    context = command.make_context(arguments[0], list(arguments[1:]))
    overrides = list(context.params.get("overrides", ()))
    if PLACEHOLDER.search(" ".join(overrides)):
        return
    if command.name == "train":
        swept = ("hydra",) if context.params["multirun"] else ()
        compose_config([word for word in single_values(overrides) if not word.startswith(swept)])
    for override in overrides:
        key = override.partition("=")[0]
        assert key_exists(key), f"{key} is no setting"


def key_exists(key: str) -> bool:
    return (
        bool(cli.complete_override(None, None, key))  # type: ignore[arg-type]
        or f"evaluation.{key}" in settings_of_file("train")
        or key.startswith("hydra")
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with small files in place of CelebA, MNIST, FashionMNIST and pictures."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("home")
    names = [f"{number:06d}.jpg" for number in range(1, 61)]
    for name in names:
        save_image(folder / "celeba" / "img_align_celeba" / name, (218, 178, 3))
    header = "Smiling Eyeglasses Male Blond_Hair"
    rows = [
        f"{name} {' '.join('1' if index >> bit & 1 else '-1' for bit in range(4))}"
        for index, name in enumerate(names)
    ]
    lists = {
        "list_attr_celeba.txt": [str(len(names)), header, *rows],
        "list_eval_partition.txt": [
            f"{name} {max(0, index - 37) // 10}" for index, name in enumerate(names)
        ],
    }
    for name, lines in lists.items():
        (folder / "celeba" / name).write_text("\n".join(lines) + "\n")
    with zipfile.ZipFile(folder / "faces.zip", "w") as archive:
        for name in names:
            archive.write(folder / "celeba" / "img_align_celeba" / name, name)
    for index in range(120):
        save_image(folder / "pictures" / ("cats", "dogs")[index % 2] / f"{index}.png", (40, 40, 3))
    for name in ("mnist", "fashion-mnist"):
        save_idx(folder / "data" / name)
    return folder


def save_idx(folder: Path) -> None:
    """Save 120 random training and test digits in the format of MNIST."""
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        images = torch.randint(0, 256, (120, 28, 28), dtype=torch.uint8)
        labels = (torch.arange(120) % 10).to(torch.uint8)
        files = (
            ("images-idx3", (0x803, 120, 28, 28), images),
            ("labels-idx1", (0x801, 120), labels),
        )
        for name, header, tensor in files:
            content = struct.pack(f">{len(header)}i", *header) + tensor.numpy().tobytes()
            (folder / f"{split}-{name}-ubyte").write_bytes(content)


@pytest.fixture(scope="module")
def runs(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of RUNS, trained for two steps."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("FLOWGEN_DATA", str(home / "data"))
        return trained(folder, **{name: shrink(overrides) for name, overrides in RUNS.items()})


@pytest.fixture
def reader(home: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a reader types the commands of a page."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("FLOWGEN_DATA", str(home / "data"))
    monkeypatch.setattr(inpainting, "MODE_STEPS", 2)
    for name in ("one", "another", "six"):
        save_image(elsewhere / f"{name}.png", (28, 28))
    return elsewhere


def examples_of(page: str, commands: Commands) -> Iterator[Example]:
    def python(example: Example) -> None:
        small = ", ".join(f'"{word}"' for word in shrink([]))
        code = compile(LENGTH.sub(small, example.parsed), page, "exec")
        if not commands.is_record and not marker_of(example):
            exec(code, example.namespace)

    parsers = [
        CodeBlockParser("bash", commands.bash),
        CodeBlockParser("output", commands.expected),
        CodeBlockParser("python", python),
    ]
    return iter(Sybil(parsers).parse(REPOSITORY / page).examples())


@pytest.mark.parametrize("page", PAGES)
def test_code_of_page_runs(page, reader, command, request, monkeypatch):
    text = (REPOSITORY / page).read_text()
    for name in RUNS:
        is_used = re.search(rf'(flowgen [^\n`]*|load\("|outputs/)\b{name}\b', text)
        if is_used and f"output_dir=outputs/{name}" not in text:
            shutil.copytree(request.getfixturevalue("runs") / name, reader / "outputs" / name)
    for example in examples_of(page, Commands(page, command, monkeypatch.setenv)):
        example.evaluate()


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_page_have_a_language(page):
    text = re.sub(r"^( *)(````+).*?^\1\2", "", (REPOSITORY / page).read_text(), flags=re.M | re.S)
    fences = re.findall(r"^ *```(.*)$", text, re.M)
    assert all(fences[::2]), "name the language of every block: bash, output, python or text"


def test_readme_is_short():
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 900


@pytest.mark.parametrize("name", list(cli.cli.commands))
def test_every_command_has_a_page_and_is_in_the_readme(name):
    assert (DOCS / "commands" / f"{name}.md").is_file(), f"write docs/commands/{name}.md"
    assert f"[`{name}`](docs/commands/" in (REPOSITORY / "README.md").read_text(), (
        f"add {name} to the table of commands in README.md"
    )


@pytest.mark.parametrize("name", group_options("model"))
def test_every_model_has_a_page_and_is_in_the_readme(name):
    text = "".join(path.read_text() for path in (DOCS / "models").glob("*.md"))
    assert f"{{settings}} model={name}" in text, f"document {name} on a page of docs/models"
    assert f"[`{name}`](docs/models/" in (REPOSITORY / "README.md").read_text(), (
        f"add {name} to the table of models in README.md"
    )


def test_documented_scripts_have_a_help():
    text = "".join((REPOSITORY / page).read_text() for page in PAGES)
    scripts = set(re.findall(r"python (scripts/[a-z_./]+)", text))
    assert scripts
    for script in scripts:
        if (REPOSITORY / script).is_dir():
            script = f"{script}/__main__.py"
        if "argparse" not in (REPOSITORY / script).read_text():
            continue
        words = [sys.executable, REPOSITORY / script, "--help"]
        assert subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_every_picture_has_its_commands():
    pictures = all_pictures()
    names = [picture.name for picture in pictures]
    assert sorted(names) == sorted(path.name for path in (DOCS / "images").iterdir())
    for picture in pictures:
        assert picture.files, picture.name
        for line in "\n".join(picture.commands).replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                check(words)


def test_every_picture_is_shown():
    text = "".join((REPOSITORY / page).read_text() for page in PAGES)
    for path in (DOCS / "images").iterdir():
        assert f"images/{path.name})" in text, path.name


def notebook_cells() -> list[str]:
    """Return the code of the cells of docs/notebook.ipynb."""
    cells = json.loads((DOCS / "notebook.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells), "clear the outputs of the notebook"
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_cells_of_notebook_are_valid():
    for cell in notebook_cells():
        lines = cell.splitlines()
        for line in lines:
            if line.startswith("!"):
                check(shlex.split(line[1:]))
        compile("\n".join(line for line in lines if not line.startswith("!")), "notebook", "exec")


@pytest.mark.skipif(not LONG, reason="make docs-long runs the notebook")
def test_notebook_runs(reader):
    def run(command: str) -> None:
        assert (
            subprocess.run([sys.executable, "-m", *shlex.split(command)], check=False).returncode
            == 0
        )

    namespace = {"run_command": run}
    for cell in notebook_cells():
        code = re.sub(r"^!(.*)$", r"run_command('''\1''')", cell, flags=re.M)
        exec(code, namespace)


class Links(HTMLParser):
    """The anchors of a page, and its links and pictures."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if "id" in values:
            self.anchors.add(values["id"] or "")
        target = values.get("href" if tag in ("a", "link") else "src")
        if target:
            self.links.append(target)


def broken_links(folder: Path) -> list[str]:
    """Return the links to missing files, missing anchors, and files of other hosts."""
    pages = {path.resolve(): Links(path) for path in folder.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            url = urlparse(link)
            if url.scheme in ("http", "https", "mailto", "data"):
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            anchors = pages[target].anchors if target in pages else set()
            is_missing = url.fragment and target in pages and unquote(url.fragment) not in anchors
            if is_missing or not target.exists():
                broken.append(f"{path.relative_to(folder.resolve())}: {link}")
    return broken


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="#here"><a href="b.html#x"><a href="b.html">'
    )
    (tmp_path / "b.html").write_text('<a href="https://example.org"><img src="c.png">')
    assert sorted(broken_links(tmp_path)) == ["a.html: b.html#x", "b.html: c.png"]


@pytest.mark.skipif(not (BUILD / "index.html").exists(), reason="needs `make docs`")
def test_built_pages_have_no_broken_link():
    assert len(list(BUILD.rglob("*.html"))) > 50
    assert not broken_links(BUILD)


@pytest.mark.skipif(not LONG, reason="make docs-long builds the pages and visits them")
def test_pages_need_no_network():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None or not (BUILD / "index.html").exists():
        pytest.skip("needs Chromium and `make docs`")
    requests: list[str] = []
    errors: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        for path in sorted(BUILD.rglob("*.html")):
            tab.goto(path.as_uri())
            broken = tab.eval_on_selector_all(
                "img", "nodes => nodes.filter(n => !n.naturalWidth && n.loading != 'lazy').length"
            )
            assert broken == 0, path
        browser.close()
    assert not errors
    assert {urlparse(url).scheme for url in requests} <= {"file", "data"}
