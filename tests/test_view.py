"""The similarity as the browser reads it, against the scores themselves and against what a transfer then does."""

import base64
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest

from lorax import TransferOptions, compare_bases, load_adapter, transfer_adapter
from lorax.compare.matching import Assignment, match_bases
from lorax.compare.scores import ScoreTable
from lorax.compare.similarity import KindSimilarity, Similarity
from lorax.models.layers import Layer
from lorax.show.pictures import VIRIDIS
from lorax.show.view import MOST_CELLS, similarity_view
from lorax.transfer.report import ARRIVED
from tests.scored import layout

SCHEMA = json.loads((Path(__file__).parents[1] / "lorax/show/view.schema.json").read_text())


def names(table):
    return [f"{table['blocks'][block]}.{table['roles'][role]}" for block, role, _ in table["layers"]]


@pytest.mark.parametrize("attention_only", [True, False])
def test_every_pair_is_there_to_half_a_step(bases, attention_only):
    similarity = compare_bases(*bases, attention_only=attention_only)
    view = similarity_view(similarity, *bases, match_bases(*bases))
    jsonschema.validate(view, SCHEMA)
    lowest, step = view["scale"]["lowest"], view["scale"]["step"]
    assert [kind["kind"] for kind in view["kinds"]] == [kind.kind for kind in similarity.kinds]
    for kind, scores in zip(view["kinds"], similarity.kinds, strict=True):
        for side, layers in (("sources", scores.sources), ("targets", scores.targets)):
            assert [names(view[side])[place] for place in kind[side]] == [layer.name for layer in layers]
        codes = np.frombuffer(base64.b64decode(kind["corrected"]), np.uint8).reshape(len(scores.sources), -1)
        for i, line in enumerate(codes):
            for j, code in enumerate(line):
                sides = [scores.left[i, j].corrected, scores.right[i, j].corrected]
                lower = min((value for value in sides if not math.isnan(value)), default=math.nan)
                assert (code == 0) == math.isnan(lower)
                if code:
                    assert lowest + step * (int(code) - 1) == pytest.approx(max(lower, lowest), abs=step / 2 + 1e-9)


def test_the_layers_are_in_the_order_of_the_model_with_their_shapes(bases):
    view = similarity_view(compare_bases(*bases, attention_only=False), *bases, match_bases(*bases))
    order = [name for name in bases[0].layers if name in set(names(view["sources"]))]
    assert names(view["sources"]) == order
    for name, (*_, shape) in zip(order, view["sources"]["layers"], strict=True):
        assert tuple(view["shapes"][shape]) == bases[0].layers[name].shape


def test_what_the_view_counts_is_what_a_transfer_moves(bases, lora_file):
    """Above the threshold, as the view takes it, against the outcomes of a real transfer."""
    similarity = compare_bases(*bases, attention_only=False)
    view = similarity_view(similarity, *bases, match_bases(*bases, scores=similarity.scores))
    targets = names(view["targets"])
    values = sorted(pair[4] for pair in view["pairs"])
    threshold = (values[len(values) // 3] + values[len(values) // 3 + 1]) / 2
    above = {targets[target]: not value <= threshold for target, _, _, _, value in view["pairs"]}
    adapter = load_adapter(lora_file, bases[0])
    _, report = transfer_adapter(adapter, *bases, TransferOptions(threshold=threshold), similarity=similarity)
    moved = {row.target: row.outcome in ARRIVED for row in report.rows}
    assert 0 < sum(moved.values()) < len(moved)
    assert moved == {name: above[name] for name in moved}


def test_pairs_follow_the_assignment_and_what_is_not_fed_has_no_source(bases):
    similarity = compare_bases(*bases)
    first, second = (kind.block for kind in similarity.kinds[0].targets[:2])
    swapped = Assignment("file", {first: second, second: ""}, components={"unet": "unet"})
    view = similarity_view(similarity, *bases, swapped)
    sources, targets = names(view["sources"]), names(view["targets"])
    fed = {targets[target]: None if source is None else sources[source] for target, source, *_ in view["pairs"]}
    assert fed[f"{first}.attn1.to_q"] == f"{second}.attn1.to_q"
    assert fed[f"{second}.attn1.to_q"] is None
    assert [pair for pair in view["pairs"] if pair[1] is None and pair[2:] != [None] * 3] == []


def test_pictures_and_views_have_one_scale_of_colours():
    script = (Path(__file__).parents[1] / "web/colours.js").read_text(encoding="utf-8").partition("];")[0]
    assert [tuple(map(int, rgb)) for rgb in re.findall(r"\[(\d+), (\d+), (\d+)\]", script)] == [*map(tuple, VIRIDIS)]


def test_sdxl_fits_into_a_workflow_file():
    similarity, base = layout(70)
    view = similarity_view(similarity, base, base, Assignment("name", {}))
    jsonschema.validate(view, SCHEMA)
    assert len(view["pairs"]) == 560
    assert len(json.dumps(view, separators=(",", ":"))) < 100_000


def test_of_too_many_pairs_the_map_is_left_out():
    similarity, base = layout(250, kinds=8)
    view = similarity_view(similarity, base, base, Assignment("name", {}))
    jsonschema.validate(view, SCHEMA)
    assert MOST_CELLS < 8 * 250**2
    assert {kind["corrected"] for kind in view["kinds"]} == {None}
    assert len(view["pairs"]) == 2000


def test_a_base_of_one_layer_and_scores_of_nothing():
    layer = Layer("unet.conv_in", (4, 4))
    nothing = ScoreTable(np.full((1, 1), np.nan), np.full((1, 1), np.nan))
    kind = KindSimilarity("unet:conv_in", [layer], [layer], nothing, nothing)
    base = SimpleNamespace(layers={layer.name: layer})
    view = similarity_view(Similarity("a", "b", 3, ("", ""), [kind]), base, base, Assignment("name", {}))
    jsonschema.validate(view, SCHEMA)
    assert view["pairs"] == [[0, 0, None, None, None]]
    assert base64.b64decode(view["kinds"][0]["corrected"]) == b"\0"
