"""A real browser for the tests: the system's Chromium, driven by Playwright, watched for errors and requests."""

import io
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

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
    page.on("console", lambda said: page.errors.append(_with_place(said)) if said.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(error.stack or str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    return page


def _with_place(said):
    """What a console message says, and of which file: a file that is not there is named by its place only."""
    return f"{said.text} ({said.location['url']})"


def picture(page, name, **options):
    """Keep a screenshot, to be looked at."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png", **options)


def moving_picture(name, frames):
    """Keep screenshots as one moving picture: each with the milliseconds that it stands. Return its path."""
    pictures = [Image.open(io.BytesIO(png)).convert("RGB") for png, _ in frames]
    path = PICTURES / f"{name}.webp"
    PICTURES.mkdir(parents=True, exist_ok=True)
    times = [time for _, time in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, loop=0, quality=60, method=4)
    return path


def overlaps(page):
    """Return what lies over one another in the views, of what stands side by side: names and pixels."""
    side_by_side = [".lorax-view", ".lorax-line", ".lorax-figures", ".lorax-head", ".lorax-top", ".lorax-left"]
    return page.evaluate(OVERLAPS, [*side_by_side, ".lorax-legend", ".lorax-chips", ".lorax-row"])


OVERLAPS = """(groups) => groups.flatMap((name) => [...document.querySelectorAll(name)]).flatMap((group) => {
    const boxes = [...group.children]
        .filter((part) => part.offsetHeight)
        .map((part) => [part.className || part.textContent, part.getBoundingClientRect()]);
    return boxes.flatMap(([one, a], i) => boxes.slice(i + 1).flatMap(([other, b]) => {
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        return Math.min(across, down) > 1 ? [[one, other, across, down]] : [];
    }));
})"""
