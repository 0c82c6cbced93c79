"""The views in the real front end of a real ComfyUI server, in a real browser."""

import json
import re

import pytest
import torch
from chromium import overlaps, picture
from front_end import (
    NODE,
    READY,
    WATCH,
    at_scale,
    compared,
    drop,
    front_end,
    graph,
    kept,
    nothing_wrong,
    queue,
    threshold_widget,
)
from safetensors import safe_open
from safetensors.torch import save_file


def blocks_of(host, name):
    """The transformer blocks of a checkpoint, by the names of the host's own model."""
    with safe_open(host.base / f"models/checkpoints/{name}.safetensors", "pt") as file:
        found = (re.match(r"(.*transformer_blocks\.\d+)\.attn", key) for key in file.keys())  # noqa: SIM118
        return {match[1] for match in found if match}


def cells(page):
    return page.eval_on_selector(".lorax-similarity canvas", "canvas => [canvas.height, canvas.width]")


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_the_view_appears_and_comes_back_from_the_file(host, browser, vue):
    size = [len(blocks_of(host, name)) for name in ("sd15-base", "sd15-tuned")]
    with front_end(host, browser, vue) as page:
        drop(page, graph(rank=90 + vue))
        assert page.locator(".lorax-message").count() == 3
        queue(page)
        page.wait_for_selector(".lorax-similarity canvas")
        assert cells(page) == size
        page.select_option(".lorax-similarity select >> nth=0", "q")
        page.locator(".lorax-report .lorax-row >> nth=2").click()
        saved = page.evaluate("app.graph.serialize()")
        picture(page, f"graph-{'vue' if vue else 'classic'}")
        assert overlaps(page) == []
        nothing_wrong(page, host)
    assert len(json.dumps(saved)) < 60_000
    with front_end(host, browser, vue) as page:
        drop(page, saved, "saved.json")
        assert cells(page) == size
        assert page.locator(".lorax-similarity select >> nth=0").input_value() == "q"
        assert page.locator(".lorax-report .lorax-figure b >> nth=0").inner_text() == "70 / 70"
        assert "to_v" in page.locator(".lorax-report .lorax-details").inner_text()
        nothing_wrong(page, host)


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_the_dragged_threshold_is_what_the_next_queue_uses(host, browser, vue):
    with front_end(host, browser, vue) as page:
        compared(page, graph(rank=80 + vue))
        slider = page.locator(".lorax-similarity input[type=range]")
        box = slider.bounding_box()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + (box["width"] - 16) * 0.25 / 1.24 + 8, middle)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.8, middle, steps=5)
        page.mouse.up()
        dragged = float(slider.input_value())
        assert 0.6 < dragged < 0.9
        assert threshold_widget(page) == dragged
        # Self-attention of this pair lies around 0.96, cross-attention around 0.86: between them, with the keys.
        slider.focus()
        while float(slider.input_value()) != 0.91:
            page.keyboard.press("ArrowRight" if float(slider.input_value()) < 0.91 else "ArrowLeft")
        assert threshold_widget(page) == 0.91
        above, count = map(int, re.findall(r"\d+", page.locator(".lorax-similarity .lorax-count").inner_text()))
        assert 0 < above < count
        queue(page)
        assert "below threshold" in page.locator(".lorax-report .lorax-chips").inner_text()
        pairs, names = similarities(kept(page, "LoraXSimilarity")["data"])
        report = kept(page, "LoraXTransfer")["data"]
        assert report["threshold"] == 0.91
        words = report["words"]
        found = {f"{words[block]}.{words[role]}": words[row[0]] for _, block, role, _, *row in report["rows"]}
        moved = {name: outcome == "transferred" for name, outcome in found.items() if name in names}
        assert moved == {name: pairs[name] > 0.91 for name in moved}
        assert sum(moved.values()) == above
        nothing_wrong(page, host)


def similarities(data):
    """The corrected similarity of each target layer, and the names."""
    blocks, roles = data["targets"]["blocks"], data["targets"]["roles"]
    names = [f"{blocks[block]}.{roles[role]}" for block, role, _ in data["targets"]["layers"]]
    return {names[target]: value for target, _, _, _, value in data["pairs"]}, set(names)


