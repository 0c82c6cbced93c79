"""Every kind of adapter, moved between two small models with fused weights (FLUX.1) by every way there is."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorax import (
    Assignment,
    MismatchError,
    NumericsError,
    Outcome,
    TransferOptions,
    load_adapter,
    open_base,
    pair_scores,
    save_adapter,
    transfer_adapter,
)
from lorax.adapters import (
    LoraLayer,
    VectorLayer,
)
from lorax.adapters.convert import convert_to_lora
from lorax.models.layers import Layer
from tests.conftest import small_base
from tests.every_kind import NAME, QKV, W, adapter_of, flux, flux_bases, kinds
from tests.tensors import dense, randn, same


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return flux_bases(tmp_path_factory.mktemp("flux"))


CUT = ("lora", "dora", "loha", "diff", "foura")
THIN = ("lora", "foura")


def naive_projection(update, weight, rank):
    U, _, Vh = torch.linalg.svd(weight.double())
    U, Vh = U[:, :rank], Vh[:rank]
    return U @ (U.T @ update.double() @ Vh.T) @ Vh


def best(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("kind", kinds(Layer("x.y", (W, W))))
def test_copied_each_kind_stays_what_it_is(kind, bases):
    source, target = bases
    own = kinds(source.layers[NAME])[kind]
    result, report = transfer_adapter(adapter_of(own), source, target, TransferOptions(method="copy"))
    moved = result.layers[NAME]
    assert type(moved) is type(own)
    (row,) = report.rows
    assert (row.outcome, row.method) == (Outcome.TRANSFERRED, "copy")
    assert row.source_norm == pytest.approx(float(dense(own, source).norm()), rel=1e-4)
    assert row.target_norm == pytest.approx(float(dense(moved, target).norm()), rel=1e-4)
    for name, part in own.parts().items():
        if name != "dora_scale":
            assert torch.equal(moved.parts()[name], part)


@pytest.mark.parametrize("kind", kinds(Layer("x.y", (W, W))))
def test_auto_copies_what_is_not_low_rank(kind, bases):
    source, target = bases
    own = kinds(source.layers[NAME])[kind]
    _, report = transfer_adapter(adapter_of(own), source, target)
    assert report.rows[0].method == ("orthogonal" if kind in THIN else "copy")


@pytest.mark.parametrize("kind", kinds(Layer("x.y", (W, W))))
def test_projected_each_kind_is_the_dense_formula_refactored(kind, bases):
    source, target = bases
    own = kinds(source.layers[NAME])[kind]
    result, report = transfer_adapter(
        adapter_of(own), source, target, TransferOptions(method="project", rank=8, lora_rank=3, dora="dense")
    )
    expected = naive_projection(dense(own, source), target.weight(NAME), 8)
    if kind not in THIN:
        expected = best(expected, 3)
        assert "made a LoRA of rank 3" in report.rows[0].note
        assert result.layers[NAME].rank == 3
    same(dense(result.layers[NAME], target), expected)


@pytest.mark.parametrize("kind", kinds(Layer("x.y", (W, W))))
def test_as_lora_x_each_kind_is_the_change_of_the_targets_singular_values(kind, bases):
    source, target = bases
    own = kinds(source.layers[NAME])[kind]
    result, _ = transfer_adapter(
        adapter_of(own), source, target, TransferOptions(method="copy", rank=8, format="lora-x")
    )
    U, _, Vh = torch.linalg.svd(target.weight(NAME).double())
    expected = (U[:, :8] * (U[:, :8].T @ dense(own, source) @ Vh[:8].T).diagonal()) @ Vh[:8]
    (lora,) = convert_to_lora(result, target).layers.values()
    same(dense(lora, target), expected)


@pytest.mark.parametrize("kind", kinds(QKV))
def test_an_update_of_a_fused_weight_goes_out_as_it_came(kind, bases, tmp_path):
    """Through a file in kohya's names, read with its base: cut where its kind can be, whole where it cannot."""
    source, target = bases
    own = kinds(QKV)[kind]
    save_adapter(adapter_of(own, family=source.family), tmp_path / "in.safetensors")
    read = load_adapter(tmp_path / "in.safetensors", source)
    assert len(read.layers) == (3 if kind in CUT else 1)
    result, report = transfer_adapter(read, source, target, TransferOptions(method="copy"))
    assert {row.outcome for row in report.rows} == {Outcome.TRANSFERRED}
    save_adapter(result, tmp_path / "out.safetensors")
    before, after = load_file(tmp_path / "in.safetensors"), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert "dora_scale" in key or torch.equal(tensor, after[key])


