"""Transfers between whole bases: what happens to each layer, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import lorax
from demo.synthetic import base_tensors
from lorax import (
    Adapter,
    LoraLayer,
    MismatchError,
    OptionError,
    Outcome,
    TransferOptions,
    load_adapter,
    save_adapter,
    transfer_adapter,
)
from lorax.adapters.convert import convert_to_lora_x
from lorax.models.families import UNKNOWN, families
from tests.conftest import small_base
from tests.tensors import lora_tensors, same


def test_copy_is_bit_exact(bases, lora):
    result, report = transfer_adapter(lora, *bases, TransferOptions(method="copy"))
    assert report.outcomes == {Outcome.TRANSFERRED: len(lora.layers)}
    assert report.retained_norm == pytest.approx(1)
    for name, own in lora.layers.items():
        assert torch.equal(result.layers[name].lora_up, own.lora_up)
        assert torch.equal(result.layers[name].lora_down, own.lora_down)
        assert result.layers[name].alpha == own.alpha
    provenance = {key: result.metadata[f"lorax_{key}"] for key in ("source", "target", "method", "rank")}
    assert provenance == {"source": bases[0].name, "target": bases[1].name, "method": "copy", "rank": "320"}


@pytest.mark.parametrize("method", ["project", "subspace-null", "orthogonal"])
def test_result_keeps_rank_alpha_and_dtype(tmp_path, bases, method):
    tensors = {key: value.half() for key, value in lora_tensors(bases[0]).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", bases[0])
    result, report = transfer_adapter(adapter, *bases, TransferOptions(method=method, rank=24))
    for name, own in adapter.layers.items():
        moved = result.layers[name]
        assert (moved.rank, moved.alpha, moved.dtype) == (own.rank, own.alpha, torch.float16)
    assert [row.source for row in report.rows if not 0 <= row.retained_norm <= 1.001] == []
    assert 0 < report.retained_norm < 1


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Bases of weights that are large enough for the fast subspaces."""
    folder, wide = tmp_path_factory.mktemp("large"), {"model_channels": 192, "text": False}
    return [small_base(folder / f"{change}.safetensors", change=change, **wide) for change in (0.0, 0.2)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return small_base(tmp_path_factory.mktemp("wide") / "wide.safetensors", model_channels=64, text=False)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["project", "subspace-null"])
def test_fast_projection_is_right_to_its_bound(large, method):
    pair = large
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    m, n = pair[0].layers[name].matrix_shape
    own = LoraLayer(pair[0].layers[name], torch.randn(m, 4), torch.randn(4, n))
    adapter = Adapter("a", pair[0].family, "kohya", {name: own})
    exact, fast = (
        transfer_adapter(adapter, *pair, TransferOptions(method=method, rank=100, fast=fast))[0]
        .layers[name]
        .delta_weight()
        for fast in (False, True)
    )
    assert 0 < float((exact - fast).norm() / exact.norm()) < 1e-4


@pytest.mark.parametrize(
    "options", [{"method": "index"}, {"method": "align"}, {"method": "project", "format": "lora-x"}], ids=str
)
def test_what_needs_single_vectors_is_never_fast(options):
    """The fast subspace turns vectors of like singular values among each other; `index` and LoRA-X tell them apart."""
    layer = lorax.Layer("transformer.blocks.0.attn.to_q", (150, 160))
    generator = torch.Generator().manual_seed(5)
    shapes = (150, 160), ((150, 160) if "format" in options else (170, 160))
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    pair = [
        lorax.Base(name, UNKNOWN, lorax.LayerTable([replace(layer, shape=tuple(W.shape))]), lambda _, W=W: W)
        for name, W in zip("st", weights, strict=True)
    ]
    own = LoraLayer(layer, torch.randn(150, 4, generator=generator), torch.randn(4, 160, generator=generator))
    adapter = Adapter("a", None, "kohya", {layer.name: own})
    exact, fast = (
        transfer_adapter(adapter, *pair, TransferOptions(rank=50, threshold=-9, fast=fast, **options))[0]
        .layers[layer.name]
        .parts()
        for fast in (False, True)
    )
    assert all(torch.equal(exact[name], fast[name]) for name in exact)


def test_inputs_never_change(bases, lora):
    before = {name: (own.lora_up.clone(), own.lora_down.clone()) for name, own in lora.layers.items()}
    files = [base.files[0].read_bytes() for base in bases]
    transfer_adapter(lora, *bases, TransferOptions(method="subspace-null", rank=8))
    for name, own in lora.layers.items():
        assert torch.equal(own.lora_up, before[name][0])
        assert torch.equal(own.lora_down, before[name][1])
    assert [base.files[0].read_bytes() for base in bases] == files


