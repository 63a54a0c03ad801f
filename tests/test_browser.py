"""The page of `flowgen explore` in headless Chromium: every control, and no foreign requests."""

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import save_image

from flowgen.serving.session import ModelSession
from flowgen.serving.web.app import open_server

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--no-first-run",
]
TIMEOUT_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()


class Visit:
    """The page of a model in a browser. It records all requested URLs and console messages."""

    def __init__(self, browser, session: ModelSession, **options):
        self.server = open_server(session, 0)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.context = browser.new_context(accept_downloads=True, **options)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT_MS)
        self.urls: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.urls.append(request.url))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.home = f"http://127.0.0.1:{self.server.port}/"
        self.page.goto(self.home)
        self.tiles("#sample-tiles").first.wait_for()

    def tiles(self, group: str):
        return self.page.locator(f"{group} .tile")

    def wait_for(self, selector: str, **options):
        element = self.page.locator(selector, **options).first
        element.wait_for()
        return element

    def set_slider(self, element_id: str, value: object) -> None:
        """Send the input and change events that the arrow keys cause."""
        slider = self.page.locator(f"#{element_id}")
        slider.fill(str(value))
        slider.dispatch_event("change")

    def close(self) -> None:
        self.context.close()
        self.server.shutdown()
        self.server.server_close()
        assert self.errors == []
        assert self.urls
        foreign = [url for url in self.urls if not url.startswith((self.home, "data:"))]
        assert foreign == [], "requests that leave the machine"


@pytest.fixture
def visit(browser, request) -> Iterator:
    visits = []

    def start(session: str, **options) -> Visit:
        visits.append(Visit(browser, request.getfixturevalue(session), **options))
        return visits[-1]

    yield start
    for visited in visits:
        visited.close()


def test_flow_with_the_mouse(visit, tmp_path):
    visited = visit("glow")
    page = visited.page
    page.locator("#about", has_text="Glow trained on").wait_for()
    visited.set_slider("temperature", 0.4)
    visited.set_slider("count", 4)
    page.select_option("#label", "1")
    page.fill("#seed", "7")
    page.click("#sample-form button >> text=Draw")
    visited.wait_for(
        "#sample-command code", has_text="--count 4 --temperature 0.4 --seed 7 --label 1"
    )
    page.click("#next-seed")
    visited.wait_for("#sample-command code", has_text="--seed 8")
    visited.wait_for("#sample-tiles .score", has_text="bits/dim")
    page.click("#sample-command button")
    visited.wait_for("#message", has_text="Copied.")
    visited.tiles("#sample-tiles").nth(0).click()
    visited.tiles("#sample-tiles").nth(1).click()
    page.click("#swap")
    page.set_input_files("#slot-B input", save_image(tmp_path / "photo.png", (30, 40, 3)))
    visited.wait_for("#message", has_text="Your image is B")
    page.click("[name=target][value=A]")
    page.check("#spherical")
    visited.set_slider("interpolation-steps", 5)
    page.click("#interpolation-form button")
    visited.wait_for("#interpolation-command code", has_text="--steps 5 --spherical")
    assert visited.tiles("#latent-tiles").count() == 5
    assert visited.tiles("#pixels-tiles").count() == 5
    visited.set_slider("share", 1)
    visited.wait_for("#mixture [data-name='The mixture with 25 % of B']").click()
    visited.wait_for("#amounts input")
    visited.set_slider("amount-1", 1)
    visited.wait_for("#edit-command code", has_text="--attribute 1 --amount 1.0")
    page.click("#reset")
    visited.wait_for("#score-command code", has_text="flowgen score a.png")
    with page.expect_download() as download:
        page.click("#slot-A a")
    assert download.value.suggested_filename == "a.png"
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 100, box["y"] + 60)
    page.mouse.up()
    visited.wait_for("#erased", has_text="pixels are erased")
    page.check("[name=brush][value=restore]")
    visited.set_slider("brush-size", 2)
    page.mouse.click(box["x"] + 20, box["y"] + 20)
    page.select_option("#known", "left")
    visited.wait_for("#erased", has_text="32 of 64 pixels")
    visited.set_slider("complete-steps", 20)
    page.fill("#complete-seed", "3")
    page.click("#complete-form button")
    visited.wait_for(
        "#complete-command code",
        has_text="--known mask.png --sampler hmc --steps 20 --seed 3",
    )
    assert visited.tiles("#complete-tiles").count() == 12
    with page.expect_download() as download:
        page.click("#save-mask")
    assert download.value.suggested_filename == "mask.png"
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")


def test_flow_with_the_keyboard(visit):
    visited = visit("glow")
    page = visited.page
    visited.tiles("#sample-tiles").nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    visited.wait_for("#message", has_text="Sample 2 of seed 0 is A.")
    page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    visited.wait_for("#message", has_text="Sample 3 of seed 0 is B.")
    page.focus("#canvas")
    for key in (" ", "ArrowRight", "ArrowDown", " ", "r"):
        page.keyboard.press(key)
    visited.wait_for("#erased", has_text="7 of 64 pixels")
    page.focus("#sample-form button")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    visited.wait_for("#sample-command code", has_text="--seed 1")


def hold_requests(page, endpoint: str, is_held: Callable[[dict], bool]) -> list:
    """Hold the requests to an endpoint whose payload is selected. Return the list of them."""
    held = []

    def handle(route):
        if is_held(route.request.post_data_json):
            held.append(route)
        else:
            route.continue_()

    page.route(f"**/api/{endpoint}", handle)
    return held


