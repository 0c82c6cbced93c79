"""The texts of the nodes, in every language of `locales/`, against what the real host says of the nodes."""

import json
import os
from pathlib import Path

import pytest

LOCALES = Path(__file__).resolve().parents[2] / "locales"


def english(info):
    """Return the texts of our nodes as the host knows them, in the form of `nodeDefs.json`."""
    found = {}
    for name, described in sorted(info.items()):
        if described["category"] != "LoRA-X":
            continue
        inputs = described["input"].get("required", {}) | described["input"].get("optional", {})
        outputs = zip(described["output_name"], described["output_tooltips"], strict=True)
        found[name] = {
            "display_name": described["display_name"],
            "description": described["description"],
            "inputs": {key: {"name": key, "tooltip": spec[1]["tooltip"]} for key, spec in inputs.items()},
            "outputs": {str(i): {"name": title, "tooltip": tooltip} for i, (title, tooltip) in enumerate(outputs)},
        }
    return found


def keys(texts):
    return {key: keys(value) if isinstance(value, dict) else bool(value.strip()) for key, value in texts.items()}


def test_english_is_what_the_nodes_say(info):
    """`LORAX_WRITE_LOCALES=1` writes it."""
    path = LOCALES / "en" / "nodeDefs.json"
    if os.environ.get("LORAX_WRITE_LOCALES"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(english(info), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == english(info)


@pytest.mark.parametrize("path", sorted(LOCALES.glob("*/nodeDefs.json")), ids=lambda path: path.parent.name)
def test_every_language_is_complete(host, info, path):
    assert keys(json.loads(path.read_text(encoding="utf-8"))) == keys(english(info))
    served = host.json("/i18n")[path.parent.name]["nodeDefs"]
    assert {name: served[name] for name in english(info)} == json.loads(path.read_text(encoding="utf-8"))