def test_unrelated_layers_get_no_update(bases, lora, tmp_path):
    stranger = small_base(tmp_path / "stranger.safetensors", seed=99)
    with pytest.raises(MismatchError, match="below threshold"):
        transfer_adapter(lora, bases[0], stranger, TransferOptions(threshold=0.5))
    _, report = transfer_adapter(lora, *bases, TransferOptions(threshold=0.5))
    assert report.arrived == len(report.rows)


def test_text_encoder_layers_are_kept_where_a_base_has_none(bases, lora, tmp_path):
    bare = small_base(tmp_path / "bare.safetensors", change=0.2, text=False)
    result, report = transfer_adapter(lora, bases[0], bare, TransferOptions(method="project", rank=24))
    for row in report.rows:
        kept = row.source.startswith("text_encoder.")
        assert (row.outcome is Outcome.KEPT) == kept
        if kept:
            assert torch.equal(result.layers[row.source].lora_up, lora.layers[row.source].lora_up)
    assert "text_encoder is not in both bases" in {row.note for row in report.rows}


def test_layers_that_the_target_lacks_are_reported_and_strict_raises(bases, lora):
    source, target = bases
    gone = {name for name in target.layers if "mid_block" in name}
    layers = lorax.LayerTable(layer for name, layer in target.layers.items() if name not in gone)
    pruned = replace(target, layers=layers)
    result, report = transfer_adapter(lora, source, pruned)
    missing = {row.source for row in report.rows if row.outcome is Outcome.NO_TARGET_LAYER}
    assert missing == gone & set(lora.layers)
    assert not missing & set(result.layers)
    assert any(
        f"{len(missing)} of {len(report.rows)} layers get no update" in text for text in map(str, report.warnings)
    )
    with pytest.raises(MismatchError, match="strict"):
        transfer_adapter(lora, source, pruned, TransferOptions(strict=True))
    smaller = replace(source, layers=layers)
    _, report = transfer_adapter(lora, smaller, pruned)
    assert report.outcomes[Outcome.NO_SOURCE_LAYER] == len(missing)


def test_an_adapter_that_fits_the_target_and_not_the_source_is_not_mapped_twice(bases, lora):
    source, target = bases
    layers = lorax.LayerTable(layer for name, layer in source.layers.items() if "mid_block" not in name)
    with pytest.raises(MismatchError, match="made for the target already"):
        transfer_adapter(lora, replace(source, layers=layers), target)


def test_another_width_is_aligned_and_marked(bases, lora, wide):
    result, report = transfer_adapter(lora, bases[0], wide, TransferOptions(rank=16, threshold=-9))
    rows = {row.source: row for row in report.rows if row.source.startswith("unet.")}
    assert {row.method for row in rows.values()} == {"align"}
    for name, row in rows.items():
        assert result.layers[name].layer.matrix_shape == wide.layers[name].matrix_shape
        assert ("weakest" in row.note) == (".attn2.to_k" not in name and ".attn2.to_v" not in name)
    assert any("weakest kind" in text for text in map(str, report.warnings))


@pytest.mark.parametrize("method", ["copy", "orthogonal", "project", "subspace-null"])
def test_another_width_is_refused_by_a_method_that_cannot_resize(bases, lora, wide, method):
    _, report = transfer_adapter(lora, bases[0], wide, TransferOptions(method=method, rank=16, threshold=-9))
    outcomes = {row.outcome for row in report.rows if row.source.startswith("unet.")}
    assert outcomes == {Outcome.SHAPE_MISMATCH}


@pytest.mark.parametrize("way", ["sd1 to sdxl", "sdxl to sd1"])
def test_between_families_of_another_text_width(tmp_path, way):
    """The text side of cross-attention changes its size and is aligned; what both have in one size is not."""
    xl = replace(families()["sdxl"].unet, model_channels=32, channel_mult=(1, 2), transformer_depth=(1, 1))
    xl = replace(xl, num_res_blocks=1, transformer_depth_middle=1, adm_in_channels=16)
    save_file(base_tensors(replace(families()["sdxl"], unet=xl), 5, text_encoders=False), tmp_path / "xl.safetensors")
    bases = small_base(tmp_path / "sd1.safetensors"), lorax.open_base(tmp_path / "xl.safetensors")
    source, target = bases if way == "sd1 to sdxl" else bases[::-1]
    tensors: dict[str, torch.Tensor] = {}
    for layer in source.layers.values():
        if layer.is_attention and layer.is_main:
            module = f"lora_unet_{layer.path.replace('.', '_')}"
            tensors[f"{module}.lora_up.weight"] = torch.randn(layer.shape[0], 4)
            tensors[f"{module}.lora_down.weight"] = torch.randn(4, layer.shape[1])
    save_file(tensors, tmp_path / "lora.safetensors")
    adapter = load_adapter(tmp_path / "lora.safetensors", source)
    result, report = transfer_adapter(adapter, source, target, TransferOptions(threshold=-9))
    assert report.arrived == len(report.rows) == len(adapter.layers)
    for row in report.rows:
        assert row.method == ("align" if row.source.endswith(("attn2.to_k", "attn2.to_v")) else "orthogonal")
        assert result.layers[row.target].layer.matrix_shape == target.layers[row.target].matrix_shape
    save_adapter(result, tmp_path / "moved.safetensors", naming="kohya")
    assert not load_adapter(tmp_path / "moved.safetensors", target).unused