def release(page, route, endpoint: str) -> None:
    """Let a held request continue, and give the page time for the response."""
    with page.expect_response(f"**/api/{endpoint}"):
        route.continue_()
    page.wait_for_timeout(200)


def test_a_late_response_does_not_replace_newer_samples(visit):
    visited = visit("glow")
    page = visited.page
    held = hold_requests(page, "sample", lambda payload: payload["seed"] == 0)
    page.click("#sample-form button >> text=Draw")
    page.click("#next-seed")
    visited.wait_for("#sample-command code", has_text="--seed 1")
    release(page, held[0], "sample")
    assert page.locator("#sample-command code").inner_text().endswith("--seed 1")


def test_a_late_response_does_not_replace_a_newer_edit_or_a_reset(visit):
    visited = visit("glow")
    page = visited.page
    visited.tiles("#sample-tiles").nth(0).click()
    visited.wait_for("#amounts input")
    held = hold_requests(page, "edit", lambda payload: payload["amounts"]["1"] == 1)
    visited.set_slider("amount-1", 1)
    visited.set_slider("amount-1", 2)
    visited.wait_for("#edit-command code", has_text="--amount 2.0")
    release(page, held[0], "edit")
    assert "--amount 2.0" in page.locator("#edit-command code").inner_text()
    visited.set_slider("amount-1", 1)
    page.click("#reset")
    release(page, held[1], "edit")
    assert visited.tiles("#edit-tiles").count() == 0


def test_every_control_has_a_name_for_screen_readers(visit):
    for session in ("glow", "rbm"):
        page = visit(session).page
        for role in (
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
            for element in page.get_by_role(role).all():
                name = (
                    element.get_attribute("aria-label")
                    or element.get_attribute("alt")
                    or element.inner_text().strip()
                    or element.locator("xpath=ancestor::label").inner_text().strip()
                )
                assert name, role
        assert page.locator("[aria-live=polite]").count() == 2
        assert page.locator("html[lang=en]").count() == 1


def test_errors_are_shown_and_invalid_files_change_nothing(visit, tmp_path, glow, monkeypatch):
    monkeypatch.setattr(glow, "scorer_error", "out of luck")
    visited = visit("glow")
    page = visited.page
    visited.wait_for("#percentile-hint", has_text="Percentiles are unavailable: out of luck.")
    page.click("#interpolation-form button")
    visited.wait_for("#message.error", has_text="A and B")
    page.click("#complete-form button")
    visited.wait_for("#message.error", has_text="as A")
    hostile = tmp_path / "<img src=x onerror=alert(1)>.png"
    hostile.write_text("words")
    page.set_input_files("#slot-A input", hostile)
    visited.wait_for("#message.error", has_text="is not an image")
    (tmp_path / "large.png").write_bytes(b" " * 6_000_000)
    page.set_input_files("#slot-A input", tmp_path / "large.png")
    visited.wait_for("#message.error", has_text="larger than 5.5 MB")
    assert page.locator("#slot-A .empty").count() == 1
    visited.tiles("#sample-tiles").nth(0).click()
    page.select_option("#known", "left")
    visited.set_slider("complete-steps", 1000)
    page.click("#complete-form button")
    page.click("#stop")
    visited.wait_for("#message.error", has_text="stopped")
    # The browser itself logs each response with status 400.
    visited.errors = [text for text in visited.errors if "400 (BAD REQUEST)" not in text]


def test_rbm_runs_chains_and_shows_filters(visit):
    visited = visit("rbm")
    page = visited.page
    assert page.locator("label.classes").is_hidden()
    page.select_option("#sampler", "gibbs")
    visited.set_slider("sample-steps", 10)
    visited.wait_for("#sample-command code", has_text="--sampler gibbs --steps 10")
    page.select_option("#chains-sampler", "tempering")
    visited.set_slider("chains-steps", 3)
    page.fill("#chains-seed", "5")
    page.click("#start-chains")
    visited.wait_for("#chains-step", has_text=re.compile(r"after step [1-9]"))
    page.click("#pause")
    visited.wait_for("#chains-tiles .score", has_text="nats")
    visited.wait_for(
        "#chains-command code",
        has_text="--sampler tempering --count 16 --seed 5 --steps 3 --frames",
    )
    visited.tiles("#chains-tiles").nth(2).click()
    visited.wait_for("#message", has_text="Chain 3 is A.")
    page.click("#show-filters")
    visited.wait_for("#filters-image[src^=data]")
    page.click("#find-directions")
    visited.wait_for("#amounts input")
    page.select_option("#complete-sampler", "mean-field")
    page.select_option("#known", "top")
    page.click("#complete-form button")
    visited.wait_for("#complete-command code", has_text="--sampler mean-field")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1240])
def test_page_fits_its_width_in_light_and_dark(visit, scheme, width):
    viewport = {"width": width, "height": 800}
    page = visit("glow", viewport=viewport, color_scheme=scheme).page
    for selector in (
        "body",
        "#samples",
        "#selection",
        "#interpolation",
        "#sample-command",
        "#canvas",
    ):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0, selector
        assert box["x"] + box["width"] <= width, selector
    color = {"light": "rgb(247, 246, 243)", "dark": "rgb(20, 21, 23)"}[scheme]
    playwright.expect(page.locator("body")).to_have_css("background-color", color)
