"""The threshold of a similarity where it, and the transfer that uses it, are inside of subgraphs."""

import pytest
from chromium import picture
from front_end import at_scale, compared, front_end, graph, nothing_wrong

# Move the nodes of a type into a subgraph of their own, and let an input of the subgraph give one of their widgets.
INTO = """([type, name]) => {
    const [node] = app.graph.nodes.filter((one) => one.type === type);
    const { node: use, subgraph = use.subgraph } = app.graph.convertToSubgraph(new Set([node]));
    const inner = subgraph.nodes.find((one) => one.type === type);
    const slot = inner.inputs.findIndex(({ widget }) => widget?.name === name);
    if (slot >= 0) subgraph.addInput(name, "FLOAT").connect(inner.inputs[slot], inner);
}"""
OPEN = """type => {
    const use = app.graph.nodes.find(({ subgraph }) => subgraph?.nodes.some((one) => one.type === type));
    app.canvas.setGraph(use.subgraph);
}"""
QUEUED = """async () => {
    const { output } = await app.graphToPrompt();
    return Object.values(output).find((node) => node.class_type === "LoraXTransfer").inputs.threshold;
}"""
SET = """value => {
    const root = app.rootGraph ?? app.graph.rootGraph;
    const widgets = root.nodes.flatMap(({ subgraph, widgets }) => (subgraph && widgets) || []);
    const widget = widgets.find(({ name }) => name === "threshold");
    widget.value = value;
    widget.callback?.(value);
    app.extensionManager.workflow.activeWorkflow.changeTracker.checkState();
}"""


@pytest.mark.parametrize("promoted", ["", "threshold"], ids=["inside", "promoted"])
def test_the_slider_sets_a_threshold_in_another_subgraph(host, browser, promoted):
    with front_end(host, browser) as page:
        compared(page, graph(rank=35))
        for kind, name in (("LoraXSimilarity", ""), ("LoraXTransfer", promoted)):
            page.evaluate(INTO, [kind, name])
        page.evaluate(OPEN, "LoraXSimilarity")
        at_scale(page, 1)
        assert page.locator(".lorax-similarity .lorax-note").inner_text() == "Sets the threshold of LoRA-X Transfer."
        slider = page.locator(".lorax-similarity input[type=range]")
        slider.focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        assert page.evaluate(QUEUED) == pytest.approx(0.03) == float(slider.input_value())
        picture(page, f"subgraph-{promoted or 'inside'}")
        if promoted:
            page.evaluate(SET, 0.4)
            assert page.locator(".lorax-similarity output").inner_text() == "0.40"
            assert page.evaluate(QUEUED) == 0.4
        # Front end 1.27 says so of every subgraph that is opened.
        page.errors[:] = [error for error in page.errors if "graph that was never set up" not in error]
        nothing_wrong(page, host)
