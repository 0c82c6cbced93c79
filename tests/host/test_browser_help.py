"""The help pages of the nodes, in the front end's own panel."""

import pytest
from chromium import picture
from front_end import NODE, build, front_end
from test_server import NODES

TOGGLE = "Toggle properties panel"


def test_help_pages_fit_the_panel(host, browser):
    with front_end(host, browser) as page:
        if not page.get_by_label(TOGGLE).count():
            pytest.skip("this front end has no panel for help pages")
        for name in NODES:
            build(page, [name, [100, 300], {}, {}])
            page.evaluate(f"type => app.canvas.selectItems([({NODE})(type)])", name)
            info = page.get_by_text("Info", exact=True)
            page.wait_for_timeout(500)
            if not info.count():
                page.get_by_label(TOGGLE).click()
            info.click()
            content = page.locator(".node-help-content", has=page.get_by_role("heading", name="Inputs"))
            content.get_by_role("heading", name="Outputs").wait_for()
            page.wait_for_function(
                "[...document.querySelectorAll('.node-help-content img')].every((one) => one.complete)"
            )
            width, needed = content.evaluate("one => [one.clientWidth, one.scrollWidth]")
            assert 200 < width < 340
            assert needed == width, name
        picture(page, "help")
