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
from lorax.families import families
from tests.conftest import lora_tensors

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


@pytest.mark.parametrize(("module", "up", "down"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_means_the_same_layer(tmp_path, module, up, down):
    save_file({f"{module}.{up}": UP, f"{module}.{down}": DOWN}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert list(adapter.layers) == [f"unet.{QKV}.to_q"]
    assert adapter.family.name == "sd1"
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
        torch.testing.assert_close(lora.layers[name].delta_weight().double(), naive, rtol=0, atol=1e-4)
    back, shares = convert_to_lora_x(lora, source, rank=16)
    for name, own in layers.items():
        torch.testing.assert_close(back.layers[name].delta, own.delta, rtol=0, atol=1e-4)
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


def test_an_alpha_stored_as_a_whole_number(tmp_path):
    module = f"lora_unet_{QKV.replace('.', '_')}_to_q"
    tensors = {f"{module}.lora_up.weight": UP, f"{module}.lora_down.weight": DOWN, f"{module}.alpha": torch.tensor(4)}
    save_file(tensors, tmp_path / "a.safetensors")
    (own,) = load_adapter(tmp_path / "a.safetensors").layers.values()
    assert own.scale == 2
