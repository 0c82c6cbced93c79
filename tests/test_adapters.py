"""Adapter files: round trips, what is not used, and files that are broken."""

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
from lorax.adapters.keys import ROLES, indexed_layers
from lorax.models.families import families
from tests.adapter_files import DOWN, MODULE, QKV, SPELLINGS, UP, saved
from tests.tensors import lora_tensors, randn, same


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
