"""The page in headless Chromium: every control, and that no request leaves the machine."""

import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import save_image

from flowgen.serving.session import ModelSession
from flowgen.serving.web.app import open_server

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
QUIET = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--no-first-run",
]
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()


class Visit:
    """A page of a model in a browser, with every address that it asked for and every complaint that it made."""

    def __init__(self, browser, answers: ModelSession, **how):
        self.server = open_server(answers, 0)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.context = browser.new_context(accept_downloads=True, **how)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.payload: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.payload.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.home = f"http://127.0.0.1:{self.server.port}/"
        self.page.goto(self.home)
        self.tiles("#sample-tiles").first.wait_for()

    def tiles(self, group: str):
        return self.page.locator(f"{group} .tile")

    def wait_for(self, selector: str, **how):
        found = self.page.locator(selector, **how).first
        found.wait_for()
        return found

    def slide(self, name: str, value: object) -> None:
        """As the arrow keys of a slider do: its input and change events."""
        slider = self.page.locator(f"#{name}")
        slider.fill(str(value))
        slider.dispatch_event("change")

    def close(self) -> None:
        self.context.close()
        self.server.shutdown()
        self.server.server_close()
        assert self.complaints == []
        assert self.payload and all(url.startswith((self.home, "data:")) for url in self.payload), (
            "requests that leave the machine"
        )


@pytest.fixture
def visit(browser, request) -> Iterator:
    visits = []

    def start(name: str, **how) -> Visit:
        visits.append(Visit(browser, request.getfixturevalue(name), **how))
        return visits[-1]

    yield start
    for each in visits:
        each.close()


def test_a_flow_by_mouse(visit, tmp_path):
    seen = visit("glow")
    page = seen.page
    page.locator("#about", has_text="Glow of").wait_for()
    seen.slide("temperature", 0.4)
    seen.slide("count", 4)
    page.select_option("#label", "1")
    page.fill("#seed", "7")
    page.click("#sample-form button >> text=Draw")
    seen.wait_for("#sample-command code", has_text="--count 4 --temperature 0.4 --seed 7 --label 1")
    page.click("#next-seed")
    seen.wait_for("#sample-command code", has_text="--seed 8")
    seen.wait_for("#sample-tiles .figures", has_text="bits/dim")
    page.click("#sample-command button")
    seen.wait_for("#said", has_text="Copied.")
    seen.tiles("#sample-tiles").nth(0).click()
    seen.tiles("#sample-tiles").nth(1).click()
    page.click("#swap")
    page.set_input_files("#slot-B input", save_image(tmp_path / "photo.png", (30, 40, 3)))
    seen.wait_for("#said", has_text="an image of yours is B")
    page.click("[name=target][value=A]")
    page.check("#spherical")
    seen.slide("steps", 5)
    page.click("#walk-form button")
    seen.wait_for("#walk-command code", has_text="--steps 5 --spherical")
    assert seen.tiles("#latent-tiles").count() == seen.tiles("#pixels-tiles").count() == 5
    seen.slide("share", 1)
    seen.wait_for("#mix [data-name='The mixture with 25 % of B']").click()
    seen.wait_for("#amounts input")
    seen.slide("amount-1", 1)
    seen.wait_for("#edit-command code", has_text="--attribute 1 --by 1.0")
    page.click("#reset")
    seen.wait_for("#score-command code", has_text="flowgen score a.png")
    with page.expect_download() as saved:
        page.click("#slot-A a")
    assert saved.value.suggested_filename == "a.png"
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 100, box["y"] + 60)
    page.mouse.up()
    seen.wait_for("#erased", has_text="pixels are erased")
    page.check("[name=brush][value=restore]")
    seen.slide("brush-size", 2)
    page.mouse.click(box["x"] + 20, box["y"] + 20)
    page.select_option("#keep", "left")
    seen.wait_for("#erased", has_text="32 of 64 pixels")
    seen.slide("sweeps", 20)
    page.fill("#complete-seed", "3")
    page.click("#complete-form button")
    seen.wait_for(
        "#complete-command code", has_text="--keep mask.png --method langevin --sweeps 20 --seed 3"
    )
    assert seen.tiles("#complete-tiles").count() == 12
    with page.expect_download() as saved:
        page.click("#save-mask")
    assert saved.value.suggested_filename == "mask.png" and Path(
        saved.value.path()
    ).read_bytes().startswith(b"\x89PNG")