@pytest.mark.parametrize("kind", [kind for kind in kinds(QKV) if kind not in CUT])
def test_an_update_that_cannot_be_cut_is_made_dense_and_cut(kind, bases):
    source, target = bases
    own = kinds(QKV)[kind]
    result, report = transfer_adapter(
        adapter_of(own), source, target, TransferOptions(method="project", rank=8, lora_rank=W)
    )
    parts = source.layers.find("transformer", QKV.original)
    whole = own.delta_weight(torch.cat([source.weight(part.name) for part in parts])).double()
    assert [row.source for row in report.rows] == [part.name for part in parts]
    for part, update in zip(parts, whole.split(W), strict=True):
        expected = naive_projection(update, target.weight(part.name), 8)
        same(dense(result.layers[part.name], target), expected)


@pytest.mark.parametrize("kind", [kind for kind in kinds(QKV) if kind not in CUT])
def test_the_row_of_an_update_that_stays_whole_is_that_of_the_whole_weight(kind, bases):
    own = kinds(QKV)[kind]
    before, here = (base.fused_weight(QKV) for base in bases)
    result, report = transfer_adapter(adapter_of(own), *bases, TransferOptions(method="copy"))
    (row,), (moved,) = report.rows, result.layers.values()
    assert row.source_norm == pytest.approx(float(own.delta_weight(before).double().norm()), rel=1e-4)
    assert row.target_norm == pytest.approx(float(moved.delta_weight(here).double().norm()), rel=1e-4)
    assert (row.left, row.right) == pair_scores(before, here)
    with pytest.raises(MismatchError, match="1 below threshold"):
        transfer_adapter(adapter_of(own), *bases, TransferOptions(method="copy", threshold=row.corrected))
    transfer_adapter(adapter_of(own), *bases, TransferOptions(method="copy", threshold=row.corrected - 1e-6))


@pytest.mark.parametrize("method", ["copy", "project"])
@pytest.mark.parametrize("shape", [(3 * W, 2 * W), (2 * W, W)], ids=str)
def test_an_update_of_a_fused_weight_of_another_size_is_reported(method, shape, bases):
    lora, own = kinds(bases[0].layers[NAME])["lora"], kinds(Layer(QKV.name, shape, QKV.original))["oft"]
    result, report = transfer_adapter(adapter_of(lora, own), *bases, TransferOptions(method=method, rank=8))
    row = report.rows[-1]
    assert list(result.layers) == [NAME]
    assert (row.source, row.target, row.outcome) == (QKV.name, "", Outcome.SHAPE_MISMATCH)
    assert row.note == f"adapter {shape}, source {QKV.shape}"


@pytest.mark.parametrize("kind", ["lora", "diff", "oft"])
def test_an_update_of_another_size_than_its_source_is_reported(kind, bases):
    layer = bases[0].layers["transformer.transformer_blocks.1.attn.to_out.0"]
    lora, own = kinds(bases[0].layers[NAME])["lora"], kinds(Layer(layer.name, (2 * W, W), layer.original))[kind]
    result, report = transfer_adapter(adapter_of(lora, own), *bases)
    row = report.rows[-1]
    assert list(result.layers) == [NAME]
    assert (row.source, row.outcome, row.target_norm) == (layer.name, Outcome.SHAPE_MISMATCH, 0)
    assert row.note == f"adapter {(2 * W, W)}, source {(W, W)}"
    # What an update does that turns its weight is not known without one of its size.
    norm = math.nan if own.norm_needs_weight else float(own.delta_weight().norm())
    assert row.source_norm == pytest.approx(norm, nan_ok=True)


def test_of_a_fused_weight_only_the_parts_that_are_fed_get_an_update(bases):
    own = kinds(QKV)["oft"]
    parts = [part.name for part in bases[0].layers.find("transformer", QKV.original)]
    some = Assignment("file", dict.fromkeys(parts[1:], ""))
    result, report = transfer_adapter(
        adapter_of(own), *bases, TransferOptions(method="copy", lora_rank=W), assignment=some
    )
    assert [row.outcome for row in report.rows] == [Outcome.TRANSFERRED, *[Outcome.NO_TARGET_LAYER] * 2]
    expected = own.delta_weight(bases[0].fused_weight(QKV))[:W].double()
    same(dense(result.layers[NAME], bases[1]), expected)


