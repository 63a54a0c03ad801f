"""Save a picture of a page with Chromium: an HTML file, or the page of `flowgen explore` for a run.

Examples:
    python scripts/reproduce/page_picture.py zoo/glow_mnist --out explore.png
    python scripts/reproduce/page_picture.py report.html --out report.png
"""

import argparse
import shutil
import threading
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from flowgen.serving.session import ModelSession
from flowgen.serving.web.app import open_server

WIDTH = 930  # pixels
HEIGHT = 990
TIMEOUT_MS = 300_000


def open_explore(page: Page, run: str) -> None:
    """Open the page of `flowgen explore`, and wait for its samples."""
    server = open_server(ModelSession(run, "cpu"), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.locator("#sample-tiles .tile").first.wait_for()
    page.wait_for_load_state("networkidle")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", help="an HTML file, or the name of a run")
    parser.add_argument("--out", type=Path, default=Path("page.png"), help="the picture")
    parser.add_argument("--width", type=int, default=WIDTH, help="width in pixels")
    parser.add_argument("--height", type=int, default=HEIGHT, help="height in pixels")
    args = parser.parse_args()
    with sync_playwright() as driver:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": args.width, "height": args.height})
        page.set_default_timeout(TIMEOUT_MS)
        if args.page.endswith(".html"):
            page.goto(Path(args.page).resolve().as_uri())
        else:
            open_explore(page, args.page)
        page.screenshot(path=args.out)
        browser.close()


if __name__ == "__main__":
    main()
