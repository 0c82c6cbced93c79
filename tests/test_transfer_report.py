"""What the report of a transfer says: norms, scores, advice, progress."""

import json
import math
from dataclasses import replace

import jsonschema
import pytest
import torch
from safetensors.torch import save_file

import lorax
from lorax import Assignment, MismatchError, Outcome, TransferOptions, load_adapter, transfer_adapter
from lorax.compare.scores import Score, ScoreTable
from lorax.compare.similarity import compare_bases
from lorax.transfer.report import similarity_json
from tests.conftest import REPORT_SCHEMA
from tests.tensors import lora_tensors


def test_report_rows_tell_the_truth(bases, lora):
    result, report = transfer_adapter(lora, *bases, TransferOptions(method="project", rank=24, exact=True))
    assert [row.source for row in report.rows] == [name for name in bases[0].layers if name in lora.layers]
    for row in report.rows:
        before, after = lora.layers[row.source].delta_weight(), result.layers[row.target].delta_weight()
        assert row.source_norm == pytest.approx(float(before.norm()), rel=1e-4)
        assert row.target_norm == pytest.approx(float(after.norm()), rel=1e-3)
        m, n = lora.layers[row.source].layer.matrix_shape
        assert row.rank == min(24, m, n)
        assert ("no projection" in row.note) == (min(m, n) <= 24)
        left, right = lorax.pair_scores(bases[0].weight(row.source), bases[1].weight(row.target))
        assert (row.left, row.right) == (left, right)


@pytest.mark.parametrize("assignment", [None, Assignment("file", {})], ids=["matched", "given"])
def test_a_known_similarity_is_used_instead_of_comparing_again(bases, lora, assignment):
    """By scores that no comparison gives: what the report has of them was not compared again."""
    compared = compare_bases(*bases, attention_only=True)
    made_up = [
        replace(kind, left=ScoreTable(0 * kind.left.phi + 0.75, 0 * kind.left.chance + 0.5)) for kind in compared.kinds
    ]
    _, report = transfer_adapter(lora, *bases, similarity=replace(compared, kinds=made_up), assignment=assignment)
    known = {layer.name for kind in compared.kinds for layer in kind.sources}
    assert known & {row.source for row in report.rows} != {row.source for row in report.rows}
    for row in report.rows:
        assert (row.left == Score(0.75, 0.5)) == (row.source in known and not math.isnan(row.left.phi))
    renamed = replace(bases[0], name=bases[1].name)
    with pytest.raises(MismatchError, match="other bases"):
        transfer_adapter(lora, bases[0], renamed, similarity=compared)


def test_a_weak_effect_is_said_with_advice(bases, lora):
    _, report = transfer_adapter(lora, *bases, TransferOptions(method="project", rank=2))
    assert report.retained_norm < 0.5
    assert any("weak effect" in text and "copy" in text and "strength" in text for text in map(str, report.warnings))


def test_the_advice_looks_at_what_was_lost(bases, lora):
    """Most is lost below the threshold, not by the method."""
    source, target = bases
    unrelated = replace(
        target, read=lambda layer: target.read(layer) if "ff.net" in layer.name else torch.randn(layer.shape)
    )
    _, report = transfer_adapter(lora, source, unrelated, TransferOptions(threshold=0.5))
    assert 0 < report.retained_norm < 0.5
    assert report.outcomes[Outcome.BELOW_THRESHOLD] > 20
    assert any("weak effect" in text and "a lower threshold" in text for text in map(str, report.warnings))


def test_an_update_of_zero(bases, tmp_path):
    tensors = lora_tensors(bases[0])
    tensors = {key: torch.zeros_like(t) if "lora_up" in key else t for key, t in tensors.items()}
    save_file(tensors, tmp_path / "zero.safetensors")
    adapter = load_adapter(tmp_path / "zero.safetensors", bases[0])
    result, report = transfer_adapter(adapter, *bases, TransferOptions(method="project", rank=8))
    assert math.isnan(report.retained_norm)
    assert all(not own.delta_weight().any() for own in result.layers.values())
    jsonschema.validate(report.to_json(), REPORT_SCHEMA)


def test_reports_are_valid_json_by_the_schema(bases, lora):
    jsonschema.Draft202012Validator.check_schema(REPORT_SCHEMA)
    _, report = transfer_adapter(lora, *bases, TransferOptions(method="project", rank=8))
    for data in (report.to_json(), similarity_json(compare_bases(*bases, attention_only=False))):
        text = json.dumps(data, allow_nan=False)
        jsonschema.validate(json.loads(text), REPORT_SCHEMA)
    broken = report.to_json()
    broken["rows"][0]["outcome"] = "vanished"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, REPORT_SCHEMA)


def test_progress_reaches_the_end(bases, lora):
    seen = []
    transfer_adapter(lora, *bases, progress=lambda done, total, what: seen.append((done, total)))
    assert seen[-1] == (len(lora.layers), len(lora.layers))


def test_no_strength_makes_up_for_what_is_left_out_on_purpose(bases, lora):
    source, target = bases

    def read(layer):
        """All the way that the adapter goes, so that all of it is there already."""
        own = lora.layers.get(layer.name)
        return source.read(layer) + (own.delta_weight().reshape(layer.shape) if own else 0)

    drifted = replace(target, read=read)
    _, report = transfer_adapter(lora, source, drifted, TransferOptions(method="orthogonal", threshold=-1e9))
    assert report.retained_norm < 0.01
    assert report.suggested_strength == 1
    assert "left out" in report.summary
    assert not any("weak effect" in text for text in map(str, report.warnings))
    _, report = transfer_adapter(lora, source, target, TransferOptions(method="project", rank=8))
    assert report.suggested_strength == pytest.approx(min(4, 1 / report.retained_norm))
