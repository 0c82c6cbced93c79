"""The templates of the pack in the front end: what they lack is offered."""

import json
from pathlib import Path

from chromium import picture
from front_end import front_end

TEMPLATES = sorted((Path(__file__).resolve().parents[2] / "example_workflows").glob("*.json"))
DIALOGS = ".p-dialog-mask { display: flex !important }"


def test_what_a_template_lacks_is_offered(host, browser):
    with front_end(host, browser) as page:
        page.add_style_tag(content=DIALOGS)
        workflow = json.loads((TEMPLATES[0].parent / "One LoRA on another model.json").read_text(encoding="utf-8"))
        page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        details = page.get_by_role("button", name="View details")
        page.wait_for_timeout(2000)
        if details.count():
            details.click()
        for node in workflow["nodes"]:
            for model in node["properties"].get("models", []):
                page.get_by_text(model["name"]).first.wait_for()
        picture(page, "missing-models")