def test_both_themes_and_three_zooms(host, browser):
    with front_end(host, browser) as page:
        compared(page, graph(layers="all", rank=70))
        page.locator(".lorax-similarity .lorax-row >> nth=3").click()
        for theme in ("dark", "light"):
            page.evaluate("theme => app.extensionManager.setting.set('Comfy.ColorPalette', theme)", theme)
            for scale in (0.5, 1, 2):
                at_scale(page, scale)
                picture(page, f"zoom-{theme}-{scale}")
                assert overlaps(page) == []
            colours = page.eval_on_selector(
                ".lorax-view", "view => [getComputedStyle(view).color, getComputedStyle(view).backgroundColor]"
            )
            light, dark = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in sorted(colours, key=len))
            assert abs(light - dark) > 100, colours
        nothing_wrong(page, host)


def test_the_keys_stay_in_the_view(host, browser):
    """Moving over the map by keyboard moves no node, and pins with Enter; the graph is not queued."""
    with front_end(host, browser) as page:
        compared(page, graph(rank=60))
        before = page.evaluate("JSON.stringify(app.graph.nodes.map(({ pos }) => [...pos]))")
        page.locator(".lorax-plot").focus()
        for key in ("ArrowDown", "ArrowDown", "ArrowRight", "Enter"):
            page.keyboard.press(key)
        assert page.locator(".lorax-similarity .lorax-pinned").get_attribute("d") == "M1,1h1v1h-1z"
        assert "pinned" in page.locator(".lorax-similarity .lorax-details").inner_text()
        assert page.evaluate("JSON.stringify(app.graph.nodes.map(({ pos }) => [...pos]))") == before
        assert len(kept(page, "LoraXSimilarity")["state"]["pinned"].split()) == 2
        nothing_wrong(page, host)


def test_a_new_threshold_in_the_transfer_is_seen_and_only_a_free_one_is_set(host, browser):
    with front_end(host, browser) as page:
        compared(page, graph(rank=50))
        page.evaluate(f"""() => {{
            const widget = ({NODE})("LoraXTransfer").widgets.find(({{ name }}) => name === "threshold");
            widget.value = 0.5;
            widget.callback(0.5);
        }}""")
        assert page.locator(".lorax-similarity output").inner_text() == "0.50"
        page.evaluate(f"""() => {{
            const transfer = ({NODE})("LoraXTransfer");
            const number = LiteGraph.createNode("PrimitiveFloat");
            app.graph.add(number);
            number.connect(0, transfer, transfer.inputs.findIndex(({{ name }}) => name === "threshold"));
        }}""")
        page.wait_for_timeout(100)
        assert "link gives" in page.locator(".lorax-similarity .lorax-note").inner_text()
        page.evaluate(f"({NODE})('LoraXTransfer').disconnectInput(3)")
        page.wait_for_timeout(100)
        slider = page.locator(".lorax-similarity input[type=range]")
        slider.focus()
        page.keyboard.press("ArrowRight")
        assert "Connect" in page.locator(".lorax-similarity .lorax-note").inner_text()
        assert threshold_widget(page) == 0.5
        nothing_wrong(page, host)


BROKEN = {
    "another version": ({"schema": "lorax-similarity-view", "schema_version": 9}, "version 9"),
    "an older version": ({"schema": "lorax-similarity-view", "schema_version": 1, "rank": None}, "older version"),
    "cut off": ({"schema": "lorax-similarity-view", "schema_version": 2}, "damaged"),
    "a word": ("<img src=x onerror='window.hacked = 1'>", "damaged"),
}


def test_what_a_workflow_file_keeps_may_be_broken(host, browser):
    with front_end(host, browser) as page:
        for data, words in BROKEN.values():
            workflow = graph()
            for entry in workflow["nodes"]:
                if entry["type"].startswith("LoraX"):
                    entry["properties"] = {"lorax": {"data": data}}
            drop(page, workflow)
            assert words in page.locator(".lorax-similarity .lorax-message").inner_text()
            assert page.locator(".lorax-report .lorax-message").inner_text()
            page.evaluate("app.graph.clear()")
        assert page.evaluate("window.hacked") is None
        nothing_wrong(page, host)


# As releases before version 2 wrote it.
OLD = {
    "LoraXSimilarity": {"schema": "lorax-similarity-view", "schema_version": 1, "source": "a", "target": "b"}
    | {"rank": None, "matching": "auto", "shapes": [[4, 4]], "sources": {"blocks": ["unet"], "roles": ["conv_in"]}}
    | {"targets": {}, "kinds": [], "pairs": []},
    "LoraXTransfer": {"schema": "lorax-transfer-packed", "schema_version": 1, "adapter": "x", "source": "a"}
    | {"target": "b", "method": "auto", "rank": 320, "threshold": 0.0, "layers": 1, "arrived": 1, "warnings": ["weak"]}
    | {"retained_energy": 0.3, "suggested_strength": 3.3, "summary": "1 of 1 layers arrived", "unused": {}}
    | {
        "words": ["transferred", "copy", ""],
        "rows": [["unet.conv_in", 0, 0, 1, 0, 1, 1, 1, 0.3, 2]],
        "unused_count": 0,
    },
}


