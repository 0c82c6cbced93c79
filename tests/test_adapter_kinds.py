"""Kinds of adapters in files: each is kept, cut where it is of a fused weight, and put together again."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lorax import load_adapter, save_adapter
from lorax.models.base import loaded_base
from tests.adapter_files import DOWN, FLUX, MODULE, QKV, UP, saved
from tests.tensors import randn, same

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
