"""What nodes say in the real front end: seen, and there as long as it is true."""

import json
import re
import shutil

import pytest
from chromium import overlaps, picture
from front_end import ALONE, ARRIVED, BASE, NODE, build, drop, front_end, kept, nothing_wrong, queue

# Load, convert and save an adapter, and apply it to its own model.
SAYING = [
    ("CheckpointLoaderSimple", [0, 40], BASE, {}),
    ("LoraXLoader", [0, 240], {"lora_name": "said.safetensors"}, {}),
    ("LoraXConvert", [420, 40], {"rank": 8}, {"adapter": (1, 0), "source": (0, 0)}),
    ("LoraXSave", [420, 340], {"form": "LoRA-X", "folder": "output"}, {"adapter": (2, 0)}),
    ("LoraXApply", [840, 40], {}, {"adapter": (2, 0), "model": (0, 0)}),
    ("PreviewAny", [840, 340], {}, {"source": (4, 0)}),
]
SAID = {
    "LoraXLoader": "said.safetensors: lora, kohya names",
    "LoraXConvert": "layers converted",
    "LoraXSave": "lorax/adapter_0000",
    "LoraXApply": "70 of 70 layers applied",
}


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_what_nodes_say_stays_and_comes_back_from_the_file(host, browser, vue):
    loras = host.base / "models/loras"
    shutil.copy(loras / "sd15-style.safetensors", loras / "said.safetensors")  # older hosts say nothing of a file again
    with front_end(host, browser, vue) as page:
        build(page, *SAYING)
        assert page.locator(".lorax-text .lorax-message").count() == 4
        queue(page)
        page.wait_for_timeout(2000)  # newer front ends take the host's own text away when all is done
        said = page.locator(".lorax-said").all_inner_texts()
        for kind, words in SAID.items():
            assert words in kept(page, kind)["data"]
            assert sum(words in text for text in said) == 1
        assert len(said) == 4
        saved = page.evaluate("app.graph.serialize()")
        picture(page, f"texts-{'vue' if vue else 'classic'}")
        assert overlaps(page) == []
        nothing_wrong(page, host)
    assert len(json.dumps(saved)) < 20_000
    with front_end(host, browser, vue) as page:
        drop(page, saved, "saved.json")
        assert page.locator(".lorax-said").all_inner_texts() == said
        nothing_wrong(page, host)


def test_a_transfer_runs_alone_and_says_it_again_when_its_workflow_is_opened_again(real_host, host, browser):
    again = "HAS_INTERMEDIATE_OUTPUT" in (real_host[0] / "execution.py").read_text()
    with front_end(host, browser) as page:
        build(page, *ALONE)
        saved = page.evaluate("app.graph.serialize()")
        queue(page)
        assert page.locator(ARRIVED).inner_text() == "70 / 70"
        drop(page, saved)
        assert page.locator(".lorax-message").count() == 2
        queue(page)
        assert page.locator(ARRIVED).inner_text() == "70 / 70"
        assert page.locator(".lorax-said").count() == again  # the loader did not run, and is no output node
        nothing_wrong(page, host)


