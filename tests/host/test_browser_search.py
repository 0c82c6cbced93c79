"""What a user looks for is found in the front end, and what is rarely used is out of the way."""

import pytest
from chromium import picture
from front_end import build, front_end

SEARCHES = [
    ("convert lora sdxl", "LoRA-X Transfer"),
    ("migrate lora", "LoRA-X Transfer"),
    ("lora for another model", "LoRA-X Transfer"),
    ("lora sd15 to sdxl", "LoRA-X Transfer"),
    ("compare models", "Subspace Similarity"),
    ("compare checkpoints", "Subspace Similarity"),
    ("export lora", "Save LoRA-X"),
    ("lora training", "Train LoRA-X"),
    ("shrink lora", "Convert to LoRA-X"),
    ("inspect lora", "LoRA-X Loader"),
    ("apply moved lora", "Apply Transferred LoRA-X"),
]


@pytest.fixture(autouse=True)
def new_host(info):
    if "search_aliases" not in info["LoraLoader"]:
        pytest.skip("this host knows no other words for a node, and its front end folds nothing")


def test_the_search_finds_the_nodes(host, browser):
    with front_end(host, browser) as page:
        page.evaluate("app.graph.clear()")
        page.add_style_tag(content=".p-dialog-mask { display: flex !important }")  # the search is a dialog
        page.mouse.dblclick(800, 900)
        search = page.locator("input[role=combobox]")
        for words, name in SEARCHES:
            search.fill(words)
            found = page.get_by_role("option").filter(has_text=name)
            found.first.wait_for(timeout=10_000)
        picture(page, "search")


def test_rarely_used_widgets_are_shown_on_request(host, browser):
    with front_end(host, browser, vue=True) as page:
        build(page, ["LoraXTransfer", [100, 60], {}, {}])
        node = page.locator("[data-node-id]")
        assert node.get_by_text("threshold", exact=True).is_visible()
        assert not node.get_by_text("matching", exact=True).is_visible()
        picture(page, "folded")
        node.get_by_text("Show advanced inputs").click()
        node.get_by_text("matching", exact=True).wait_for()
