"""`flowgen report`: one page that holds everything it shows."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

from conftest import SMALL
from PIL import Image


class Page(HTMLParser):
    """The pictures and links of a page, and whether every element that opens is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.ids.add(named.get("id") or "")
        if tag == "img":
            self.sources.append(named["src"])
        if tag == "a":
            self.links.append(named["href"])
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_report_of_several_runs_holds_all_its_pictures(images, tmp_path, command):
    for width in (8, 12):
        words = [
            *SMALL,
            f"data.root={images}",
            "trainer.steps=4",
            "trainer.eval_every=2",
            f"output_dir=outputs/both/width{width}",
        ]
        assert command("train", *words, f"model.width={width}")[0] == 0
    assert command("sample", "--run", "outputs/both/width8", "--count", 4)[0] == 0
    status, _, error = command("report", "both", "--out", tmp_path / "page.html")
    assert status == 0, error
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.open == [] and not re.search(r"https?://|<script", text), "nothing from the network"
    assert (
        len(page.sources) == 1 + 2 * 2 + 1
    )  # one plot of both; curves and samples of each; what was sampled of one
    for source in page.sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    assert set(page.links) == {"#run1", "#run2"} <= {f"#{name}" for name in page.ids}
    assert (
        re.search(r"<th>model.width</th><td>(8</td><td>12|12</td><td>8)</td>", text)
        and "<th>model.levels" not in text
    )
    assert "bits_per_dim" in text and "torch 2." in text
    rows = re.findall(r'<tr><th><a href="#run\d">.*?</tr>', text)
    assert len(rows) == 2 and all(
        re.search(r"<td>4</td><td>[\d,.]*[1-9][\d.]*</td><td>0.00</td><td>\d\.\d\d</td>", row)
        for row in rows
    )


def test_a_report_of_one_run_lies_in_its_folder(tiny_run, command):
    assert command("report", tiny_run)[1].strip() == str(tiny_run / "report.html")
    assert (tiny_run / "report.html").exists()


def test_figures_at_different_bits_do_not_share_a_plot_and_a_broken_run_spoils_nothing(
    images, command
):
    for bits in (5, 8):
        words = [
            *SMALL,
            f"data.root={images}",
            "trainer.steps=1",
            f"data.bits={bits}",
            f"output_dir=outputs/all/at{bits}",
        ]
        assert command("train", *words)[0] == 0
    broken = Path("outputs/all/broken/config.yaml")
    broken.parent.mkdir()
    broken.write_text("{")
    status, output, error = command("report", "all")
    assert status == 0 and "left out" in error and "broken" in error
    text = Path(output.strip()).read_text()
    assert (
        "Validation bits per dim at 5 bits" in text and "Validation bits per dim at 8 bits" in text
    )
    listed = [line for line in command("runs")[1].splitlines() if line.startswith("outputs")]
    assert sum("Glow" in line for line in listed) == 2 and all("images" in line for line in listed)


def test_names_are_escaped(images, command):
    words = [*SMALL, f"data.root={images}", "trainer.steps=1", "out='outputs/<b>'"]
    assert command("train", *words)[0] == 0
    page = Path(command("report", "<b>")[1].strip()).read_text()
    assert "<b>" not in page and "&lt;b&gt;" in page


def test_a_run_that_is_not_there_gets_one_line_and_a_checkpoint_stands_for_its_run(images, command):
    for name in ("one", "other"):
        assert (
            command(
                "train",
                *SMALL,
                f"data.root={images}",
                "trainer.steps=1",
                f"output_dir=outputs/{name}",
            )[0]
            == 0
        )
    assert (
        command("report", "outputs/one/checkpoints/last.pt")[1].strip() == "outputs/one/report.html"
    )
    status, _, error = command("report", "nothing")
    assert status == 1 and "is no run" in error and len(error.splitlines()) == 1