def test_a_flow_by_keyboard_alone(visit):
    seen = visit("glow")
    page = seen.page
    seen.tiles("#sample-tiles").nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    seen.wait_for("#said", has_text="Sample 2 of seed 0 is A.")
    page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    seen.wait_for("#said", has_text="Sample 3 of seed 0 is B.")
    page.focus("#canvas")
    for key in (" ", "ArrowRight", "ArrowDown", " ", "r"):
        page.keyboard.press(key)
    seen.wait_for("#erased", has_text="7 of 64 pixels")
    page.focus("#sample-form button")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    seen.wait_for("#sample-command code", has_text="--seed 1")


def test_every_control_has_a_name_for_screen_readers(visit):
    for model in ("glow", "rbm"):
        page = visit(model).page
        for kind in (
            "button",
            "slider",
            "combobox",
            "spinbutton",
            "radio",
            "checkbox",
            "link",
            "application",
            "img",
        ):
            for each in page.get_by_role(kind).all():
                named = (
                    each.get_attribute("aria-label")
                    or each.get_attribute("alt")
                    or each.inner_text().strip()
                )
                named = named or each.locator("xpath=ancestor::label").inner_text().strip()
                assert named, kind
        assert (
            page.locator("[aria-live=polite]").count() == 2
            and page.locator("html[lang=en]").count() == 1
        )


def test_mistakes_are_said_and_a_file_that_is_no_image_changes_nothing(
    visit, tmp_path, glow, monkeypatch
):
    monkeypatch.setattr(glow, "no_judge", "out of luck")
    seen = visit("glow")
    seen.wait_for("#percentile-hint", has_text="No percentiles: out of luck.")
    seen.page.click("#walk-form button")
    seen.wait_for("#said.wrong", has_text="A and B")
    seen.page.click("#complete-form button")
    seen.wait_for("#said.wrong", has_text="as A")
    (tmp_path / "<img src=x onerror=alert(1)>.png").write_text("words")
    seen.page.set_input_files("#slot-A input", tmp_path / "<img src=x onerror=alert(1)>.png")
    seen.wait_for("#said.wrong", has_text="is not an image")
    (tmp_path / "large.png").write_bytes(b" " * 6_000_000)
    seen.page.set_input_files("#slot-A input", tmp_path / "large.png")
    seen.wait_for("#said.wrong", has_text="larger than 5.5 MB")
    assert seen.page.locator("#slot-A .empty").count() == 1
    seen.tiles("#sample-tiles").nth(0).click()
    seen.page.select_option("#keep", "left")
    seen.slide("sweeps", 1000)
    seen.page.click("#complete-form button")
    seen.page.click("#stop")
    seen.wait_for("#said.wrong", has_text="stopped")
    seen.complaints = [
        each for each in seen.complaints if "400 (BAD REQUEST)" not in each
    ]  # what the browser itself notes of a refusal


def test_an_rbms_chains_run_live_and_its_filters_are_shown(visit):
    seen = visit("rbm")
    page = seen.page
    assert page.locator("label.classes").is_hidden()
    page.select_option("#sampler", "gibbs")
    seen.slide("sample-sweeps", 10)
    seen.wait_for("#sample-command code", has_text="--method gibbs --sweeps 10")
    page.select_option("#chains-method", "tempering")
    seen.slide("chains-sweeps", 3)
    page.fill("#chains-seed", "5")
    page.click("#run-chains")
    seen.wait_for("#sweep", has_text=re.compile(r"at sweep [1-9]"))
    page.click("#pause")
    seen.wait_for("#chains-tiles .figures", has_text="nats")
    seen.wait_for(
        "#chains-command code",
        has_text="--method tempering --count 16 --seed 5 --sweeps 3 --frames",
    )
    seen.tiles("#chains-tiles").nth(2).click()
    seen.wait_for("#said", has_text="Chain 3 is A.")
    page.click("#show-filters")
    seen.wait_for("#filters-picture[src^=data]")
    page.click("#find")
    seen.wait_for("#amounts input")
    page.select_option("#method", "mean-field")
    page.select_option("#keep", "top")
    page.click("#complete-form button")
    seen.wait_for("#complete-command code", has_text="--method mean-field")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1240])
def test_the_page_fits_its_width_in_light_and_in_dark(visit, scheme, width):
    page = visit("glow", viewport={"width": width, "height": 800}, color_scheme=scheme).page
    boxes = [
        page.locator(name).bounding_box()
        for name in ("body", "#samples", "#hand", "#walk", "#sample-command", "#canvas")
    ]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
    colour = {"light": "rgb(247, 246, 243)", "dark": "rgb(20, 21, 23)"}[scheme]
    playwright.expect(page.locator("body")).to_have_css("background-color", colour)
