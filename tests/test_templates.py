"""The templates of the pack: what a user needs to run them stands in them."""

import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

TEMPLATES = sorted((Path(__file__).parents[1] / "example_workflows").glob("*.json"))
# The nodes that read files, and the host's folders of these.
FILES = {"CheckpointLoaderSimple": {"checkpoints"}, "LoraXLoader": {"loras"}, "LoraXMove": {"checkpoints", "loras"}}
# Of other addresses the front end offers no download.
OFFERED = {"huggingface.co", "civitai.com"}


@pytest.fixture(params=TEMPLATES, ids=lambda path: path.stem)
def template(request):
    return request.param


@pytest.fixture
def nodes(template):
    return json.loads(template.read_text(encoding="utf-8"))["nodes"]


def test_every_file_comes_with_its_address(nodes):
    loaders = [node for node in nodes if node["type"] in FILES]
    assert loaders
    (note,) = [node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote"]
    for node in loaders:
        models = node["properties"]["models"]
        assert {model["directory"] for model in models} == FILES[node["type"]]
        named = [value.rpartition("/")[2] for value in node["widgets_values"] if isinstance(value, str)]
        assert [model["name"] for model in models] == named
        for model in models:
            url = urlsplit(model["url"])
            assert (url.scheme, url.netloc in OFFERED) == ("https", True)
            assert f"]({model['url']})" in note  # older front ends offer none


def test_loaders_say_what_they_load(nodes):
    titles = [node.get("title") for node in nodes if node["type"] in FILES]
    assert all(titles)
    assert len(set(titles)) == len(titles)


def test_the_thumbnail_fits_a_card(template):
    path = template.with_suffix(".jpg")
    with Image.open(path) as picture:
        assert picture.size == (600, 600)  # a card is a square of about 260 pixels, twice that on dense screens
    assert path.stat().st_size < 80_000


def test_every_thumbnail_has_its_template():
    assert {path.stem for path in TEMPLATES[0].parent.glob("*.jpg")} == {path.stem for path in TEMPLATES}