@pytest.mark.parametrize(
    ("locale", "rank", "words"),
    [("en", 44, "An older version of lorax made this"), ("fr", 45, "une version plus ancienne de lorax")],
    ids=["en", "fr"],
)
def test_a_workflow_of_an_older_version_says_so_and_runs(host, browser, locale, rank, words):
    with front_end(host, browser, locale=locale) as page:
        workflow = graph(rank=rank, threshold=0.25)
        state = {"pinned": "unet.conv_in", "outcome": ""}
        for entry in workflow["nodes"]:
            if entry["type"] in OLD:
                entry["properties"] = {"lorax": {"data": OLD[entry["type"]], "state": state}}
        drop(page, workflow)
        for view in (".lorax-similarity", ".lorax-report"):
            assert words in page.locator(f"{view} .lorax-message").inner_text()
        for kind, data in OLD.items():
            assert kept(page, kind) == {"data": data, "state": state}
        assert threshold_widget(page) == 0.25
        queue(page)
        page.wait_for_selector(".lorax-similarity canvas")
        assert page.locator(".lorax-report .lorax-row").count() > 5
        nothing_wrong(page, host)


SIDE = {"blocks": ["unet"], "roles": ["conv_in"], "layers": [[0, 0, 0]]}
KIND = {"kind": "unet:conv_in", "sources": [0], "targets": [0], "corrected": "/w=="}
ROW = {
    "source": "unet.conv_in",
    "block": "unet",
    "role": "conv_in",
    "target": "unet.conv_in",
    "method": "copy",
    "rank": 0,
}
ROW |= {"outcome": "transferred", "corrected": 0.5, "retained_norm": 1.0, "notes": []}
SOUND = {
    "LoraXSimilarity": {"schema": "lorax-similarity-view", "schema_version": 2, "source": "a", "target": "b"}
    | {"rank": None, "scale": {"lowest": -0.27, "step": 0.005}, "shapes": [[4, 4]], "sources": SIDE, "targets": SIDE}
    | {"kinds": [KIND], "pairs": [[0, 0, 1, 1, 1]]},
    "LoraXTransfer": {"schema": "lorax-transfer", "schema_version": 2, "adapter": "x", "source": "a", "target": "b"}
    | {"method": "auto", "rank": 1, "threshold": 0.0, "rows": [ROW], "layers": 1, "warnings": [], "unused": {}}
    | {"summary": "", "retained_norm": 1.0, "suggested_strength": 1.0, "most_strength": 4.0, "grade": "strong"}
    | {"arrived": 1, "outcomes": {"transferred": 1}, "left_out": False},
    "LoraXTrain": {"steps": [1, 2], "losses": [1.0, 0.5], "total": 2},
}  # fmt: skip
POINTS = {"steps": [1] * 500_000, "losses": [1.0] * 500_000, "total": 1}
BLOCKS = [f"unet.{i}" for i in range(60_000)]
STATES = [5, "x", [], {"pinned": 5, "outcome": 5, "group": {}, "stage": 7}, {"threshold": None}, {"threshold": "x"}]
STATES += [{"pinned": None, "threshold": 1e308}, {"pinned": {"split": 1}, "outcome": "toString", "group": "__proto__"}]
HOSTILE = [{kind: {"data": data, "state": state} for kind, data in SOUND.items()} for state in STATES]
PROMPTS = [5, "x", [[]], {"1": None}, {"1": {"class_type": "CheckpointLoaderSimple", "inputs": 5}}, {"1:2:3": {}}]
HOSTILE += [{kind: {"data": data, "inputs": prompt} for kind, data in SOUND.items()} for prompt in PROMPTS]
HOSTILE += [{kind: value for kind in SOUND} for value in (5, "lorax", [], {"data": None}, {"state": 5})]
HOSTILE += [
    {
        "LoraXSimilarity": {"data": SOUND["LoraXSimilarity"] | {"targets": SIDE | {"blocks": BLOCKS}}},
        "LoraXTransfer": {"data": SOUND["LoraXTransfer"] | {"rows": [ROW | {"outcome": "toString"}]}},
        "LoraXTrain": {"data": POINTS},
    },
    {
        "LoraXSimilarity": {"data": SOUND["LoraXSimilarity"] | {"source": {"toString": 1}, "schema_version": {"a": 1}}},
        "LoraXTransfer": {"data": SOUND["LoraXTransfer"] | {"adapter": {"toString": 1}, "rank": {"toString": 1}}},
        "LoraXTrain": {"data": SOUND["LoraXTrain"] | {"total": {"valueOf": 1}}},
    },
]


