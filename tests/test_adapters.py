"""Adapter files: every naming, round trips, what is not used, and files that are broken."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from lorax import (
    Adapter,
    Base,
    FormatError,
    LoraLayer,
    LoraxError,
    LoraXLayer,
    NumericsError,
    OptionError,
    OutputError,
    convert_to_lora,
    convert_to_lora_x,
    load_adapter,
    save_adapter,
)
from lorax.adapters.keys import ROLES, indexed_layers, parse
from lorax.models.base import loaded_base
from lorax.models.families import UNKNOWN, families
from lorax.models.layers import Layer, LayerTable
from tests.tensors import lora_tensors, randn, same

QKV = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LDM = "input_blocks.1.1.transformer_blocks.0.attn1"
UP, DOWN = torch.randn(320, 2), torch.randn(2, 320)
SPELLINGS = {
    "kohya": (f"lora_unet_{QKV.replace('.', '_')}_to_q", "lora_up.weight", "lora_down.weight"),
    "kohya, ldm": (f"lora_unet_{LDM.replace('.', '_')}_to_q", "lora_up.weight", "lora_down.weight"),
    "diffusers": (f"unet.{QKV}.to_q", "lora_B.weight", "lora_A.weight"),
    "diffusers, bare": (f"{QKV}.to_q", "lora_B.weight", "lora_A.weight"),
    "diffusers, .lora.": (f"unet.{QKV}.to_q", "lora.up.weight", "lora.down.weight"),
    "diffusers, processor": (f"unet.{QKV}.processor.to_q_lora", "up.weight", "down.weight"),
    "diffusers, linear layer": (f"unet.{QKV}.to_q", "lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
    "comfyui": (
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "lora_up.weight",
        "lora_down.weight",
    ),
    "peft": (f"base_model.model.{QKV}.to_q", "lora_B.weight", "lora_A.weight"),
    "peft, named": (f"base_model.model.{QKV}.to_q", "lora_B.default.weight", "lora_A.default.weight"),
}


@pytest.mark.parametrize(
    ("module", "told"), [("down_blocks_1_attentions_0", ["sd1", "sd2"]), ("input_blocks_4_1", ["sdxl"])]
)
def test_scripts_of_kohya_write_original_names_for_sdxl_only(tmp_path, module, told):
    module = f"lora_unet_{module}_transformer_blocks_0_attn1_to_q"  # of 640 channels in all three
    save_file(
        {f"{module}.lora_up.weight": torch.ones(640, 1), f"{module}.lora_down.weight": torch.ones(1, 640)},
        tmp_path / "a.safetensors",
    )
    assert [family.name for family in load_adapter(tmp_path / "a.safetensors").families] == told


def test_a_layer_that_families_call_differently_in_the_original_has_the_name_that_they_share(tmp_path):
    path = "time_text_embed.text_embedder.linear_1"  # originally vector_in.in_layer of FLUX.1, y_embedder.mlp.0 of SD 3
    module = f"lora_transformer_{path.replace('.', '_')}"
    tensors = {f"{module}.lora_up.weight": torch.ones(8, 1), f"{module}.lora_down.weight": torch.ones(1, 8)}
    save_file(tensors | {f"{module}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert adapter.family_label == "FLUX.1, HunyuanVideo or Stable Diffusion 3"
    assert list(adapter.layers) == [f"transformer.{path}"]
    save_adapter(adapter, tmp_path / "b.safetensors")
    assert load_file(tmp_path / "b.safetensors").keys() == tensors.keys() | {f"{module}.alpha"}


def test_a_module_that_no_family_knows_keeps_its_key(tmp_path):
    tensors = {}
    for module in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q", "of.its.own"):
        tensors[f"transformer.{module}.lora_A.weight"] = torch.ones(1, 8)
        tensors[f"transformer.{module}.lora_B.weight"] = torch.ones(8, 1)
    save_file(tensors, tmp_path / "a.safetensors")
    save_adapter(load_adapter(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert load_file(tmp_path / "b.safetensors").keys() == tensors.keys()


def test_a_layer_has_the_name_of_its_base_whatever_its_size_and_its_shape_where_they_fit(tmp_path, bases):
    proj, conv = (f"unet.{path}" for path in ("down_blocks.0.attentions.0.proj_in", "conv_in"))
    m, n = bases[0].layers[proj].matrix_shape  # a 1x1 convolution, here as a linear layer
    tensors = {f"{proj}.lora_A.weight": torch.ones(1, n), f"{proj}.lora_B.weight": torch.ones(m, 1)}
    m, n, *kernel = bases[0].layers[conv].shape  # of an inpainting model, five channels more
    tensors |= {f"{conv}.lora_A.weight": torch.ones(1, n + 5, *kernel), f"{conv}.lora_B.weight": torch.ones(m, 1, 1, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    layers = load_adapter(tmp_path / "a.safetensors", bases[0]).layers
    assert {name: own.layer.shape for name, own in layers.items()} == {
        proj: bases[0].layers[proj].shape,
        conv: (m, n + 5, *kernel),
    }


def test_an_adapter_is_of_the_family_of_the_base_that_has_all_of_its_layers(tmp_path):
    names = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q")  # FLUX.1 has them too
    tensors = {f"transformer.{name}.lora_A.weight": torch.ones(1, 8) for name in names}
    tensors |= {f"transformer.{name}.lora_B.weight": torch.ones(8, 1) for name in names}
    save_file(tensors, tmp_path / "a.safetensors")
    layers = LayerTable([Layer(f"transformer.{name}", (8, 8)) for name in names])
    base = Base("of its own", UNKNOWN, layers, lambda layer: torch.ones(layer.shape))
    assert load_adapter(tmp_path / "a.safetensors", base).family is UNKNOWN


@pytest.mark.parametrize(("module", "up", "down"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_means_the_same_layer(tmp_path, module, up, down):
    save_file({f"{module}.{up}": UP, f"{module}.{down}": DOWN}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert list(adapter.layers) == [f"unet.{QKV}.to_q"]
    assert [family.name for family in adapter.families] == ["sd1", "sd2"]  # only the width of the text tells
    assert not adapter.unused
    torch.testing.assert_close(adapter.layers[f"unet.{QKV}.to_q"].delta_weight(), UP @ DOWN)


def test_to_out_in_processor_spelling(tmp_path):
    key = f"unet.{QKV}.processor.to_out_lora"
    save_file({f"{key}.up.weight": UP, f"{key}.down.weight": DOWN}, tmp_path / "a.safetensors")
    assert list(load_adapter(tmp_path / "a.safetensors").layers) == [f"unet.{QKV}.to_out.0"]


@pytest.mark.parametrize(
    ("prefix", "component"),
    [("lora_te", "text_encoder"), ("lora_te1", "text_encoder"), ("lora_te2", "text_encoder_2")],
)
def test_text_encoders(tmp_path, prefix, component):
    width = 1280 if prefix == "lora_te2" else 768
    module = f"{prefix}_text_model_encoder_layers_3_self_attn_q_proj"
    up, down = torch.randn(width, 2), torch.randn(2, width)
    save_file({f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}, tmp_path / "a.safetensors")
    assert list(load_adapter(tmp_path / "a.safetensors").layers) == [
        f"{component}.text_model.encoder.layers.3.self_attn.q_proj"
    ]


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_round_trip(tmp_path, bases, naming, dtype):
    tensors = {key: value.to(dtype) for key, value in lora_tensors(bases[0], alpha=4.0).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", bases[0])
    save_adapter(adapter, tmp_path / "b.safetensors", naming=naming)
    again = load_adapter(tmp_path / "b.safetensors", bases[0])
    assert again.layers.keys() == adapter.layers.keys()
    assert len(again.layers) == len(tensors) / 3
    assert again.naming == naming
    for name, layer in adapter.layers.items():
        assert again.layers[name].dtype == dtype
        assert torch.equal(again.layers[name].delta_weight(), layer.delta_weight())
    if naming == "kohya":
        written = load_file(tmp_path / "b.safetensors")
        assert written.keys() == tensors.keys()
        assert all(torch.equal(written[key], tensors[key]) for key in tensors)


def test_same_adapter_same_bytes_and_metadata_kept(tmp_path, bases, lora_file):
    adapter = load_adapter(lora_file, bases[0])
    for name in "ab":
        metadata = {**adapter.metadata, **{str(i): "x" for i in range(20)}}
        save_adapter(replace(adapter, metadata=metadata), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert load_adapter(tmp_path / "a", bases[0]).metadata["ss_tag_frequency"] == "kept"


def test_scale_of_alpha(tmp_path):
    module = f"lora_unet_{QKV.replace('.', '_')}_to_q"
    tensors = {f"{module}.lora_up.weight": UP, f"{module}.lora_down.weight": DOWN, f"{module}.alpha": torch.tensor(0.5)}
    save_file(tensors, tmp_path / "a.safetensors")
    for naming in ("kohya", "diffusers"):
        save_adapter(load_adapter(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", naming=naming)
        (layer,) = load_adapter(tmp_path / "b.safetensors").layers.values()
        torch.testing.assert_close(layer.delta_weight(), 0.25 * UP @ DOWN)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8}, 4.0),
        ({"lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 1}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"to_k": 1}}, 4.0),
        ({}, 1.0),
    ],
)
def test_scale_of_a_peft_folder(tmp_path, config, scale):
    key = f"base_model.model.{QKV}.to_q"
    save_file({f"{key}.lora_B.weight": UP, f"{key}.lora_A.weight": DOWN}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (layer,) = load_adapter(tmp_path / "adapter_model.safetensors").layers.values()
    assert layer.scale == pytest.approx(scale)


def test_nothing_is_dropped_in_silence(tmp_path):
    module = f"lora_unet_{QKV.replace('.', '_')}"
    tensors = {
        f"{module}_to_q.lora_up.weight": UP,
        f"{module}_to_q.lora_down.weight": DOWN,
        f"{module}_to_out_0.dora_scale": torch.ones(320, 1),
        f"{module}_to_out_0.set_weight": torch.ones(320, 1),
        f"{module}_to_k.lora_up.weight": UP,
        f"{module}_to_v.lora_up.weight": UP,
        f"{module}_to_v.lora_down.weight": torch.randn(3, 320),
        f"unet.{QKV}.to_q.lora_A.weight": DOWN,
        f"unet.{QKV}.to_q.lora_B.weight": UP,
        "something.else": torch.ones(3),
    }
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    used = {f"{module}_to_q.lora_up.weight", f"{module}_to_q.lora_down.weight"}
    other = {f"unet.{QKV}.to_q.lora_A.weight", f"unet.{QKV}.to_q.lora_B.weight"}
    assert len(adapter.layers) == 1
    assert set(adapter.unused) in (set(tensors) - used, set(tensors) - other)
    why = "\n".join(adapter.unused.values())
    for word in ("replaces a weight", "partner", "not two factors", "same layer", "not a part"):
        assert word in why


@pytest.mark.slow
def test_published_files(published, tmp_path):
    for path in published:
        adapter = load_adapter(path)
        assert (adapter.family.name, adapter.naming, len(adapter.layers)) == ("sd1", "indexed", 192)
        table = families()["sd1"].table
        assert all(own.layer.shape == table[name].shape for name, own in adapter.layers.items())
        raw = load_file(path)
        for component in ("unet", "text_encoder"):
            for i, layer in enumerate(indexed_layers(families()["sd1"], component)):
                expected = raw[f"{component}:{i}:up"].float() @ raw[f"{component}:{i}:down"].float()
                torch.testing.assert_close(adapter.layers[layer.name].delta_weight(), expected)
        save_adapter(adapter, tmp_path / "out.safetensors")
        assert load_adapter(tmp_path / "out.safetensors").metadata == {"format": "pt"}
        assert set(adapter.unused) == ({"<s1>", "<s2>"} if "disney" in path.name else set())


def test_indices_count_the_attention_of_diffusers_in_the_order_of_its_blocks(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    shapes = {name: tuple(module.weight.shape) for name, module in unet.named_modules() if hasattr(module, "weight")}
    block = diffusers.models.attention.BasicTransformerBlock
    blocks = [name for name, module in unet.named_modules() if isinstance(module, block)]
    # cloneofsimo/lora walks diffusers 0.10, where the feed-forward is between the two attentions
    parts = [f"attn1.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    parts += ["ff.net.0.proj", *(part.replace("attn1", "attn2") for part in parts)]
    names = [f"{block}.{part}" for block in blocks for part in parts]
    tensors = {}
    for i, name in enumerate(names):
        m, n = shapes[name]
        tensors |= {f"unet:{i}:up": torch.full((m, 1), 1.0 + i), f"unet:{i}:down": torch.ones(1, n)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert (adapter.family, adapter.naming) == (families()["sd1"], "indexed")
    assert {name: float(own.lora_up[0]) for name, own in adapter.layers.items()} == {
        f"unet.{name}": 1.0 + i for i, name in enumerate(names)
    }


def test_indexed_files_over_other_layers_are_refused(tmp_path):
    tensors = {"unet:0:up": UP, "unet:0:down": DOWN}
    save_file(tensors, tmp_path / "a.safetensors", {"unet": '["ResnetBlock2D", "CrossAttention"]'})
    with pytest.raises(FormatError, match="ResnetBlock2D"):
        load_adapter(tmp_path / "a.safetensors")


def test_lora_x_round_trip_is_exact_inside_its_family(tmp_path, bases):
    source = bases[0]
    generator = torch.Generator().manual_seed(5)
    layers = {
        name: LoraXLayer(layer, torch.randn(16, generator=generator), source.fingerprint(name))
        for name, layer in source.layers.items()
        if layer.is_attention
    }
    lora_x = Adapter("x", source.family, "lora-x", layers)
    save_adapter(lora_x, tmp_path / "x.safetensors")
    loaded = load_adapter(tmp_path / "x.safetensors", source)
    assert loaded.kind == "lora-x"
    assert all(torch.equal(loaded.layers[name].delta, own.delta) for name, own in layers.items())
    lora = convert_to_lora(loaded, source)
    for name, own in layers.items():
        U, _, Vh = torch.linalg.svd(source.weight(name).double(), full_matrices=False)
        naive = (U[:, :16] * own.delta.double()) @ Vh[:16]
        same(lora.layers[name].delta_weight(), naive)
    back, shares = convert_to_lora_x(lora, source, rank=16)
    for name, own in layers.items():
        same(back.layers[name].delta, own.delta)
        assert shares[name] == pytest.approx(1, abs=1e-4)


def test_paper_size_of_a_lora_x_file(tmp_path):
    """Method section 1: 128 attention projections of SD 1.5 times 320 float32 numbers, 0.16 MB."""
    table = families()["sd1"].table
    layers = {
        name: LoraXLayer(layer, torch.ones(320), "0" * 16)
        for name, layer in table.items()
        if layer.component == "unet" and layer.is_attention
    }
    assert len(layers) == 128
    save_adapter(Adapter("x", families()["sd1"], "lora-x", layers), tmp_path / "x.safetensors")
    size = (tmp_path / "x.safetensors").stat().st_size
    assert 163_840 < size < 163_840 + 40_000  # names and fingerprints come on top


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_is_named(tmp_path, bad):
    module = f"lora_unet_{QKV.replace('.', '_')}_to_q"
    save_file({f"{module}.lora_up.weight": UP * bad, f"{module}.lora_down.weight": DOWN}, tmp_path / "a.safetensors")
    with pytest.raises(NumericsError, match=f"{module}.lora_up.weight"):
        load_adapter(tmp_path / "a.safetensors")


def test_a_number_that_does_not_fit_the_dtype(tmp_path):
    module = f"lora_unet_{QKV.replace('.', '_')}_to_q"
    save_file({f"{module}.lora_up.weight": UP * 1e9, f"{module}.lora_down.weight": DOWN}, tmp_path / "a.safetensors")
    with pytest.raises(NumericsError, match="does not fit"):
        save_adapter(load_adapter(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", dtype=torch.float16)
    assert not (tmp_path / "b.safetensors").exists()


def test_not_an_adapter(tmp_path, bases):
    with pytest.raises(FormatError, match="no LoRA"):
        load_adapter(bases[0].files[0])
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(FormatError, match=r"\(none\)"):
        load_adapter(tmp_path / "empty.safetensors")


def test_unknown_naming_and_input_as_output(tmp_path, bases, lora_file):
    adapter = load_adapter(lora_file, bases[0])
    with pytest.raises(OptionError, match="naming"):
        save_adapter(adapter, tmp_path / "a", naming="a1111")
    with pytest.raises(OutputError, match="one of the inputs"):
        save_adapter(adapter, lora_file, inputs=[lora_file])


def test_lora_x_of_another_version_and_without_fingerprints(tmp_path):
    tensors = {f"unet.{QKV}.to_q.delta": torch.ones(4)}
    save_file(tensors, tmp_path / "a.safetensors", {"lorax_format_version": "9"})
    with pytest.raises(FormatError, match="9"):
        load_adapter(tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "a.safetensors", {"lorax_format_version": "1"})
    with pytest.raises(FormatError, match="fingerprints"):
        load_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("key", ["", "a", "unet:", "unet:x:up", "unet:1:sideways", ".alpha", *ROLES])
def test_odd_keys_do_not_break_the_parser(key):
    parse(key)


shapes = st.lists(st.integers(0, 3), max_size=5)
tensor = st.tuples(shapes, st.sampled_from(["f4", "f2", "i8"]))
parts = st.dictionaries(st.sampled_from([*ROLES, ".dora_scale"]), tensor)
modules = [*(module for module, _, _ in SPELLINGS.values()), "unet:0", "lora_te_x", f"{QKV}.attn2.to_k"]


@given(parts, st.sampled_from(modules))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shapes_give_an_adapter_or_one_of_our_errors(tmp_path, parts, module):
    tensors = {module + role: np.ones(shape, dtype) for role, (shape, dtype) in parts.items()}
    save_numpy(tensors, tmp_path / "a.safetensors")
    try:
        adapter = load_adapter(tmp_path / "a.safetensors")
    except LoraxError:
        return
    assert adapter.layers or adapter.unused
    for own in adapter.layers.values():
        if isinstance(own, LoraLayer):
            assert own.delta_weight().shape == own.layer.matrix_shape


def test_an_alpha_without_an_update_is_said(tmp_path):
    tensors = {"lora_unet_conv_in.lora_up.weight": torch.ones(8, 2, 1, 1)}
    tensors |= {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3),
        "lora_unet_conv_out.alpha": torch.ones(()),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert len(adapter.layers) == 1
    assert adapter.unused.keys() == {"lora_unet_conv_out.alpha"}


def test_an_alpha_stored_as_a_whole_number(tmp_path):
    module = f"lora_unet_{QKV.replace('.', '_')}_to_q"
    tensors = {f"{module}.lora_up.weight": UP, f"{module}.lora_down.weight": DOWN, f"{module}.alpha": torch.tensor(4)}
    save_file(tensors, tmp_path / "a.safetensors")
    (own,) = load_adapter(tmp_path / "a.safetensors").layers.values()
    assert own.scale == 2


# ------------------------------------------------------------------------------------- kinds, fused weights, bad layers

FLUX = "lora_unet_double_blocks_3_img_attn"
GUARD = {f"{FLUX}_proj.lora_up.weight": torch.ones(8, 2), f"{FLUX}_proj.lora_down.weight": torch.ones(2, 8)}
# FLUX.1 and HunyuanVideo have it, the latter without T5.
MODULATION = "lora_unet_single_blocks_3_modulation_lin"
GUARD |= {f"{MODULATION}.lora_up.weight": torch.ones(24, 2), f"{MODULATION}.lora_down.weight": torch.ones(2, 8)}


def saved(path, tensors, **kwargs):
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, **kwargs)
    return path


MODULE = f"lora_unet_{QKV.replace('.', '_')}_to_q"
KINDS = {
    "lora": {"lora_up.weight": randn(320, 2), "lora_down.weight": randn(2, 320), "alpha": torch.tensor(1.5)},
    "dora": {"lora_up.weight": randn(320, 2), "lora_down.weight": randn(2, 320), "dora_scale": randn(1, 320)},
    "loha": {f"hada_w{i}_{x}": randn(*s) for i in "12" for x, s in (("a", (320, 2)), ("b", (2, 320)))},
    "lokr": {"lokr_w1": randn(16, 16), "lokr_w2_a": randn(20, 2), "lokr_w2_b": randn(2, 20)},
    "lokr of whole factors": {"lokr_w1": randn(16, 16), "lokr_w2": randn(20, 20), "alpha": torch.tensor(3.0)},
    "glora": {f"{x}{i}.weight": randn(*((320, 2) if i == 1 else (2, 320))) for x in "ab" for i in (1, 2)},
    "oft": {"oft_blocks": randn(40, 8, 8), "alpha": torch.tensor(0.0)},
    "boft": {"oft_blocks": randn(3, 40, 8, 8), "alpha": torch.tensor(0.0)},
    "diff": {"diff": randn(320, 320)},
    "foura": {"foura_up.weight": randn(320, 3), "foura_down.weight": randn(3, 320), "foura_gate": randn(3)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_kept_bit_by_bit(tmp_path, kind, dtype):
    tensors = {f"{MODULE}.{part}": tensor.to(dtype) for part, tensor in KINDS[kind].items()}
    adapter = load_adapter(saved(tmp_path / "a.safetensors", tensors))
    assert (adapter.kind, list(adapter.layers)) == (kind.split()[0], [f"unet.{QKV}.to_q"])
    save_adapter(adapter, tmp_path / "b.safetensors")
    written = load_file(tmp_path / "b.safetensors")
    assert written.keys() - tensors.keys() <= {f"{MODULE}.alpha"}
    for key, tensor in tensors.items():
        assert written[key].dtype == dtype
        assert torch.equal(written[key].float(), tensor.float())


def test_the_differences_of_norms_and_biases(tmp_path, bases):
    block = "down_blocks.0.resnets.0"
    flat = f"lora_unet_{block.replace('.', '_')}"
    tensors = {
        f"{flat}_norm1.w_norm": randn(32),
        f"{flat}_norm1.b_norm": randn(32),
        f"{flat}_norm2.b_norm": randn(32),
        f"{flat}_norm2.diff": randn(32),
        f"{flat}_conv1.diff": randn(32, 32, 3, 3),
        f"{flat}_conv1.diff_b": randn(32),
    }
    adapter = load_adapter(saved(tmp_path / "a.safetensors", tensors), bases[0])
    names = {f"unet.{block}.{n}" for n in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "conv1.bias")}
    assert adapter.layers.keys() == names | {f"unet.{block}.conv1"}
    assert names <= bases[0].vectors.keys()
    assert adapter.kind == "diff"
    save_adapter(adapter, tmp_path / "b.safetensors")
    # ComfyUI reads b_norm only beside w_norm.
    expected = {key.replace("norm2.b_norm", "norm2.diff_b"): tensor for key, tensor in tensors.items()}
    written = load_file(tmp_path / "b.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in written)


def test_a_bias_of_peft_has_the_scale_of_its_update(tmp_path):
    key = f"base_model.model.{QKV}.to_q"
    tensors = {f"{key}.lora_B.weight": UP, f"{key}.lora_A.weight": DOWN, f"{key}.lora_B.bias": randn(320)}
    saved(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "r": 2}))
    layers = load_adapter(tmp_path / "adapter_model.safetensors").layers
    torch.testing.assert_close(layers[f"unet.{QKV}.to_q.bias"].delta_weight(), 3 * randn(320)[:, None])


def test_a_magnitude_of_peft_is_per_output_even_where_the_layer_is_square(tmp_path):
    key = f"base_model.model.{QKV}.to_q"
    tensors = {f"{key}.lora_B.weight": UP, f"{key}.lora_A.weight": DOWN}
    adapter = load_adapter(
        saved(tmp_path / "a.safetensors", tensors | {f"{key}.lora_magnitude_vector": randn(320).abs().reshape(1, 320)})
    )
    (own,) = adapter.layers.values()
    assert own.kind == "dora"
    assert own.dora_scale.shape == (320, 1)


def test_a_whole_lokr_of_peft_is_scaled(tmp_path):
    key = f"base_model.model.{QKV}.to_q"
    tensors = {f"{key}.lokr_w1": randn(16, 16), f"{key}.lokr_w2": randn(20, 20)}
    saved(tmp_path / "adapter_model.safetensors", tensors)
    for config, scale in (({}, 1.0), ({"alpha": 4, "r": 32}, 1 / 8)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        (own,) = load_adapter(tmp_path / "adapter_model.safetensors").layers.values()
        torch.testing.assert_close(own.delta_weight(), torch.kron(randn(16, 16), randn(20, 20)) * scale)


# The families whose blocks have this name.
SHARED_NAMES = "Chroma, FLUX.1, FLUX.2, HunyuanVideo or HunyuanVideo 1.5"


@pytest.mark.parametrize("naming", ["kohya", "original"])
def test_a_fused_weight_is_cut_and_put_together_again(tmp_path, naming):
    module = f"{FLUX}_qkv" if naming == "kohya" else "diffusion_model.double_blocks.3.img_attn.qkv"
    up, down = ("lora_up", "lora_down") if naming == "kohya" else ("lora_B", "lora_A")
    tensors = {f"{module}.{up}.weight": randn(24, 2), f"{module}.{down}.weight": randn(2, 8)}
    if naming == "kohya":
        tensors[f"{module}.alpha"] = torch.tensor(1.0)
    adapter = load_adapter(saved(tmp_path / "a.safetensors", tensors))
    names = [f"transformer.transformer_blocks.3.attn.to_{part}" for part in "qkv"]
    assert (adapter.family_label, adapter.naming, list(adapter.layers)) == (SHARED_NAMES, naming, names)
    whole = torch.cat([own.delta_weight() for own in adapter.layers.values()])
    torch.testing.assert_close(whole, tensors[f"{module}.{up}.weight"] @ randn(2, 8) / (2 if naming == "kohya" else 1))
    save_adapter(adapter, tmp_path / "b.safetensors")
    written = load_file(tmp_path / "b.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)
    # Without one of its parts the rest of the whole is zero.
    less = replace(adapter, layers={name: adapter.layers[name] for name in names[::2]})
    save_adapter(less, tmp_path / "c.safetensors")
    assert load_file(tmp_path / "c.safetensors").keys() == tensors.keys()
    again = [own.delta_weight() for own in load_adapter(tmp_path / "c.safetensors").layers.values()]
    torch.testing.assert_close(
        torch.cat(again), whole * torch.ones(3, 8).index_fill_(0, torch.tensor([1]), 0).reshape(24, 1)
    )


def test_a_diffusers_file_becomes_a_kohya_file_without_loss(tmp_path):
    """The parts have factors of their own, so the whole has the rank of their sum."""
    names = [f"transformer.single_transformer_blocks.37.attn.to_{part}" for part in "qkv"]
    names += ["transformer.single_transformer_blocks.37.proj_mlp"]
    rows = [8, 8, 8, 32]
    tensors = {f"{n}.lora_B.weight": randn(rows[i], 2, seed=i) for i, n in enumerate(names)}
    tensors |= {f"{n}.lora_A.weight": randn(2, 8, seed=9 + i) for i, n in enumerate(names)}
    adapter = load_adapter(saved(tmp_path / "a.safetensors", tensors))
    save_adapter(adapter, tmp_path / "b.safetensors", naming="kohya")
    written = load_file(tmp_path / "b.safetensors")
    assert {key.partition(".")[0] for key in written} == {"lora_unet_single_blocks_37_linear1"}
    assert written["lora_unet_single_blocks_37_linear1.lora_down.weight"].shape == (8, 8)
    again = load_adapter(tmp_path / "b.safetensors")
    for name in names:
        torch.testing.assert_close(again.layers[name].delta_weight(), adapter.layers[name].delta_weight())


def test_what_cannot_be_cut_stays_whole(tmp_path):
    tensors = {f"{FLUX}_qkv.lokr_w1": randn(4, 2), f"{FLUX}_qkv.lokr_w2": randn(6, 4)}
    adapter = load_adapter(saved(tmp_path / "a.safetensors", tensors))
    (own,) = adapter.layers.values()
    assert (own.layer.name, own.layer.shape) == ("transformer.double_blocks.3.img_attn.qkv", (24, 8))
    for naming in ("kohya", "original", "diffusers"):
        save_adapter(adapter, tmp_path / "b.safetensors", naming=naming)
        module = f"{FLUX}_qkv" if naming == "kohya" else "diffusion_model.double_blocks.3.img_attn.qkv"
        assert {key.rpartition(".")[0] for key in load_file(tmp_path / "b.safetensors")} == {module}
        assert load_adapter(tmp_path / "b.safetensors").layers.keys() == adapter.layers.keys()


FUSED = {
    "lora": {"lora_up.weight": randn(24, 2), "lora_down.weight": randn(2, 8), "alpha": torch.tensor(1.0)},
    "dora": {"lora_up.weight": randn(24, 2), "lora_down.weight": randn(2, 8), "dora_scale": randn(24, 1)},
    "dora, by inputs": {"lora_up.weight": randn(24, 2), "lora_down.weight": randn(2, 8), "dora_scale": randn(1, 8)},
    "loha": {f"hada_w{i}_{x}": randn(*s) for i in "12" for x, s in (("a", (24, 2)), ("b", (2, 8)))},
    "lokr": {"lokr_w1": randn(4, 2), "lokr_w2": randn(6, 4)},
    "oft": {"oft_blocks": randn(3, 8, 8), "alpha": torch.tensor(0.0)},
    "oft of another size": {"oft_blocks": randn(2, 8, 8)},
    "diff": {"diff": randn(24, 8)},
    "another size": {"lora_up.weight": randn(20, 2), "lora_down.weight": randn(2, 8)},
}


@pytest.mark.parametrize("module", [f"{FLUX}_qkv", "lora_unet_transformer_blocks_3_attn_to_q", "dit.unheard.of"])
@pytest.mark.parametrize("kind", FUSED)
def test_read_without_its_base_an_adapter_becomes_there_what_it_is_with_it(tmp_path, kind, module):
    """Cut or whole, of another size, of no layer, with what cannot be read: when the base comes does not count."""
    shapes = {f"double_blocks.{i}.img_attn.qkv": (24, 8) for i in range(4)} | {"double_blocks.0.img_mod.lin": (48, 8)}
    shapes |= {"single_blocks.0.linear1": (56, 8), "txt_in": (8, 16)}
    parameters = {f"{path}.weight": shape for path, shape in shapes.items()}
    parameters["double_blocks.3.img_attn.qkv.bias"] = (24,)
    base = loaded_base("flux", parameters, {}, lambda layer: torch.zeros(layer.shape))
    tensors = {f"{module}.{part}": tensor for part, tensor in FUSED[kind].items()} | {f"{FLUX}_qkv.diff_b": randn(24)}
    tensors |= {
        f"{FLUX}_proj.lora_up.weight": randn(8, 2),
        "lora_unet_double_blocks_2_img_attn_qkv.diff": randn(24, 8),
    }
    path = saved(tmp_path / "a.safetensors", tensors)
    ours, node = load_adapter(path, base), load_adapter(path).resolved(base)
    assert (node.family, node.unused, node.unread) == (ours.family, ours.unused, ours.unread)
    assert list(node.layers) == list(ours.layers)
    for name, own in ours.layers.items():
        assert node.layers[name].layer == own.layer
        parts = node.layers[name].parts()
        assert parts.keys() == own.parts().keys()
        assert all(torch.equal(parts[part], tensor) for part, tensor in own.parts().items())
    assert list(node.resolved(base).layers) == list(ours.layers)


@pytest.mark.parametrize("is_known", [True, False])
def test_layers_that_are_changed_in_memory_are_what_counts(tmp_path, is_known):
    """One part of a fused update is made stronger, one is taken out: the file does not bring them back."""
    shapes = {"double_blocks.0.img_attn.qkv": (24, 8), "double_blocks.0.img_attn.proj": (8, 8)}
    shapes |= {"double_blocks.0.img_mod.lin": (48, 8), "single_blocks.0.linear1": (56, 8), "txt_in": (8, 16)}
    parameters = {f"{path}.weight": shape for path, shape in shapes.items()}
    base = loaded_base("flux", parameters, {}, lambda layer: torch.zeros(layer.shape))
    tensors = {f"lora_unet_double_blocks_0_img_attn_qkv.{part}": tensor for part, tensor in FUSED["lora"].items()}
    tensors |= {"transformer.transformer_blocks.0.attn.to_q.diff": randn(8, 8, seed=1)}
    tensors |= {"lora_unet_double_blocks_0_img_attn_proj.diff": randn(8, 8)}
    adapter = load_adapter(saved(tmp_path / "a.safetensors", tensors), base if is_known else None)
    q, k, v, out = (f"transformer.transformer_blocks.0.attn.to_{part}" for part in ("q", "k", "v", "out.0"))
    stronger = replace(adapter.layers[v], alpha=3.0)
    layers = {q: adapter.layers[q], v: stronger, out: adapter.layers[out]}
    found = replace(adapter, layers=layers).resolved(base).layers
    assert found.keys() == layers.keys()
    for name, own in layers.items():
        same(found[name].delta_weight(), own.delta_weight())
    torch.testing.assert_close(found[v].delta_weight(), 3 * adapter.layers[v].delta_weight())
    assert replace(adapter, layers={k: adapter.layers[k]}).resolved(base).layers.keys() == {k}


@pytest.mark.parametrize(
    ("prefix", "naming", "name"),
    [
        (
            "lora_transformer_transformer_blocks_18_attn_to_q",
            "onetrainer",
            "transformer.transformer_blocks.18.attn.to_q",
        ),
        ("lycoris_transformer_blocks_18_attn_to_q", "simpletuner", "transformer.transformer_blocks.18.attn.to_q"),
        ("transformer.transformer_blocks.18.attn.to_q", "diffusers", "transformer.transformer_blocks.18.attn.to_q"),
        ("base_model.model.transformer_blocks.18.attn.to_q", "peft", "transformer.transformer_blocks.18.attn.to_q"),
        ("double_blocks.18.img_attn.proj", "diffusers", "transformer.transformer_blocks.18.attn.to_out.0"),
        (
            "diffusion_model.double_blocks.18.img_attn.proj",
            "original",
            "transformer.transformer_blocks.18.attn.to_out.0",
        ),
    ],
)
def test_spellings_of_a_transformer(tmp_path, prefix, naming, name):
    tensors = {f"{prefix}.lora_up.weight": randn(8, 2), f"{prefix}.lora_down.weight": randn(2, 8)}
    adapter = load_adapter(saved(tmp_path / "a.safetensors", tensors))
    assert (adapter.naming, list(adapter.layers)) == (naming, [name])
    save_adapter(adapter, tmp_path / "b.safetensors")
    assert list(load_adapter(tmp_path / "b.safetensors").layers) == [name]
    if naming in ("onetrainer", "simpletuner"):
        assert {key.partition(".")[0] for key in load_file(tmp_path / "b.safetensors")} == {prefix}


def test_xlabs_names_the_attention_by_number(tmp_path):
    key = "double_blocks.3.processor.proj_lora2"
    adapter = load_adapter(
        saved(tmp_path / "a.safetensors", {f"{key}.down.weight": randn(2, 8), f"{key}.up.weight": randn(8, 2)})
    )
    assert list(adapter.layers) == ["transformer.transformer_blocks.3.attn.to_add_out"]


@pytest.mark.parametrize(
    ("prefix", "component"),
    [
        ("lora_te3_encoder_block_2_layer_0_SelfAttention_q", "text_encoder_2"),
        ("text_encoders.t5xxl.transformer.encoder.block.2.layer.0.SelfAttention.q", "text_encoder_2"),
    ],
)
def test_the_t5_of_a_family(tmp_path, prefix, component):
    tensors = {f"{prefix}.lora_up.weight": randn(4096, 1), f"{prefix}.lora_down.weight": randn(1, 4096)}
    adapter = load_adapter(saved(tmp_path / "a.safetensors", tensors | GUARD))
    assert f"{component}.encoder.block.2.layer.0.SelfAttention.q" in adapter.layers


def test_the_first_text_encoder_of_kohya_is_the_second_of_hunyuan_video(tmp_path):
    """The first, a LLaVA, has no table; ComfyUI reads lora_te1 as CLIP-L, too."""
    tensors = {}
    for module, width in (
        ("lora_unet_txt_in_individual_token_refiner_blocks_0_self_attn_qkv", 8),
        ("lora_unet_txt_in_individual_token_refiner_blocks_1_self_attn_qkv", 8),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 768),
    ):
        tensors |= {f"{module}.lora_up.weight": randn(3 * 8 if width == 8 else width, 1)}
        tensors |= {f"{module}.lora_down.weight": randn(1, width), f"{module}.alpha": torch.tensor(1.0)}
    adapter = load_adapter(saved(tmp_path / "a.safetensors", tensors))
    assert "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj" in adapter.layers
    save_adapter(adapter, tmp_path / "b.safetensors", naming="kohya")
    assert load_file(tmp_path / "b.safetensors").keys() == tensors.keys()


BAD = {
    "NaN": ({"lora_up.weight": UP * float("nan"), "lora_down.weight": DOWN}, "NaN"),
    "kinds": ({"lora_up.weight": UP, "lora_down.weight": DOWN, "lokr_w1": DOWN}, "several kinds"),
    "alpha NaN": ({"lora_up.weight": UP, "lora_down.weight": DOWN, "alpha": torch.tensor(float("inf"))}, "NaN or Inf"),
    "alpha": ({"lora_up.weight": UP, "lora_down.weight": DOWN, "alpha": torch.ones(3)}, "not a number"),
    "half": ({"lora_up.weight": UP}, "partner"),
    "gate": (
        {"foura_up.weight": UP, "foura_down.weight": DOWN, "foura_gate": torch.ones(3)},
        "not the length of the rank",
    ),
    "magnitude": ({"lora_up.weight": UP, "lora_down.weight": DOWN, "dora_scale": torch.ones(7, 1)}, "no magnitude"),
    "padded": ({"lora_up.weight": UP, "lora_down.weight": DOWN, "reshape_weight": torch.ones(2)}, "reshape_weight"),
    "magnitude alone": ({"dora_scale": torch.ones(320, 1)}, "alone"),
}


@pytest.mark.parametrize(("parts", "words"), BAD.values(), ids=BAD)
def test_a_bad_layer_is_listed_and_the_good_ones_go_on(tmp_path, parts, words):
    good = MODULE.replace("to_q", "to_v")
    tensors = {f"{MODULE}.{part}": tensor for part, tensor in parts.items()}
    saved(tmp_path / "bad.safetensors", tensors)
    both = saved(
        tmp_path / "both.safetensors", tensors | {f"{good}.lora_up.weight": UP, f"{good}.lora_down.weight": DOWN}
    )
    adapter = load_adapter(both)
    assert list(adapter.layers) == [f"unet.{QKV}.to_v"]
    assert adapter.unused.keys() == {key for key in tensors if not key.endswith(".alpha")}
    assert all(words in why for why in adapter.unused.values())
    with pytest.raises((FormatError, NumericsError), match=MODULE) as strict:
        load_adapter(both, strict=True)
    with pytest.raises(strict.type, match=words) as alone:
        load_adapter(tmp_path / "bad.safetensors")
    assert (alone.value.what, alone.value.fix) == (strict.value.what, strict.value.fix)


def test_an_alpha_of_0_is_an_update_without_effect_and_is_said(tmp_path):
    tensors = {f"{MODULE}.lora_up.weight": UP, f"{MODULE}.lora_down.weight": DOWN, f"{MODULE}.alpha": torch.tensor(0.0)}
    adapter = load_adapter(saved(tmp_path / "a.safetensors", tensors), strict=True)
    (own,) = adapter.layers.values()
    assert not own.delta_weight().any()
    assert list(adapter.unused) == [f"{MODULE}.alpha"]
    save_adapter(adapter, tmp_path / "b.safetensors")
    assert float(load_file(tmp_path / "b.safetensors")[f"{MODULE}.alpha"]) == 0


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("oft_R.weight", "rotation of PEFT"),
        ("boft_R", "rotation of PEFT"),
        ("set_weight", "replaces"),
        ("on_input", "IA"),
        ("bm.weight", "GLoRA"),
    ],
)
def test_what_is_not_read_has_a_reason(tmp_path, key, words):
    tensors = {f"{MODULE}.lora_up.weight": UP, f"{MODULE}.lora_down.weight": DOWN, f"{MODULE}.{key}": randn(2, 3)}
    unused = load_adapter(saved(tmp_path / "a.safetensors", tensors)).unused
    assert words in unused[f"{MODULE}.{key}"]
