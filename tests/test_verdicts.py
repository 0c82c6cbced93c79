"""What a report says of a transfer: how many of the file's layers arrived, and what to do."""

import json
import math
from dataclasses import replace

import jsonschema
import pytest
import torch
from safetensors.torch import save_file

from lorax import LayerTable, MismatchError, Outcome, TransferOptions, load_adapter, transfer_adapter
from lorax.adapters.convert import convert_to_lora_x
from lorax.compare.matching import match_bases
from tests.conftest import REPORT_SCHEMA
from tests.tensors import lora_tensors

MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def adapter_of(tensors, base, folder):
    save_file(tensors, folder / "a.safetensors")
    return load_adapter(folder / "a.safetensors", base)


def without_partner(tensors):
    del tensors[f"{MODULE}.lora_down.weight"]


def with_nan(tensors):
    tensors[f"{MODULE}.lora_up.weight"][0, 0] = math.nan


def of_another_kind(tensors):
    for part in ("lora_up.weight", "lora_down.weight", "alpha"):
        del tensors[f"{MODULE}.{part}"]
    tensors[f"{MODULE}.ia3_l"] = torch.ones(1)
    tensors[f"{MODULE}.oft_R.weight"] = torch.ones(1)


def of_a_bias(tensors):
    tensors[f"{MODULE}.diff_b"] = torch.full((64,), math.nan)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [without_partner, with_nan, of_another_kind, of_a_bias])
def test_an_update_that_cannot_be_read_is_a_layer_that_does_not_arrive(broken, bases, tmp_path):
    tensors = lora_tensors(bases[0])
    whole = len(adapter_of(tensors, bases[0], tmp_path).layers)
    broken(tensors)
    adapter = adapter_of(tensors, bases[0], tmp_path)
    _, report = transfer_adapter(adapter, *bases, TransferOptions(method="copy"))
    layers = whole + (broken is of_a_bias)
    assert (report.arrived, report.layers) == (layers - 1, layers)
    (row,) = report.missing
    assert (row.outcome, row.target_norm) == (Outcome.UNREAD, 0)
    assert row.note in adapter.unused.values()
    assert row.source == (f"{LAYER}.bias" if broken is of_a_bias else LAYER)
    assert report.summary.startswith(f"{layers - 1} of {layers} layers arrived")
    assert "all of it" not in report.summary
    assert f"1 of {layers} layers get no update: 1 not readable" in map(str, report.warnings)
    with pytest.raises(MismatchError, match=r"strict.*not readable"):
        transfer_adapter(adapter, *bases, TransferOptions(method="copy", strict=True))
    jsonschema.validate(json.loads(json.dumps(report.to_json(), allow_nan=False)), REPORT_SCHEMA)


def test_what_is_no_update_of_a_layer_is_told_and_counts_as_none(bases, tmp_path):
    tensors = lora_tensors(bases[0]) | {
        "bundle_emb.style.string_to_param.*": torch.ones(1, 768),
        "logit_scale": torch.ones(1),
    }
    adapter = adapter_of(tensors, bases[0], tmp_path)
    _, report = transfer_adapter(adapter, *bases, TransferOptions(method="copy", strict=True))
    assert report.arrived == report.layers == len(adapter.layers)
    assert report.unused.keys() == adapter.unused.keys() == {"bundle_emb.style.string_to_param.*", "logit_scale"}
    assert any("2 tensors of the file are not used" in text for text in map(str, report.warnings))


@pytest.mark.parametrize("count", [1, 30])
def test_layers_of_unknown_norm_are_not_nothing(count, bases, tmp_path):
    """A DoRA that the source lacks: its norm depends on the weight that is not there."""
    tensors = lora_tensors(bases[0])
    for i in range(count):
        module = f"lora_unet_elsewhere_{i}"
        tensors |= {f"{module}.lora_up.weight": torch.ones(8, 1), f"{module}.lora_down.weight": torch.ones(1, 8)}
        tensors |= {f"{module}.dora_scale": torch.ones(8, 1)}
    adapter = adapter_of(tensors, bases[0], tmp_path)
    _, report = transfer_adapter(adapter, *bases, TransferOptions(method="copy"))
    known = report.layers - count
    assert report.arrived == known
    assert report.retained_norm == pytest.approx(1)
    assert report.summary.startswith(f"{known} of {known + count} layers arrived, 100% of the update's norm kept")
    assert f"({count} of unknown norm not counted)" in report.summary
    rows = report.to_json()["rows"]
    assert sum(row["source_norm"] is None and row["retained_norm"] is None for row in rows) == count
    layers = {name: own for name, own in adapter.layers.items() if "elsewhere" in name}
    layers[LAYER] = replace(adapter.layers[LAYER], alpha=0.0)
    _, report = transfer_adapter(replace(adapter, layers=layers), *bases)
    assert report.summary == f"1 of {count + 1} layers arrived; the norm of {count} is not known"