def test_adapter_of_another_family_is_refused(bases, tmp_path):
    module = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    tensors = {f"{module}.lora_up.weight": torch.randn(640, 2), f"{module}.lora_down.weight": torch.randn(2, 2048)}
    save_file(tensors, tmp_path / "xl.safetensors")
    adapter = load_adapter(tmp_path / "xl.safetensors", bases[0])
    assert adapter.family.name == "sdxl"
    with pytest.raises(MismatchError, match=r"Stable Diffusion XL.*Stable Diffusion 1"):
        transfer_adapter(adapter, *bases)
    with pytest.raises(MismatchError, match="different families"):
        convert_to_lora_x(adapter, bases[0], rank=4)


def test_swapped_bases_of_two_widths_are_named(lora, bases, wide):
    with pytest.raises(MismatchError, match="swap source and target"):
        transfer_adapter(lora, wide, bases[0])


def test_a_file_read_without_its_base_is_named_by_it_when_used(tmp_path):
    """With one block a level, `output_blocks.3.1` is another layer than in the full-size model of the family."""
    base = small_base(tmp_path / "base.safetensors", text=False)
    layer = next(layer for layer in base.layers.values() if layer.original.startswith("output_blocks.3.1.transf"))
    module = "lora_unet_" + layer.original.replace(".", "_")
    (m, n), k = layer.matrix_shape, 2
    tensors = {f"{module}.lora_up.weight": torch.randn(m, k), f"{module}.lora_down.weight": torch.randn(k, n)}
    save_file(tensors, tmp_path / "a.safetensors")
    alone = load_adapter(tmp_path / "a.safetensors")
    assert layer.name not in alone.layers
    result, _ = transfer_adapter(alone, base, base)
    assert list(result.layers) == [layer.name]


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": 10**6},
        {"method": "magic"},
        {"format": "dora"},
        {"threshold": 1.0},
        {"threshold": math.nan},
        {"threshold": -math.inf},
    ],
    ids=str,
)
def test_options_out_of_range(bases, lora, options):
    with pytest.raises(OptionError):
        transfer_adapter(lora, *bases, TransferOptions(**options))


def test_alpha_zero_stays_zero(bases, tmp_path):
    save_file(lora_tensors(bases[0], alpha=0.0), tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", bases[0])
    result, _ = transfer_adapter(adapter, *bases, TransferOptions(method="project", rank=8))
    assert all(not own.delta_weight().any() for own in result.layers.values())


def test_lora_layer_is_exact_about_its_scale():
    layer = lorax.Layer("unet.x", (4, 6))
    up, down = torch.randn(4, 2), torch.randn(2, 6)
    torch.testing.assert_close(LoraLayer(layer, up, down, 3.0).delta_weight(), 1.5 * up @ down)
    torch.testing.assert_close(LoraLayer(layer, up, down).delta_weight(), up @ down)


def test_auto_leaves_out_what_the_target_does_already(bases, lora):
    """By hand in float64; `lora_down` and alpha stay as they are."""
    source, target = bases
    result, report = transfer_adapter(lora, source, target)
    taken = 0
    for row in report.rows:
        own, moved = lora.layers[row.source], result.layers[row.target]
        assert row.method == "orthogonal"
        assert torch.equal(moved.lora_down, own.lora_down.flatten(1))
        assert moved.alpha == own.alpha
        W_s, W_t = (
            base.weight(name).double().flatten(1) for base, name in ((source, row.source), (target, row.target))
        )
        A = own.lora_down.double().flatten(1)
        F, dW = (W_t - W_s) @ torch.linalg.pinv(A) @ A, own.delta_weight().double().flatten(1)
        along = (dW * F).sum() / F.square().sum()
        expected = dW - along.clamp_min(0) * F
        taken += bool(along > 0)
        same(moved.delta_weight().double().flatten(1), expected)
    assert 0 < taken < len(report.rows)