@pytest.mark.parametrize("kind", kinds(QKV))
def test_converted_each_kind_is_the_best_lora_of_the_rank(kind, bases):
    source, _ = bases
    for layer in (source.layers[NAME], QKV):
        own = kinds(layer)[kind]
        weight = source.fused_weight(layer)
        for lora in convert_to_lora(adapter_of(own), source, rank=3).layers.values():
            expected = own.delta_weight(weight).double()
            if layer is QKV and kind in CUT:
                expected = expected[slice(*lora.layer.rows)]
            expected = expected if kind in THIN else best(expected, 3)
            same(lora.delta_weight(), expected)
            assert isinstance(lora, LoraLayer)


def test_a_part_that_has_an_update_of_its_own_keeps_that_and_the_other_is_said_to_be_lost(bases):
    lora, fused = kinds(bases[0].layers[NAME])["lora"], kinds(QKV)["oft"]
    alone, _ = transfer_adapter(adapter_of(lora), *bases, TransferOptions(method="project", rank=8))
    both = adapter_of(lora, fused)
    result, report = transfer_adapter(both, *bases, TransferOptions(method="project", rank=8))
    assert torch.equal(result.layers[NAME].delta_weight(), alone.layers[NAME].delta_weight())
    assert [row.outcome for row in report.rows if row.target == NAME] == [Outcome.TRANSFERRED, Outcome.TWICE]
    assert (report.arrived, report.layers) == (2, 3)
    with pytest.raises(MismatchError, match=r"strict.*place taken"):
        transfer_adapter(both, *bases, TransferOptions(method="project", rank=8, strict=True))


def test_biases_follow_their_block_and_another_size_is_reported(bases, tmp_path):
    source, target = bases
    name = "transformer.single_transformer_blocks.1.proj_out.bias"
    assert name in source.vectors
    own = VectorLayer(source.vectors[name], randn(W), "diff_b")
    result, report = transfer_adapter(adapter_of(own), source, target, TransferOptions(method="project"))
    assert torch.equal(result.layers[name].parts()["diff"], own.diff)
    assert report.rows[0].method == "copy"
    tensors = {f"{path}.weight": torch.randn(shape) for path, shape in flux(width=8).items()}
    tensors |= {key.replace(".weight", ".bias"): torch.zeros(len(value)) for key, value in tensors.items()}
    save_file(tensors, tmp_path / "narrow.safetensors")
    narrow = open_base(tmp_path / "narrow.safetensors")
    lora = kinds(source.layers[NAME])["lora"]
    _, report = transfer_adapter(adapter_of(own, lora), source, narrow, TransferOptions(threshold=-9))
    outcomes = {row.source: row.outcome for row in report.rows}
    assert outcomes == {name: Outcome.SHAPE_MISMATCH, NAME: Outcome.TRANSFERRED}


def test_a_dora_keeps_the_ratio_of_its_magnitudes_or_moves_all_that_it_changes(bases):
    source, target = bases
    own = kinds(source.layers[NAME])["dora"]
    before, here = source.weight(NAME).double(), target.weight(NAME).double()
    ratio = (before + dense(own, source)).norm(dim=1) / before.norm(dim=1)
    direction, _ = transfer_adapter(adapter_of(own), source, target)
    after = here + dense(direction.layers[NAME], target)
    same(after.norm(dim=1) / here.norm(dim=1), ratio)
    whole, report = transfer_adapter(adapter_of(own), source, target, TransferOptions(dora="dense", lora_rank=W))
    same(dense(whole.layers[NAME], target), dense(own, source))
    assert report.rows[0].retained_norm == pytest.approx(1, abs=1e-4)
    # On its own base both are the very update.
    for dora in ("direction", "dense"):
        moved, _ = transfer_adapter(adapter_of(own), source, source, TransferOptions(dora=dora, lora_rank=W))
        same(dense(moved.layers[NAME], source), dense(own, source))


