"""What a report tells in words: by code, in English here and in the languages of `locales/`."""

import json
import re
from pathlib import Path

import jsonschema
import pytest

from lorax import Assignment, Outcome, Row, TransferReport
from lorax.transfer.notes import Code, Note
from lorax.transfer.report import MOST_STRENGTH, Grade
from tests.conftest import REPORT_SCHEMA

TRANSLATIONS = sorted((Path(__file__).parents[1] / "locales").glob("*/main.json"))
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def places(sentence):
    return set(re.findall(r"\{(\w+)\}", sentence))


def report(*rows, unused=()):
    found = TransferReport("style", "a", "b", "auto", 320, 0.0, Assignment("name", {}), list(rows), dict(unused))
    jsonschema.validate(json.loads(json.dumps(found.to_json(), allow_nan=False)), REPORT_SCHEMA)
    return found


def moved(before, after, name=LAYER, method="project", **more):
    return Row(name, name, Outcome.TRANSFERRED, method, 4, source_norm=before, target_norm=after, **more)


@pytest.mark.parametrize("path", TRANSLATIONS, ids=lambda path: path.parent.name)
def test_every_language_has_every_sentence(path):
    """A reason (`why`) is in English, so that a translation may leave it out."""
    notes = json.loads(path.read_text(encoding="utf-8"))["lorax"]["notes"]
    assert notes.keys() == {code.name.lower() for code in Code}
    for code in Code:
        assert places(notes[code.name.lower()]) | {"why"} == places(code.value) | {"why"}


@pytest.mark.parametrize(
    ("norm", "grade"),
    [
        (0, Grade.NOTHING),
        (0.2, Grade.WEAK),
        (0.5, Grade.FAIR),
        (0.79, Grade.FAIR),
        (0.8, Grade.STRONG),
        (1.2, Grade.STRONG),
    ],
)
def test_the_grade_is_by_the_norm_that_arrives(norm, grade):
    assert report(moved(1, norm)).grade is grade


def test_the_words_of_the_schema_are_those_of_the_code():
    words = REPORT_SCHEMA["$defs"]
    assert words["outcome"]["enum"] == list(map(str, Outcome))
    assert words["transfer"]["properties"]["grade"]["enum"] == list(map(str, Grade))


def test_what_the_target_does_already_is_no_loss():
    row = Row(LAYER, LAYER, Outcome.TRANSFERRED, "orthogonal", source_norm=1.0, target_norm=0.3)
    found = report(row)
    assert (found.retained_norm, found.suggested_strength, found.warnings) == (0.3, 1.0, [])
    assert (found.grade, found.left_out) == (Grade.STRONG, True)
    assert (report(moved(1, 1)).left_out, report(moved(1, 0.3)).left_out) == (False, False)


def test_of_layers_that_are_missing_and_of_unknown_norm_the_loss_is_unknown():
    lost = Row("unet.x", "", Outcome.NO_SOURCE_LAYER)
    assert report(moved(1, 1), lost).grade is Grade.UNKNOWN
    assert report(moved(1, 1), moved(0, 0, "unet.y")).grade is Grade.STRONG


def test_a_warning_is_a_code_its_values_and_a_sentence():
    rows = [moved(1, 0.25), Row("unet.x", "unet.x", Outcome.BELOW_THRESHOLD, source_norm=1e-3)]
    weak, missing, unused = report(*rows, unused={"key": "why not"}).warnings
    assert weak.to_json() == {
        "code": "weak",
        "values": {
            "percent": 25,
            "advice": {"code": "try_method", "values": {}, "text": "the method copy or a higher rank"},
        },
        "text": "weak effect: only 25% of the update's norm arrives; try the method copy or a higher rank",
    }
    assert missing.to_json()["values"] == {"missing": 1, "layers": 2, "outcomes": {"below threshold": 1}}
    assert str(missing) == "1 of 2 layers get no update: 1 below threshold"
    assert str(unused) == "1 tensors of the file are not used, the first key: why not"


def test_a_strength_is_advised_where_nothing_is_missing():
    (weak,) = report(moved(1, 0.3)).warnings
    assert weak.to_json()["values"]["strength"] == pytest.approx(1 / 0.3, abs=0.05)
    assert str(weak).endswith("or a strength of about 3.3")
    assert report(moved(1, 0.3)).to_json()["most_strength"] == MOST_STRENGTH == report(moved(1, 0.1)).suggested_strength


def test_layers_that_change_both_sizes_are_counted_by_their_code():
    (resized,) = report(moved(1, 1, notes=(Note(Code.BOTH_RESIZED),)), moved(1, 1, "unet.y")).warnings
    assert (resized.code, resized.values) == (Code.MANY_RESIZED, {"count": 1})


@pytest.mark.parametrize(
    ("name", "block", "role"),
    [
        (LAYER, "unet.mid_block.attentions.0.transformer_blocks.0", "attn1.to_q"),
        ("transformer.blocks.7.attn.qkv", "transformer.blocks.7", "attn.qkv"),
        ("unet.conv_in", "unet", "conv_in"),
    ],
)
def test_a_row_has_the_block_and_the_role_of_its_layer(name, block, role):
    (row,) = report(moved(1, 1, name)).to_json()["rows"]
    assert (row["block"], row["role"]) == (block, role)
    assert f"{block}.{role}" == row["source"]
