"""`flowgen report`: one page that contains everything it shows."""

import base64
import html
import io
import json
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import SMALL
from PIL import Image
from test_cli import assert_error

import flowgen
from flowgen.commands.runs import data_name, model_name
from flowgen.config.compose import compose_config
from flowgen.config.settings import group_options
from flowgen.utils.html import STYLESHEET, data_url

REPOSITORY = Path(__file__).parents[1]


class Page(HTMLParser):
    """Pictures, links, ids and elements of a page, and the elements that are not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.open: list[str] = []
        self.order: list[str] = []  # of the elements
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.order.append(tag)
        self.ids.add(attributes.get("id") or "")
        if tag == "img":
            self.sources.append(attributes["src"])
        if tag == "a":
            self.links.append(attributes["href"])
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_report_of_several_runs_contains_all_pictures(images, tmp_path, command):
    for width in (8, 12):
        training = [*SMALL, f"data.root={images}", "trainer.steps=4", "trainer.eval_every=2"]
        training += [f"output_dir=outputs/both/width{width}", f"model.width={width}"]
        assert command("train", *training)[0] == 0
    assert command("sample", "--run", "outputs/both/width8", "--count", 4)[0] == 0
    status, _, error = command("report", "both", "--out", tmp_path / "page.html")
    assert status == 0, error
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not re.search(r"https?://|<script", text), "nothing from the network"
    shared_plots = 1
    training_pictures = 2 * 2  # curves and samples of each run
    sampled = 1
    assert len(page.sources) == shared_plots + training_pictures + sampled
    for source in page.sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    assert set(page.links) == {"#run1", "#run2"} <= {f"#{name}" for name in page.ids}
    assert re.search(r"<th>model.width</th><td>(8</td><td>12|12</td><td>8)</td>", text)
    assert "<th>model.steps_per_level" not in text
    assert "<th>output_dir" not in text
    assert "bits_per_dim" in text
    assert "torch 2." in text
    rows = re.findall(r'<tr><th><a href="#run\d">.*?</tr>', text)
    assert len(rows) == 2
    cells = r"<td>4</td><td>[\d,.]*[1-9][\d.]*</td><td>0.00</td><td>\d\.\d\d</td>"
    assert all(re.search(cells, row) for row in rows)


def table_cells(page: str) -> list[list[str]]:
    """Return the rows of the first table, without its links."""
    table = page[page.index("<table>") : page.index("</table>")]
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr>.*?</tr>", table)]
    return [[html.unescape(re.sub("<.*?>", "", cell)) for cell in row] for row in rows]


def test_results_and_samples_come_first_and_curves_with_one_point_are_skipped(images, command):
    for name, steps in (("long", 4), ("short", 1)):
        training = [*SMALL, f"data.root={images}", f"trainer.steps={steps}", "trainer.eval_every=2"]
        assert command("train", *training, f"output_dir=outputs/both/{name}")[0] == 0
        assert command("sample", "--run", f"outputs/both/{name}", "--count", 4)[0] == 0
    text = Path(command("report", "both")[1].strip()).read_text()
    page = Page(text)
    assert page.order.index("table") < page.order.index("img")
    assert table_cells(text)[0][:4] == ["run", "model", "data", "likelihood"]
    assert table_cells(text)[0][4:6] == ["validation", "test"]
    captions = [re.sub("<.*?>", "", text) for text in re.findall("<figcaption>(.*?)</fig", text)]
    samples = captions[:4]
    assert sum(caption.startswith("long: Samples") for caption in samples) == 2
    assert sum(caption.startswith("short: Samples") for caption in samples) == 2
    assert captions[4].startswith("Validation bits per dim at 5 bits of long against")
    training_curves = [caption for caption in captions if caption.startswith("Training loss")]
    assert len(training_curves) == 1
    alone = Path(command("report", "both/short")[1].strip()).read_text()
    assert len(Page(alone).sources) == 2, "samples alone"


def test_a_run_that_has_not_ended_has_no_test_result(images, command):
    training = [*SMALL, f"data.root={images}", "trainer.steps=1", "output_dir=outputs/run"]
    assert command("train", *training)[0] == 0
    path = Path("outputs/run/metrics.jsonl")
    lines = [line for line in path.read_text().splitlines() if '"test"' not in line]
    path.write_text("\n".join(lines) + "\n")
    page = Path(command("report", "run")[1].strip()).read_text()
    cells = dict(zip(*table_cells(page), strict=True))
    assert cells["validation"].startswith("bits_per_dim")
    assert cells["test"] == ""


def test_pages_have_one_design(tiny_run, command):
    """Only page.css has colors, and pages contain it as it is."""
    command("report", tiny_run)
    design = STYLESHEET.read_text()
    assert f"<style>{design.rstrip()}</style>" in (tiny_run / "report.html").read_text()
    assert "prefers-color-scheme: dark" in design
    package = Path(flowgen.__file__).parent
    others = {*package.rglob("*.css"), *package.rglob("*.html")} - {STYLESHEET}
    assert {path.name for path in others} == {"explore.css", "explore.html", "page.html"}
    for path in others:
        assert not re.search(r"#[0-9a-fA-F]{3,8}\s*[;,\"]|rgb|hsl|style=", path.read_text()), path


def test_the_demo_ends_with_a_page(images, command, monkeypatch):
    training = [*SMALL, f"data.root={images}", "trainer.steps=1", "output_dir=outputs/demo"]
    assert command("train", *training)[0] == 0
    picture = Path("outputs/zoo/model/sample.png")
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(picture)
    monkeypatch.setattr(sys, "argv", ["demo_page.py", "outputs/demo", "zoo/model"])
    runpy.run_path(str(REPOSITORY / "scripts/reproduce/demo_page.py"), run_name="__main__")
    text = Path("outputs/demo/demo.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not re.search(r"https?://|<script", text)
    assert page.sources[0] == data_url(picture)
    assert len(page.sources) == 2
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (REPOSITORY / "Makefile").read_text(), re.M)
    assert "open $(DEMO)/demo.html" in recipe[1].splitlines()[-1]


def test_the_report_of_one_run_is_in_its_folder(tiny_run, command):
    assert command("report", tiny_run)[1].strip() == str(tiny_run / "report.html")
    assert (tiny_run / "report.html").exists()


def test_each_number_of_bits_has_its_own_plot_and_broken_runs_are_skipped(
    images, command, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "1000")
    for bits in (5, 8):
        training = [*SMALL, f"data.root={images}", "trainer.steps=1", f"data.bits={bits}"]
        assert command("train", *training, f"output_dir=outputs/all/at{bits}")[0] == 0
    for bits in (5, 8):  # so that the curves have two points
        path = Path(f"outputs/all/at{bits}/metrics.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        row = next(row for row in rows if row["split"] == "validation")
        with path.open("a") as file:
            file.write(json.dumps(row | {"step": 2}) + "\n")
    broken = Path("outputs/all/broken/config.yaml")
    broken.parent.mkdir()
    broken.write_text("{")
    status, output, error = command("report", "all")
    assert status == 0
    assert "outputs/all/broken" in error
    text = Path(output.strip()).read_text()
    assert "Validation bits per dim at 5 bits" in text
    assert "Validation bits per dim at 8 bits" in text
    listed = [line for line in command("runs")[1].splitlines() if line.startswith("outputs")]
    assert sum("glow" in line for line in listed) == 2
    assert all("images" in line for line in listed)


def test_names_are_escaped(images, command):
    training = [*SMALL, f"data.root={images}", "trainer.steps=1", "output_dir='outputs/<b>'"]
    assert command("train", *training)[0] == 0
    page = Path(command("report", "<b>")[1].strip()).read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


def test_a_missing_run_is_an_error_and_a_checkpoint_selects_its_run(images, command):
    for name in ("one", "other"):
        training = [*SMALL, f"data.root={images}", "trainer.steps=1"]
        assert command("train", *training, f"output_dir=outputs/{name}")[0] == 0
    checkpoint = "outputs/one/checkpoints/last.pt"
    assert command("report", checkpoint)[1].strip() == "outputs/one/report.html"
    assert_error(command("report", "nothing"), "is not a run")
    assert_error(command("report", " "), "an empty name is not a run")


def test_runs_of_a_sweep_are_compared_by_their_last_validation_metric(images, command, monkeypatch):
    """Whoever chooses the best run by its test metric selects on the test images."""
    monkeypatch.setenv("COLUMNS", "1000")
    training = [*SMALL, f"data.root={images}", "trainer.steps=4", "trainer.eval_every=2"]
    assert command("train", *training, "output_dir=outputs/run")[0] == 0
    lines = Path("outputs/run/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "validation"]
    assert len({row["bits_per_dim"] for row in rows}) == 2
    expected = f"validation bits_per_dim <= {rows[-1]['bits_per_dim']:.3f}"
    page = Path(command("report", "run")[1].strip()).read_text()
    cells = dict(zip(*table_cells(page), strict=True))
    assert f"validation {cells['validation']}".startswith(expected)
    assert re.fullmatch(r"bits_per_dim <= \d\.\d{3} ± \d\.\d{3}", cells["test"])
    listed = {line.split()[0]: line for line in command("runs")[1].splitlines()}
    assert re.search(rf"test bits_per_dim .* last {expected}", listed["outputs/run"])
    assert all("validation" not in line for name, line in listed.items() if "zoo/" in name)


@pytest.mark.parametrize(("section", "name_of"), [("model", model_name), ("data", data_name)])
def test_runs_have_the_names_that_users_type(section, name_of):
    for name in group_options(section):
        if name not in ("folder", "hub"):
            assert name_of(compose_config([f"{section}={name}"]).config[section]) == name
    folder = compose_config(["data=folder", "data.root=/pictures/cats"]).config["data"]
    assert data_name(folder) == "cats"