def test_a_dora_of_a_fused_weight_that_cannot_be_cut_moves_as_any_dora(bases):
    source, target = bases
    own = kinds(QKV)["dora by input"]
    parts = source.layers.find("transformer", QKV.original)
    before, here = (torch.cat([base.weight(part.name) for part in parts]).double() for base in bases)
    ratio = (before + own.delta_weight(before)).norm(dim=0) / before.norm(dim=0)
    direction, _ = transfer_adapter(adapter_of(own), source, target)
    (moved,) = direction.layers.values()
    after = here + moved.delta_weight(here)
    same(after.norm(dim=0) / here.norm(dim=0), ratio)
    whole, _ = transfer_adapter(adapter_of(own), source, target, TransferOptions(dora="dense", lora_rank=W))
    arrived = torch.cat(
        [dense(whole.layers[part.name], target) for part in source.layers.find("transformer", QKV.original)]
    )
    same(arrived, own.delta_weight(before))


@pytest.mark.parametrize("layer", [None, QKV], ids=["layer", "fused"])
def test_a_magnitude_that_grows_beyond_its_dtype_is_refused(layer, bases):
    source, target = bases
    layer = layer or source.layers[NAME]
    own = kinds(layer)["dora by input"].moved(layer, torch.float16)
    larger = replace(target, read=lambda layer: 1e6 * target.read(layer))
    with pytest.raises(NumericsError, match=layer.name):
        transfer_adapter(adapter_of(own), source, larger, TransferOptions(method="copy", threshold=-9))


def test_a_dora_on_another_size_moves_all_that_it_changes(bases, tmp_path):
    source, _ = bases
    tensors = {f"{path}.weight": torch.randn(shape) for path, shape in flux(width=24).items()}
    save_file(tensors, tmp_path / "wide.safetensors")
    own = kinds(source.layers[NAME])["dora"]
    result, report = transfer_adapter(
        adapter_of(own), source, open_base(tmp_path / "wide.safetensors"), TransferOptions(threshold=-9)
    )
    assert result.layers[NAME].kind == "lora"
    assert report.rows[0].method == "align"


def test_fp8_stays_fp8_when_copied_and_becomes_fp16_when_computed(bases):
    source, target = bases
    lora = kinds(source.layers[NAME])["lora"].moved(source.layers[NAME], torch.float8_e4m3fn)
    copied, _ = transfer_adapter(adapter_of(lora), source, target, TransferOptions(method="copy"))
    projected, _ = transfer_adapter(adapter_of(lora), source, target, TransferOptions(method="project", rank=8))
    assert (copied.layers[NAME].dtype, projected.layers[NAME].dtype) == (torch.float8_e4m3fn, torch.float16)


def test_mixed_kinds_in_one_file_and_a_bad_one_among_them(bases, tmp_path):
    source, target = bases
    names = [layer.name for layer in source.layers.values() if layer.matrix_shape == (W, W)]
    found = [
        kinds(source.layers[name])[kind] for name, kind in zip(names, ("lora", "lokr", "oft", "foura"), strict=False)
    ]
    save_adapter(adapter_of(*found, family=source.family, naming="diffusers"), tmp_path / "mixed.safetensors")
    tensors = load_file(tmp_path / "mixed.safetensors")
    bad = next(key for key in tensors if key.endswith("foura_gate"))
    tensors[bad] = torch.ones(7)
    save_file(tensors, tmp_path / "mixed.safetensors")
    adapter = load_adapter(tmp_path / "mixed.safetensors", source)
    assert adapter.kind == "mixed"
    assert bad in adapter.unused
    result, report = transfer_adapter(adapter, source, target)
    assert len(result.layers) == report.arrived == 3
    assert bad in report.unused


def test_a_dora_written_for_a_linear_layer_fits_a_convolution_of_one_by_one(tmp_path):
    """Some trainers flatten 1x1 convolutions; the magnitude follows into the shape of the base's weight."""
    source, target = (small_base(tmp_path / f"{change}.safetensors", change=change) for change in (0.0, 0.2))
    layer = source.layers["unet.mid_block.attentions.0.proj_in"]
    m, n = layer.matrix_shape
    assert layer.shape == (m, n, 1, 1)
    own = kinds(Layer(layer.name, (m, n), layer.original))["dora"]
    before, here = source.weight(layer.name), target.weight(layer.name)
    result, _ = transfer_adapter(adapter_of(own), source, target)
    ratio = (before + own.delta_weight(before)).norm(dim=1) / before.norm(dim=1)
    after = here + result.layers[layer.name].delta_weight(here)
    same(after.norm(dim=1) / here.norm(dim=1), ratio)
