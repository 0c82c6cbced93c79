"""How the nodes look that a user adds by hand, in both canvases and themes: room for what they show, from the start."""

import json
import re

import pytest
from chromium import overlaps, picture
from front_end import NODE, at_scale, build, front_end, nothing_wrong, queue

VALUES = {"lora_name": "sd15-style.safetensors", "steps": 20, "training_dtype": "fp32", "folder": "output"}
VALUES |= {"base_name": "sd15-base.safetensors"}
# Every node of the pack beside what feeds it, as adding and connecting by hand makes them.
ADD = """kinds => {
    app.graph.clear();
    const add = (type, pos, values = {}) => {
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        node.pos = pos;
        for (const [name, value] of Object.entries(values)) {
            const widget = node.widgets.find((one) => one.name === name);
            if (widget) widget.value = value;
        }
        return node;
    };
    const feeds = [
        add("CheckpointLoaderSimple", [-500, 0], { ckpt_name: "sd15-base.safetensors" }),
        add("CheckpointLoaderSimple", [-500, 200], { ckpt_name: "sd15-tuned.safetensors" }),
        add("EmptyLatentImage", [-500, 400], { width: 64, height: 64 }),
        add("LoraXTestConditioning", [-500, 600], { seed: 1, width: 768 }),
    ];
    const [base, tuned, latent, caption] = feeds;
    const made = kinds.map(([type]) => add(type, [0, 0], VALUES));
    let [x, y, next] = [0, 60, 0];
    for (const node of [...made].sort((a, b) => b.size[1] - a.size[1])) {
        if (x + node.size[0] > WIDTH) [x, y] = [0, next];
        node.pos = [x, y];
        x += node.size[0] + 40;
        next = Math.max(next, y + node.size[1] + 100);
    }
    const adapter = made.find(({ type }) => type === "LoraXLoader");
    const similarity = made.find(({ type }) => type === "LoraXSimilarity");
    for (const [i, node] of made.entries()) {
        const from = { MODEL: base, LATENT: latent, CONDITIONING: caption, LORAX_ADAPTER: adapter };
        for (const [slot, { name, type }] of node.inputs.entries()) {
            const source = name === "target" ? tuned : name === "similarity" ? similarity : from[type.split(",")[0]];
            const out = source?.outputs.findIndex((one) => type.split(",").includes(one.type));
            if (source && kinds[i][1].includes(name)) source.connect(out, node, slot);
        }
    }
    const shown = made.flatMap((node) => node.outputs.map((output, slot) => [node, slot, output.type]));
    shown.filter(([, , type]) => ["MODEL", "LORAX_BASE"].includes(type)).forEach(([node, slot], i) => {
        node.connect(slot, add("PreviewAny", [-500, 900 + 200 * i]), 0);
    });
    window.added = made;
}""".replace("VALUES", json.dumps(VALUES)).replace("WIDTH", "1900")
ALONE = [
    ("CheckpointLoaderSimple", [0, 40], {"ckpt_name": "sd15-base.safetensors"}, {}),
    ("CheckpointLoaderSimple", [0, 220], {"ckpt_name": "sd15-tuned.safetensors"}, {}),
    ("LoraXLoader", [0, 400], {"lora_name": "sd15-style.safetensors"}, {}),
    ("LoraXTransfer", [420, 40], {"rank": 98}, {"source": (0, 0), "target": (1, 0), "adapter": (2, 0)}),
]
RESIZE = f"""width => {{
    const node = ({NODE})("LoraXTransfer");
    node.setSize([width, node.size[1]]);
    app.graph.setDirtyCanvas(true, true);
}}"""
WHOLE = "all => all.map((one) => one.scrollWidth <= one.clientWidth && one.scrollHeight <= one.clientHeight)"
SIZES = "() => window.added.map(({ type, size }) => [type, ...size])"


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_nodes_added_by_hand(host, browser, info, vue, theme):
    kinds = [
        (name, [*node["input"]["required"], "similarity"])
        for name, node in info.items()
        if node["category"] == "LoRA-X"
    ]
    with front_end(host, browser, vue, theme) as page:
        page.evaluate(ADD, kinds)
        at_scale(page, 0.8)
        picture(page, f"added-{'vue' if vue else 'classic'}-{theme}-before")
        before = page.evaluate(SIZES)
        queue(page)
        page.wait_for_timeout(1000)
        picture(page, f"added-{'vue' if vue else 'classic'}-{theme}")
        assert page.evaluate(SIZES) == before
        assert page.locator(".lorax-bars").count() == 3  # of Similarity, Transfer and Move LoRA
        assert page.eval_on_selector_all(".lorax-title", WHOLE) == [True] * 3
        assert overlaps(page) == []
        nothing_wrong(page, host)


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_a_narrow_list_has_fewer_columns_and_names_that_can_be_read(host, browser, vue):
    with front_end(host, browser, vue) as page:
        build(page, *ALONE)
        queue(page)
        for width, columns in ((460, ["left", "right", "corrected", "kept"]), (300, ["corrected", "kept"])):
            page.evaluate(RESIZE, width)
            page.wait_for_timeout(500)
            assert page.locator(".lorax-head [data-value]:visible").all_inner_texts() == columns
            names = page.eval_on_selector_all(".lorax-row .lorax-name", "names => names.map((one) => one.offsetWidth)")
            assert min(names) > 100
        assert overlaps(page) == []
        nothing_wrong(page, host)


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_the_side_panel_leaves_the_view_in_its_node(host, browser, vue):
    with front_end(host, browser, vue) as page:
        build(page, *ALONE)
        before = page.locator(".lorax-report").bounding_box()
        page.mouse.click(before["x"] + 200, 115)  # the title of the node
        panel = page.get_by_role("button", name="Toggle properties panel")
        if not panel.count():
            pytest.skip("this front end has no side panel")
        panel.click()
        page.get_by_role("tab", name="Parameters").wait_for()
        page.wait_for_timeout(1000)
        picture(page, f"panel-{'vue' if vue else 'classic'}")
        panel.first.click()
        page.evaluate("app.canvas.deselectAll()")
        page.wait_for_timeout(500)
        assert page.locator(".lorax-report").bounding_box() == before
        nothing_wrong(page, host)


