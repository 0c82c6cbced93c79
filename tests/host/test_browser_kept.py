"""The last result of a node in the real front end: there after undo, reload, and in its own workflow only."""

import pytest
from front_end import (
    ALONE,
    ARRIVED,
    NODE,
    READY,
    at_scale,
    build,
    drop,
    front_end,
    kept,
    nothing_wrong,
    queue,
)

# A change that the front end takes for one of the user's: a node is moved by the canvas, a widget set.
CHANGE = """([x, rank]) => {
    const node = app.graph.nodes.find((one) => one.type === "LoraXTransfer");
    node.pos = [x, node.pos[1]];
    node.widgets.find((one) => one.name === "rank").value = rank;
    const { changeTracker } = app.extensionManager.workflow.activeWorkflow;
    (changeTracker.captureCanvasState ?? changeTracker.checkState).call(changeTracker);
}"""
SHOW = """async (key) => {
    const { workflow, command } = app.extensionManager;
    for (let i = 0; i < 5 && workflow.activeWorkflow.key !== key; i++) {
        await command.execute("Workspace.NextOpenedWorkflow");
        await new Promise((done) => setTimeout(done, 700));
    }
}"""
OLD = ".lorax-report .lorax-old"


def place(page):
    return page.evaluate(f"({NODE})('LoraXTransfer').pos[0]")


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_a_result_is_no_step_to_undo_and_is_there_after_undo_redo_and_reload(host, browser, vue):
    with front_end(host, browser, vue) as page:
        build(page, *ALONE)
        page.evaluate(CHANGE, [420, 99])
        page.evaluate(CHANGE, [500, 110 + vue])
        queue(page)
        page.evaluate(CHANGE, [600, 110 + vue])
        for key, x in (("z", 500), ("z", 420), ("y", 500), ("y", 600), ("z", 500)):
            page.keyboard.press(f"Control+{key}")
            page.wait_for_function(f"x => ({NODE})('LoraXTransfer').pos[0] === x", arg=x)
            page.wait_for_timeout(300)
            assert page.locator(ARRIVED).inner_text() == "70 / 70"
            assert page.locator(OLD).count() == (x == 420)  # before its rank was changed
        page.wait_for_timeout(1500)  # for the front end to keep a draft
        nothing_wrong(page, host)
        page.reload()
        page.wait_for_function(READY, timeout=120_000)
        page.wait_for_selector(ARRIVED)
        assert page.locator(ARRIVED).inner_text() == "70 / 70"


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_a_result_that_comes_while_another_workflow_is_shown_is_kept_where_it_belongs(host, browser, vue):
    """In both the nodes have the same ids."""
    with front_end(host, browser, vue) as page:
        build(page, *ALONE)
        saved = page.evaluate("app.graph.serialize()")
        drop(page, saved, "one.json")
        page.evaluate(CHANGE, [500, 210 + vue])
        drop(page, saved, "two.json")
        page.evaluate(SHOW, "one.json")
        assert place(page) == 500
        at_scale(page, 1)
        page.evaluate("window.ended = null")
        page.keyboard.press("Control+Enter")
        page.wait_for_timeout(50)
        page.evaluate(SHOW, "two.json")
        page.wait_for_function("() => window.ended", timeout=120_000)
        page.wait_for_timeout(300)
        assert place(page) == 420
        assert kept(page, "LoraXTransfer") is None
        assert page.locator(ARRIVED).count() == 0
        assert page.locator(".lorax-notice").count() == 0
        page.evaluate(SHOW, "one.json")
        assert page.locator(ARRIVED).inner_text() == "70 / 70"
        assert kept(page, "LoraXTransfer")["data"]["rank"] == 210 + vue
        nothing_wrong(page, host)