def hostile(kept):
    """A workflow whose first nodes keep what they should not, and feed reroutes that go round; others come after."""
    workflow = graph(threshold=0.25)
    numbers = {entry["type"]: entry["id"] for entry in workflow["nodes"]}
    basics = {"flags": {}, "mode": 0, "order": 9, "properties": {}, "outputs": []}
    rounds = [[101, 102], [102, 103], [103, 102]]
    links = [[100 + i, numbers["LoraXSimilarity"] if i == 0 else a, 0, b, 0, "*"] for i, (a, b) in enumerate(rounds)]
    for number in (102, 103):
        into = next(link[0] for link in reversed(links) if link[3] == number)
        outs = [link[0] for link in links if link[1] == number]
        sockets = {"inputs": [{"name": "", "type": "*", "link": into}]}
        sockets |= {"outputs": [{"name": "", "type": "*", "links": outs}]}
        reroute = basics | {"id": number, "type": "Reroute", "pos": [0, 700 + number], "size": [75, 26]} | sockets
        workflow["nodes"].append(reroute)
    train = {"id": 110, "type": "LoraXTrain", "pos": [0, 1000], "size": [400, 600]}
    latent = {"id": 111, "type": "EmptyLatentImage", "pos": [500, 1000], "size": [300, 150]}
    workflow["nodes"] += [basics | train, basics | latent | {"widgets_values": [640, 704, 3]}]
    workflow["links"] += links
    for entry in workflow["nodes"]:
        if entry["type"] == "LoraXSimilarity":
            entry["outputs"][0]["links"].append(100)
        entry["properties"] = {"lorax": kept[entry["type"]]} if entry["type"] in kept else {}
    return workflow | {"last_node_id": 111, "last_link_id": 102}


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_a_hostile_workflow_harms_no_other_node(host, browser, vue):
    with front_end(host, browser, vue) as page:
        for kept in HOSTILE:
            drop(page, hostile(kept))
            values = page.evaluate(f"({NODE})('EmptyLatentImage').widgets.map(({{ value }}) => value)")
            assert values == [640, 704, 3]
            loaders = page.evaluate("app.graph.nodes.filter(({ type }) => type === 'CheckpointLoaderSimple')"
                                    ".map(({ widgets }) => widgets[0].value)")  # fmt: skip
            assert loaders == ["sd15-base.safetensors", "sd15-tuned.safetensors"]
            assert threshold_widget(page) == 0.25
            assert page.locator(".lorax-view").count() == 4
            assert all(text.strip() for text in page.locator(".lorax-view").all_inner_texts())
            page.evaluate("app.graph.clear()")
        nothing_wrong(page, host)


MARKUP = (
    "![x](http://127.0.0.1:9/a.png) <img src=http://127.0.0.1:9/b.png> [[y|http://127.0.0.1:9]] `z` **w** http://u.v"
)


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_names_from_a_file_are_shown_as_they_are_and_nothing_is_fetched(host, browser, vue):
    """The text on a running node, which one canvas takes for HTML and the other for Markdown; and an error."""
    lora = {f"lora_unet_x.lora_{side}.weight": torch.ones(2, 2) for side in ("up", "down")}
    save_file({MARKUP: torch.ones(1)} | lora, host.base / "models/loras/markup.safetensors")
    (host.base / "models/loras/wrong.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0" + MARKUP.encode())
    with front_end(host, browser, vue) as page:
        page.evaluate(LOAD, "markup.safetensors")
        at_scale(page, 1)
        queue(page)
        page.wait_for_function("words => document.body.innerText.includes(words)", arg=MARKUP)
        picture(page, f"markup-{'vue' if vue else 'classic'}")
        marked = "img[src*='127.0.0.1:9'], a[href*='127.0.0.1:9'], a[href*='u.v']"
        assert page.locator(marked).count() == 0
        page.evaluate(LOAD, "wrong.safetensors")
        page.evaluate("window.ended = null")
        page.keyboard.press("Control+Enter")
        page.wait_for_function("() => window.ended", timeout=120_000)
        page.wait_for_timeout(1000)
        assert page.evaluate("window.ended[0]") == "execution_error"
        assert page.locator(marked).count() == 0
        assert not [url for url in page.requests if "127.0.0.1:9/" in url or "u.v" in url]