def test_details_are_there_for_what_is_looked_at(host, browser):
    with front_end(host, browser) as page:
        build(page, *ALONE)
        queue(page)
        details, rows = page.locator(".lorax-report .lorax-details"), page.locator(".lorax-report .lorax-row")
        assert not details.is_visible()
        rows.nth(1).hover()
        assert "click to pin" in details.inner_text()
        page.locator(".lorax-report .lorax-figures").hover()
        assert details.is_visible()
        page.mouse.move(1600, 1200)
        assert not details.is_visible()
        rows.nth(1).click()
        page.mouse.move(1600, 1200)
        assert "pinned" in details.inner_text()
        nothing_wrong(page, host)


DRAWN = """type => {
    const node = app.graph.nodes.find((one) => one.type === type);
    const links = app.canvas.constructor.link_type_colors;
    return [node.outputs[0].renderingColor(app.canvas.colourGetter), links[node.outputs[0].type]];
}"""


DOTS = """() => app.graph.nodes.map(({ id }) => {
    const dot = document.querySelector(`[data-node-id="${id}"] [data-slot-key$="-out-0"]`);
    const parts = getComputedStyle(dot).backgroundColor.match(/\\d+/g);
    return `#${parts.map((part) => Number(part).toString(16).padStart(2, "0")).join("")}`;
})"""


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_our_sockets_and_links_have_colours_of_their_own_in_every_palette(host, browser, vue):
    kinds = ["LoraXLoader", "LoraXSimilarity", "LoraXBase"]
    with front_end(host, browser, vue) as page:
        build(page, *((kind, [0, 300 * i], {}, {}) for i, kind in enumerate(kinds)))
        for theme in ("light", "dark"):
            page.evaluate("theme => app.extensionManager.setting.set('Comfy.ColorPalette', theme)", theme)
            page.wait_for_timeout(500)
            drawn = [page.evaluate(DRAWN, kind) for kind in kinds]
            sockets = page.evaluate(DOTS) if vue else [socket for socket, _ in drawn]
            assert sockets == [link for _, link in drawn]
            assert len(set(sockets)) == 3
            assert all(re.fullmatch("#[0-9a-f]{6}", socket) for socket in sockets)
        nothing_wrong(page, host)