def test_no_strength_is_suggested_where_layers_are_missing(bases, tmp_path):
    adapter = adapter_of(lora_tensors(bases[0]), bases[0], tmp_path)
    target = bases[1]
    fewer = LayerTable(layer for layer in target.layers.values() if "mid_block" not in layer.name)
    _, report = transfer_adapter(
        adapter, bases[0], replace(target, layers=fewer), TransferOptions(method="project", rank=2)
    )
    assert 0 < report.retained_norm < 0.5
    assert report.suggested_strength is report.to_json()["suggested_strength"] is None
    assert report.summary.endswith("no strength is suggested, as layers are missing")
    assert [text for text in map(str, report.warnings) if "weak effect" in text]
    assert not any("strength" in text for text in map(str, report.warnings))
    jsonschema.validate(report.to_json(), REPORT_SCHEMA)


def test_only_what_orthogonal_left_out_is_said_to_be_left_out(bases, tmp_path):
    """A DoRA that is copied can become larger, and half precision rounds: neither is left out by anybody."""
    tensors = lora_tensors(bases[0])
    for key in [key for key in tensors if key.endswith(".alpha")]:
        rows = len(tensors[key.replace(".alpha", ".lora_up.weight")])
        tensors[key.replace(".alpha", ".dora_scale")] = torch.full((rows, 1), 20.0)
    source, target = bases
    larger = replace(target, read=lambda layer: 1.2 * target.read(layer))
    _, report = transfer_adapter(adapter_of(tensors, source, tmp_path), source, larger, TransferOptions(method="copy"))
    assert report.retained_norm > 1.05
    assert report.summary.endswith("suggested strength 1.00 (all of it arrived)")
    half = {key: tensor.half() for key, tensor in lora_tensors(source).items()}
    _, report = transfer_adapter(
        adapter_of(half, source, tmp_path), source, source, TransferOptions(method="orthogonal")
    )
    assert report.summary.endswith("suggested strength 1.00 (all of it arrived)")
    _, report = transfer_adapter(adapter_of(half, source, tmp_path), *bases, TransferOptions(method="orthogonal"))
    assert report.summary.endswith("suggested strength 1.00 (what the target does already is left out)")


def test_a_layer_that_feeds_several_counts_once(bases, tmp_path):
    adapter = adapter_of(lora_tensors(bases[0]), bases[0], tmp_path)
    found = match_bases(*bases)
    block = LAYER.removesuffix(".attn1.to_q")
    twice = "unet.up_blocks.0.attentions.0.transformer_blocks.0"
    assignment = replace(found, pairs={**found.pairs, twice: block})
    _, report = transfer_adapter(adapter, *bases, TransferOptions(method="copy", threshold=-9), assignment=assignment)
    gone = [name for name in adapter.layers if name.startswith(twice)]
    assert sum(row.source == LAYER for row in report.rows) == 2
    assert report.layers == report.to_json()["layers"] == len(adapter.layers)
    assert {row.source for row in report.missing} == set(gone) != set()
    assert report.arrived == len(adapter.layers) - len(gone)


def test_what_a_conversion_leaves_out_counts_too(bases, tmp_path):
    tensors = lora_tensors(bases[0])
    with_nan(tensors)
    adapter = adapter_of(tensors, bases[0], tmp_path)
    source = replace(bases[0], layers=LayerTable(x for x in bases[0].layers.values() if "conv" not in x.name))
    converted, _ = convert_to_lora_x(adapter, source, rank=4)
    left = {name for name in adapter.layers if "conv" in name}
    assert converted.unread.keys() == left | {LAYER}
    _, report = transfer_adapter(converted, bases[0], bases[0])
    assert {row.source for row in report.missing} == left | {LAYER}