LOAD = """name => {
    app.graph.clear();
    const [loader, text] = ["LoraXLoader", "PreviewAny"].map((type, place) => {
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        node.pos = [20 + 700 * place, 60];
        return node;
    });
    loader.setSize([650, 300]);
    loader.widgets.find((one) => one.name === "lora_name").value = name;
    loader.connect(1, text, 0);
}"""


TRAIN = """() => {
    app.graph.clear();
    const add = (type, pos, values) => {
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        node.pos = pos;
        for (const [name, value] of Object.entries(values)) node.widgets.find((one) => one.name === name).value = value;
        return node;
    };
    const sources = [
        add("CheckpointLoaderSimple", [0, 40], { ckpt_name: "sd15-base.safetensors" }),
        add("EmptyLatentImage", [0, 200], { width: 64, height: 64 }),
        add("LoraXTestConditioning", [0, 380], { seed: 1, width: 768 }),
    ];
    const train = add("LoraXTrain", [380, 40], { steps: 60, rank: 16, training_dtype: "fp32" });
    sources.forEach((source, place) => source.connect(0, train, place));
    train.setSize([400, 720]);
    window.heard = [];
    app.api.addEventListener("lorax.loss", ({ detail }) => window.heard.push(detail));
}"""


def test_the_loss_of_a_training(host, browser):
    """Drawn while it runs, and back from the file."""
    with front_end(host, browser) as page:
        page.evaluate(TRAIN)
        at_scale(page, 1)
        queue(page)
        heard = page.evaluate("window.heard")
        assert len(heard) > 1
        assert heard[0]["total"] == 60
        assert heard[0]["steps"] == heard[-1]["steps"][: len(heard[0]["steps"])]
        last = kept(page, "LoraXTrain")["data"]
        assert last["steps"][-1] == 60
        words = page.locator(".lorax-loss .lorax-count").inner_text()
        assert words == f"step 60 of 60: loss {page.evaluate('loss => loss.toPrecision(3)', last['losses'][-1])}"
        assert len(re.findall("[ML]", page.locator(".lorax-loss .lorax-raw").get_attribute("d"))) == len(last["steps"])
        picture(page, "loss")
        assert overlaps(page) == []
        saved = page.evaluate("app.graph.serialize()")
        nothing_wrong(page, host)
        page.evaluate("app.graph.clear()")
        drop(page, saved)
        assert page.locator(".lorax-loss .lorax-count").inner_text() == words


def test_in_french(host, browser):
    with front_end(host, browser, locale="fr") as page:
        compared(page, graph(rank=40))
        titles = page.evaluate("app.graph.nodes.map(({ title }) => title)")
        assert {"Similarité des sous-espaces", "Transfert LoRA-X", "Charger LoRA-X"} <= set(titles)
        assert "couches seraient transférées" in page.locator(".lorax-similarity .lorax-count").inner_text()
        assert page.get_by_role("button", name="Copier le texte").count() == 1
        warnings = page.locator(".lorax-warnings").inner_text()
        assert re.search(r"effet faible.*essayez la méthode copy.*une force d.environ \d", warnings)
        picture(page, "french")
        assert overlaps(page) == []
        nothing_wrong(page, host)


def test_without_the_javascript_the_nodes_work(host, browser):
    """As on a front end that cannot load it: the picture is there, and the text, in the node that shows the report."""
    with front_end(host, browser) as page:
        page.route("**/extensions/comfyui-lora-x/*.js", lambda route: route.abort())
        page.reload()
        page.wait_for_function(READY, timeout=120_000)
        page.wait_for_timeout(1500)
        page.evaluate(WATCH)
        drop(page, graph(rank=30))
        queue(page)
        assert page.locator(".lorax-view").count() == 0
        found = page.evaluate(f"({NODE})('PreviewImage').imgs?.[0]?.naturalWidth ?? 0")
        assert found > 400
        text = page.evaluate(f"({NODE})('PreviewAny').widgets.map(({{ value }}) => value)")
        assert any("70 of 70 layers arrived" in str(value) for value in text)