NOTICES = """() => {
    window.notices = new Set();
    const look = () => document.querySelectorAll(".lorax-notice").forEach((one) => window.notices.add(one.textContent));
    new MutationObserver(look).observe(document.body, { childList: true, subtree: true, characterData: true });
}"""
SET = """([type, name, value]) => {
    const widget = app.graph.nodes.find((node) => node.type === type).widgets.find((one) => one.name === name);
    widget.value = value;
    widget.callback(value);
}"""
SHOWN = ".lorax-notice:visible"


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_a_view_says_that_its_node_works_and_what_went_wrong(host, browser, vue):
    (host.base / "models/loras/wrong.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0<b>no JSON</b>")
    with front_end(host, browser, vue) as page:
        compare = (
            "LoraXSimilarity",
            [840, 40],
            {"rank": 20 + vue, "layers": "all"},
            {"source": (0, 0), "target": (1, 0)},
        )
        build(page, *ALONE, compare)
        page.evaluate(NOTICES)
        page.evaluate(SET, ["LoraXLoader", "lora_name", "wrong.safetensors"])
        queue(page, "execution_error")
        error = page.locator(".lorax-text .lorax-error[role=alert]").inner_text()
        assert re.fullmatch("truncated, or not a safetensors file: .*wrong.safetensors: .*; download .*", error)
        picture(page, f"error-{'vue' if vue else 'classic'}")
        assert overlaps(page) == []
        page.evaluate(SET, ["LoraXLoader", "lora_name", "sd15-style.safetensors"])
        queue(page)
        assert page.locator(SHOWN).count() == 0
        assert page.evaluate("[...window.notices].some((text) => /^Comparing: [1-9]\\d? %$/.test(text))")
        assert page.evaluate("[...window.notices].some((text) => /^Working: \\d+ %$/.test(text))")


def test_a_view_says_that_its_settings_are_others_now(host, browser):
    with front_end(host, browser) as page:
        build(page, *ALONE)
        queue(page)
        for value, marked in ((0.3, 1), (0.0, 0)):
            page.evaluate(SET, ["LoraXTransfer", "threshold", value])
            assert page.locator(SHOWN).count() == marked
        for value, marked in (("sd15-style-text.safetensors", 1), ("sd15-style.safetensors", 0)):
            page.evaluate(SET, ["LoraXLoader", "lora_name", value])
            page.mouse.click(1650, 1250)  # after a click the front end looks for changes
            page.wait_for_timeout(100)
            assert page.locator(f".lorax-report {SHOWN}").count() == marked
        page.evaluate(SET, ["LoraXTransfer", "threshold", 0.3])
        assert page.locator(f".lorax-report {SHOWN}").inner_text().startswith("Made with other settings")
        saved = page.evaluate("app.graph.serialize()")
        drop(page, saved)
        assert page.locator(f".lorax-report {SHOWN}").count() == 1
        queue(page)
        assert page.locator(SHOWN).count() == 0
        nothing_wrong(page, host)


def test_the_suggested_strength_is_set_where_the_adapter_is_applied(host, browser):
    """Through a reroute; not where a link gives the strength; not offered where nothing applies it."""
    apply = ("LoraXApply", [1300, 40], {}, {"adapter": (4, 0), "model": (1, 0)})
    with front_end(host, browser) as page:
        build(page, *ALONE, ("Reroute", [900, 40], {}, {"": (3, 0)}), apply)
        page.evaluate(SET, ["LoraXTransfer", "method", "project"])
        page.evaluate(SET, ["LoraXTransfer", "rank", 60])
        queue(page)
        button = page.get_by_role("button", name=re.compile("Use strength"))
        suggested = round(kept(page, "LoraXTransfer")["data"]["suggested_strength"], 2)
        assert suggested > 1
        assert button.inner_text() == f"Use strength {suggested:.2f}"
        button.click()
        strength = f"({NODE})('LoraXApply').widgets.find(({{ name }}) => name === 'strength').value"
        assert page.evaluate(strength) == suggested
        used = page.get_by_role("button", name=f"Strength {suggested:.2f} is set")
        assert used.is_disabled()
        picture(page, "strength")
        assert overlaps(page) == []
        page.evaluate(SET, ["LoraXApply", "strength", 0.5])
        assert button.is_enabled()
        page.evaluate(f"""() => {{
            const [from, to] = ["LoraXTransfer", "LoraXApply"].map({NODE});
            from.connect(2, to, to.inputs.findIndex(({{ name }}) => name === "strength"));
        }}""")
        page.wait_for_timeout(100)
        assert button.count() == 0
        assert page.evaluate(strength) == 0.5
        page.evaluate(f"app.graph.remove(({NODE})('LoraXApply'))")
        page.wait_for_timeout(100)
        assert button.count() == 0
        nothing_wrong(page, host)
