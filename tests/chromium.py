"""A real browser for the tests: the system's Chromium, driven by Playwright, watched for errors and requests."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

PICTURES = Path(os.environ.get("LORAX_SCREENSHOTS", Path(__file__).resolve().parents[1] / "screenshots"))
WORDS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@contextmanager
def chromium():
    """Start the browser; skip where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine: the browser tests need one")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (it is in the dev extra)"
    )
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=WORDS)
        yield browser
        browser.close()


def watched(browser, **options):
    """Open a page that remembers in `errors` and `requests` what went wrong and what was asked for."""
    page = browser.new_context(**options).new_page()
    page.errors, page.requests = [], []
    page.on("console", lambda said: page.errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(error.stack or str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    return page


def picture(page, name, **options):
    """Keep a screenshot, to be looked at."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png", **options)
