"""The real front end of a real ComfyUI server in a browser: opened, given a workflow, queued, asked."""

import json
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from chromium import watched

READY = "() => Boolean(window.app?.graph && window.LiteGraph?.registered_node_types.LoraXTransfer)"
DROP = """([text, name]) => {
    const files = new DataTransfer();
    files.items.add(new File([text], name, { type: "application/json" }));
    const where = { dataTransfer: files, bubbles: true, cancelable: true, clientX: 500, clientY: 500 };
    document.querySelector("#graph-canvas").dispatchEvent(new DragEvent("drop", where));
}"""
WATCH = """() => {
    window.ended = null;
    for (const type of ["execution_success", "execution_error", "execution_interrupted"]) {
        app.api.addEventListener(type, ({ detail }) => (window.ended = [type, detail.exception_message ?? ""]));
    }
}"""
BUILD = """nodes => {
    app.graph.clear();
    const made = [];
    for (const [type, pos, values, links] of nodes) {
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        Object.assign(node, { pos });
        for (const [name, value] of Object.entries(values)) node.widgets.find((one) => one.name === name).value = value;
        for (const [name, [from, slot]] of Object.entries(links)) {
            made[from].connect(slot, node, node.inputs.findIndex((one) => one.name === name));
        }
        made.push(node);
    }
}"""
BASE, TUNED = ({"ckpt_name": f"sd15-{name}.safetensors"} for name in ("base", "tuned"))
# A transfer, its loaders, and nothing behind it.
ALONE = [
    ("CheckpointLoaderSimple", [0, 40], BASE, {}),
    ("CheckpointLoaderSimple", [0, 220], TUNED, {}),
    ("LoraXLoader", [0, 400], {"lora_name": "sd15-style.safetensors"}, {}),
    ("LoraXTransfer", [420, 40], {"rank": 99}, {"source": (0, 0), "target": (1, 0), "adapter": (2, 0)}),
]
# What its view says of the layers.
ARRIVED = ".lorax-report .lorax-figure b >> nth=0"
NODE = "type => app.graph.nodes.find((node) => node.type === type)"


@contextmanager
def front_end(host, browser, vue=False, theme="dark", locale="en", **options):
    """Open the front end with some settings; of what goes wrong while it starts only what is ours counts.

    Skip where its Vue nodes are wanted, and show no widget of a pack's own.
    """
    known = {"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": theme, "Comfy.Locale": locale}
    known["Comfy.TutorialCompleted"] = True  # else newer ones open a dialog, which keeps the keys
    for name, value in known.items():
        host.post(f"/settings/{name}", value)
    page = watched(browser, viewport={"width": 1700, "height": 1300}, **options)
    page.goto(host.url)
    page.wait_for_function(READY, timeout=120_000)
    version = page.evaluate("window.__COMFYUI_FRONTEND_VERSION__")
    if vue and tuple(map(int, version.split(".")[:2])) < (1, 35):
        page.context.close()
        pytest.skip(f"the Vue nodes of front end {version} show no DOM widgets")
    page.wait_for_timeout(1500)
    page.add_style_tag(content=".p-dialog-mask, .minimap-main-container { display: none !important }")
    page.evaluate(WATCH)
    ours = [error for error in page.errors if "/extensions/" in error]
    assert ours == [], ours
    page.errors.clear()
    yield page
    page.context.close()


def graph(layers="attention", method="project", rank=100, threshold=0.0) -> dict[str, Any]:
    """Two checkpoints into Subspace Similarity and LoRA-X Transfer, as the front end saves a workflow."""
    nodes, links = [], []

    def node(kind, place, size, values, inputs, outputs):
        number = len(nodes) + 1
        sockets = []
        for name, kind_of, source in inputs:
            links.append([len(links) + 1, source[0], source[1], number, len(sockets), kind_of])
            sockets.append({"name": name, "type": kind_of, "link": len(links)})
        outs = [{"name": name, "type": name.upper(), "links": []} for name in outputs]
        basics = {"flags": {}, "order": number, "mode": 0, "properties": {}}
        nodes.append(
            basics
            | {"id": number, "type": kind, "pos": place, "size": size}
            | {"widgets_values": values, "inputs": sockets, "outputs": outs}
        )
        return number

    base = node("CheckpointLoaderSimple", [0, 40], [300, 100], ["sd15-base.safetensors"], [], ["MODEL", "CLIP", "VAE"])
    tuned = node(
        "CheckpointLoaderSimple", [0, 220], [300, 100], ["sd15-tuned.safetensors"], [], ["MODEL", "CLIP", "VAE"]
    )
    lora = node("LoraXLoader", [0, 400], [300, 130], ["sd15-style.safetensors"], [], ["adapter", "summary"])
    models = [("source", "MODEL", (base, 0)), ("target", "MODEL", (tuned, 0))]
    found = node("LoraXSimilarity", [350, 40], [420, 860], [0, layers], models, ["similarity", "heatmap", "report"])
    values = [method, rank, threshold, "auto", "direction"]
    inputs = [("adapter", "LORAX_ADAPTER", (lora, 0)), *models, ("similarity", "LORAX_SIMILARITY", (found, 0))]
    moved = node("LoraXTransfer", [820, 40], [420, 860], values, inputs, ["adapter", "report", "suggested_strength"])
    node("PreviewAny", [1290, 40], [280, 200], [None, None, False], [("source", "*", (moved, 1))], [])
    node("PreviewImage", [1290, 300], [280, 300], [], [("images", "IMAGE", (found, 1))], [])
    for number, source, slot, *_ in links:
        nodes[source - 1]["outputs"][slot]["links"].append(number)
    basics = {"groups": [], "config": {}, "extra": {}, "version": 0.4}
    return {"last_node_id": len(nodes), "last_link_id": len(links), "nodes": nodes, "links": links} | basics


def drop(page, workflow, name="views.json"):
    page.evaluate(DROP, [json.dumps(workflow), name])
    page.wait_for_function("count => app.graph.nodes.length === count", arg=len(workflow["nodes"]))
    page.wait_for_timeout(500)
    at_scale(page, 1)


def build(page, *nodes):
    """Put nodes into an empty graph: the type of each, its place, its widgets, and (number, slot) for its inputs."""
    page.evaluate(BUILD, nodes)
    at_scale(page, 1)


def at_scale(page, scale):
    page.evaluate(
        """scale => {
            app.canvas.deselectAll(); // the front end cuts widgets where a selected node lies over them
            Object.assign(app.canvas.ds, { scale, offset: [90 / scale, 90 / scale] });
            app.graph.setDirtyCanvas(true, true);
        }""",
        scale,
    )
    page.wait_for_timeout(500)


def queue(page, end="execution_success"):
    page.evaluate("window.ended = null")
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => window.ended", timeout=120_000)
    assert page.evaluate("window.ended")[0] == end, page.evaluate("window.ended")
    page.wait_for_timeout(300)


def compared(page, workflow):
    """Drop a workflow, queue it, and wait for the map."""
    drop(page, workflow)
    queue(page)
    page.wait_for_selector(".lorax-similarity canvas")


def kept(page, kind):
    """What the workflow file keeps of a node's view."""
    return page.evaluate(f"type => ({NODE})(type).properties.lorax", kind)


def threshold_widget(page):
    return page.evaluate(f"({NODE})('LoraXTransfer').widgets.find(({{ name }}) => name === 'threshold').value")


def nothing_wrong(page, host):
    assert page.errors == [], page.errors
    assert {urlsplit(url).netloc for url in page.requests if not url.startswith(("blob:", "data:"))} == {
        urlsplit(host.url).netloc
    }
