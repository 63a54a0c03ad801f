"""Save a picture of the page of `flowgen explore` for a model. Needs playwright and Chromium."""

import argparse
import shutil
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

from flowgen.serving.session import ModelSession
from flowgen.serving.web.app import open_server

WIDTH = 930  # pixels
HEIGHT = 990
TIMEOUT_MS = 300_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="name of the run, for example zoo/glow_mnist")
    parser.add_argument("--out", type=Path, default=Path("explore.png"))
    args = parser.parse_args()
    server = open_server(ModelSession(args.run, "cpu"), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as driver:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.locator("#sample-tiles .tile").first.wait_for()
        page.wait_for_load_state("networkidle")
        page.screenshot(path=args.out)
        browser.close()
    server.shutdown()


if __name__ == "__main__":
    main()
