"""Keys that programs write beside the usual ones: each means the same layer, and the same numbers."""

import re
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorax import FormatError, load_adapter, open_base, save_adapter
from lorax.models.base import module_base
from tests.tensors import same

G = torch.Generator().manual_seed(0)
# Module of the original naming -> the diffusers paths that it is.
FLUX = {
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    "double_blocks.1.img_mlp.0": ["transformer_blocks.1.ff.net.0.proj"],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
}
CLIP = "encoder.layers.3.self_attn.q_proj"


@cache
def flux():
    """A narrow FLUX.1 of two blocks of each kind, without numbers."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(
            num_layers=2, num_single_layers=2, num_attention_heads=2, attention_head_dim=32, joint_attention_dim=96,
            pooled_projection_dim=48, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
        )  # fmt: skip
    return module_base(model)


def size(paths):
    layers = [flux().layers[f"transformer.{path}"] for path in paths]
    return sum(layer.shape[0] for layer in layers), layers[0].shape[1]


def pair(module, rows, columns, style="kohya", rank=2):
    """Return a LoRA of a module as tensors, and its update."""
    up, down = torch.randn(rows, rank, generator=G), torch.randn(rank, columns, generator=G)
    ends = {
        "kohya": (".lora_up.weight", ".lora_down.weight"),
        "peft": (".lora_B.weight", ".lora_A.weight"),
        "xlabs": (".up.weight", ".down.weight"),
    }[style]
    return {module + ends[0]: up, module + ends[1]: down}, up @ down


def read(folder, tensors, base=None, **kwargs):
    save_file(tensors, folder / "a.safetensors")
    return load_adapter(folder / "a.safetensors", base, **kwargs)


@pytest.mark.parametrize(
    "prefix",
    [
        "Hunyuan_video_I2V_lora_",
        "lora_unet__orig_mod_",
        "diffusion_model.transformer.",
        "diffusion_model.model.",
        "base_model.model.transformer.",
        "base_model.model.diffusion_model.",
        "module.",
        "module.module.",
        "_orig_mod.",
        "_fsdp_wrapped_module.",
        "module._orig_mod.",
        "base_model.model._orig_mod.module.",
        "transformer._orig_mod.",
        "model.diffusion_model._orig_mod.",
        "pipe.dit.",
    ],
)
def test_prefixes_around_a_path_that_is_known(tmp_path, prefix):
    tensors, expected = {}, {}
    for module, paths in FLUX.items():
        spelled = module if prefix.endswith(".") else module.replace(".", "_")
        added, update = pair(prefix + spelled, *size(paths))
        tensors |= added
        expected |= dict(zip(paths, update.chunk(len(paths)), strict=True))
    adapter = read(tmp_path, tensors, flux())
    assert adapter.layers.keys() == {f"transformer.{path}" for path in expected}
    assert not adapter.unused
    for path, update in expected.items():
        torch.testing.assert_close(adapter.layers[f"transformer.{path}"].delta_weight(), update)


def test_wrappers_within_a_path(tmp_path):
    flat, update = pair("lora_unet_double_blocks_1__orig_mod_img_mlp_0", *size(FLUX["double_blocks.1.img_mlp.0"]))
    dotted, other = pair(
        "transformer.transformer_blocks.0._checkpoint_wrapped_module.attn.to_out.0", 64, 64, style="peft"
    )
    layers = read(tmp_path, flat | dotted, flux()).layers
    torch.testing.assert_close(layers["transformer.transformer_blocks.1.ff.net.0.proj"].delta_weight(), update)
    torch.testing.assert_close(layers["transformer.transformer_blocks.0.attn.to_out.0"].delta_weight(), other)


@pytest.mark.parametrize("name", ["default", "default_0", "my_style", "3"])
def test_any_name_of_an_adapter_in_keys_of_peft(tmp_path, name):
    module = "base_model.model.transformer_blocks.0.attn.to_q"
    tensors = {
        f"{module}.lora_A.{name}.weight": torch.randn(2, 64),
        f"{module}.lora_B.{name}.weight": torch.randn(64, 2),
    }
    tensors |= {
        f"{module}.lora_B.{name}.bias": torch.randn(64),
        f"{module}.lora_magnitude_vector.{name}": torch.ones(64),
    }
    adapter = read(tmp_path, tensors, flux())
    assert sorted(own.kind for own in adapter.layers.values()) == ["dora", "vector"]
    assert not adapter.unused
    hada = {f"hada_w{i}_{side}": (64, 2) if side == "a" else (2, 64) for i in (1, 2) for side in "ab"}
    tensors = {f"{module}.{part}.{name}": torch.randn(shape) for part, shape in hada.items()}
    assert [own.kind for own in read(tmp_path, tensors, flux()).layers.values()] == ["loha"]


def test_xlabs_and_uso_have_the_attention_of_single_blocks_apart(tmp_path):
    """In ComfyUI `qkv_lora` becomes `linear1_qkv`, the attention rows of linear1, and `proj_lora` linear2."""
    block = "single_blocks.1.processor"
    tensors, qkv = pair(f"{block}.qkv_lora", 192, 64, style="xlabs")
    proj, out = pair(f"{block}.proj_lora", *size(FLUX["single_blocks.0.linear2"]), style="xlabs")
    double, other = pair("double_blocks.0.processor.qkv_lora2", 192, 64, style="xlabs")
    layers = read(tmp_path, tensors | proj | double, flux()).layers
    single = "transformer.single_transformer_blocks.1"
    torch.testing.assert_close(torch.cat([layers[f"{single}.attn.to_{p}"].delta_weight() for p in "qkv"]), qkv)
    torch.testing.assert_close(layers[f"{single}.proj_out"].delta_weight(), out)
    added = [layers[f"transformer.transformer_blocks.0.attn.add_{p}_proj"].delta_weight() for p in "qkv"]
    torch.testing.assert_close(torch.cat(added), other)
    assert len(layers) == 7


@pytest.mark.parametrize(
    ("prefix", "component"),
    [
        ("text_encoder.", "text_encoder"),
        ("text_encoder_2.", "text_encoder_2"),
        ("lora_te_", "text_encoder"),
        ("lora_te1_", "text_encoder"),
        ("lora_te2_", "text_encoder_2"),
        ("base_model.model.", "text_encoder"),
        ("text_encoders.clip_l.transformer.", "text_encoder"),
        ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ],
)
@pytest.mark.parametrize("start", ["", "text_model."])
def test_clip_as_transformers_names_it_before_and_since_version_5(tmp_path, prefix, component, start):
    path = start + CLIP if prefix.endswith(".") else (start + CLIP).replace(".", "_")
    width = 1280 if component == "text_encoder_2" else 768
    tensors, update = pair(prefix + path, width, width)
    (layer,) = read(tmp_path, tensors).layers.values()
    assert layer.layer.name == f"{component}.text_model.{CLIP}"
    torch.testing.assert_close(layer.delta_weight(), update)


@pytest.mark.parametrize("prefix", ["text_conditioner.", "diffusion_model.llm_adapter.", "lora_unet_llm_adapter_"])
def test_the_text_conditioner_of_anima_is_its_llm_adapter(tmp_path, prefix):
    """One component of two in diffusers, a part of the model in ComfyUI and kohya's scripts."""
    path = "blocks.0.self_attn.q_proj" if prefix.endswith(".") else "blocks_0_self_attn_q_proj"
    tensors, update = pair(prefix + path, 32, 32, style="peft")
    tensors |= pair("transformer.transformer_blocks.27.norm1.linear_1", 8, 32, style="peft")[0]
    adapter = read(tmp_path, tensors)
    assert adapter.family.name == "anima"
    torch.testing.assert_close(
        adapter.layers["transformer.llm_adapter.blocks.0.self_attn.q_proj"].delta_weight(), update
    )
    save_adapter(adapter, tmp_path / "b.safetensors", naming="diffusers")
    assert "text_conditioner.blocks.0.self_attn.q_proj.lora_A.weight" in load_file(tmp_path / "b.safetensors")
    save_adapter(adapter, tmp_path / "b.safetensors", naming="original")
    assert "diffusion_model.llm_adapter.blocks.0.self_attn.q_proj.lora_A.weight" in load_file(
        tmp_path / "b.safetensors"
    )


@pytest.mark.parametrize(
    ("fused", "paths"),
    [
        ("transformer_blocks.0.attn.to_qkv", [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]),
        ("transformer_blocks.0.attn.to_added_qkv", [f"transformer_blocks.0.attn.add_{p}_proj" for p in "qkv"]),
        ("single_transformer_blocks.1.attn.to_qkv", [f"single_transformer_blocks.1.attn.to_{part}" for part in "qkv"]),
    ],
)
@pytest.mark.parametrize("naming", ["transformer.", "lora_transformer_", "transformer.model."])
def test_what_diffusers_fuses_and_the_base_has_apart(tmp_path, fused, paths, naming):
    """`fuse_qkv_projections` of diffusers' models."""
    module = naming + (fused if naming.endswith(".") else fused.replace(".", "_"))
    tensors, update = pair(module, 192, 64)
    layers = read(tmp_path, tensors, flux()).layers
    torch.testing.assert_close(torch.cat([layers[f"transformer.{path}"].delta_weight() for path in paths]), update)
    assert len(layers) == 3


# diffusers' norm_out.linear makes scale and shift, the original final layer shift and scale.
FINAL = {
    "lora_unet_final_layer_adaLN_modulation_1": False,
    "diffusion_model.final_layer.adaLN_modulation.1": False,
    "transformer.norm_out.linear": True,
    "lora_transformer_norm_out_linear": True,
    "lycoris_norm_out_linear": True,
    "base_model.model.norm_out.linear": True,
}


def halves_swapped(update):
    return torch.cat(update.chunk(2)[::-1])


def narrow_flux(seed=0):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    return diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=32, joint_attention_dim=96,
        pooled_projection_dim=48, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "diff"])
@pytest.mark.parametrize(("module", "is_diffusers"), FINAL.items(), ids=FINAL)
def test_shift_and_scale_of_the_final_layer_are_in_the_original_order(tmp_path, module, is_diffusers, kind):
    tensors = {
        "lora": {"lora_up.weight": (128, 2), "lora_down.weight": (2, 64)},
        "loha": {"hada_w1_a": (128, 2), "hada_w1_b": (2, 64), "hada_w2_a": (128, 2), "hada_w2_b": (2, 64)},
        "lokr": {"lokr_w1": (4, 4), "lokr_w2": (32, 16)},
        "diff": {"diff": (128, 64)},
    }[kind]
    tensors = {part: torch.randn(shape, generator=G) for part, shape in tensors.items()}
    update = {
        "lora": lambda up, down: up @ down,
        "loha": lambda a, b, c, d: (a @ b) * (c @ d),
        "lokr": torch.kron,
        "diff": lambda diff: diff,
    }[kind](*tensors.values())
    adapter = read(tmp_path, {f"{module}.{part}": tensor for part, tensor in tensors.items()}, flux())
    own = adapter.layers["transformer.norm_out.linear"]
    torch.testing.assert_close(own.delta_weight(), halves_swapped(update) if is_diffusers else update)
    for naming, name in (
        ("kohya", "lora_unet_final_layer_adaLN_modulation_1"),
        ("original", "diffusion_model.final_layer.adaLN_modulation.1"),
        ("diffusers", "transformer.norm_out.linear"),
    ):
        save_adapter(adapter, tmp_path / "b.safetensors", naming=naming)
        assert any(key.startswith(f"{name}.") for key in load_file(tmp_path / "b.safetensors"))
        again = load_adapter(tmp_path / "b.safetensors", flux()).layers["transformer.norm_out.linear"]
        torch.testing.assert_close(again.delta_weight(), own.delta_weight())


def test_a_bias_of_the_final_layer_too(tmp_path):
    diff = torch.arange(128.0)
    tensors = {"transformer.norm_out.linear.diff_b": diff} | pair("transformer.proj_out", 16, 64)[0]
    adapter = read(tmp_path, tensors, flux())
    own = adapter.layers["transformer.norm_out.linear.bias"]
    assert torch.equal(own.diff, halves_swapped(diff))
    save_adapter(adapter, tmp_path / "b.safetensors", naming="original")
    assert torch.equal(
        load_file(tmp_path / "b.safetensors")["diffusion_model.final_layer.adaLN_modulation.1.diff_b"], own.diff
    )
    save_adapter(adapter, tmp_path / "b.safetensors", naming="diffusers")
    assert torch.equal(load_file(tmp_path / "b.safetensors")["transformer.norm_out.linear.diff_b"], diff)


def test_a_base_has_the_same_weights_in_both_namings(tmp_path):
    model = narrow_flux()
    ours = module_base(model)
    tensors = {}
    for layer in sorted(ours.layers.values(), key=lambda layer: layer.rows or (0, 0)):
        tensors.setdefault(f"model.diffusion_model.{layer.original}.weight", []).append(ours.weight(layer.name))
    save_file({key: torch.cat(parts).clone() for key, parts in tensors.items()}, tmp_path / "original.safetensors")
    save_file(model.state_dict(), tmp_path / "diffusers.safetensors")
    first, second = (open_base(tmp_path / f"{name}.safetensors") for name in ("original", "diffusers"))
    assert first.layers.keys() == second.layers.keys()
    assert all(torch.equal(first.weight(name), second.weight(name)) for name in first.layers)
    final = model.norm_out.linear.weight.detach()
    assert torch.equal(first.weight("transformer.norm_out.linear"), halves_swapped(final))


def test_diffusers_reads_what_is_written_for_kohya_as_what_is_written_for_it(tmp_path):
    tensors = {}
    for path in ("norm_out.linear", "proj_out", "transformer_blocks.0.attn.to_out.0"):
        layer = flux().layers[f"transformer.{path}"]
        tensors |= pair(f"transformer.{path}", *layer.shape, style="peft")[0]
    adapter = read(tmp_path, tensors, flux())
    save_adapter(adapter, tmp_path / "kohya.safetensors", naming="kohya")
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    converted = conversion._convert_kohya_flux_lora_to_diffusers(load_file(tmp_path / "kohya.safetensors"))
    # For the last layers it leaves out `transformer.`.
    converted = {key.removeprefix("transformer."): value for key, value in converted.items()}
    assert converted.keys() == {key.removeprefix("transformer.") for key in tensors}
    assert all(torch.equal(converted[key.removeprefix("transformer.")], tensors[key]) for key in tensors)


QKV = "double_blocks.0.img_attn.qkv"
PARTS = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("kind", ["lora", "half precision", "loha"])
def test_an_update_of_a_fused_weight_and_one_of_its_part_add_up(tmp_path, kind, is_known):
    """As in ComfyUI, which patches the weight and the rows of the part one after the other."""
    tensors, whole = pair(f"diffusion_model.{QKV}", 192, 64)
    tensors[f"diffusion_model.{QKV}.alpha"] = torch.tensor(0.5)
    part = f"transformer.{PARTS[1]}"
    if kind == "loha":
        a, b, c, d = (torch.randn(*size, generator=G) for size in ((64, 2), (2, 64)) * 2)
        tensors |= {f"{part}.hada_w1_a": a, f"{part}.hada_w1_b": b, f"{part}.hada_w2_a": c, f"{part}.hada_w2_b": d}
        more = (a @ b) * (c @ d)
    else:
        added, more = pair(part, 64, 64)
        tensors |= added | {f"{part}.alpha": torch.tensor(3.0)}
        more = more * 1.5
    if kind == "half precision":
        tensors = {key: tensor.half() for key, tensor in tensors.items()}
        dense = {key: tensor.double() for key, tensor in tensors.items()}
        whole = dense[f"diffusion_model.{QKV}.lora_up.weight"] @ dense[f"diffusion_model.{QKV}.lora_down.weight"]
        more = dense[f"{part}.lora_up.weight"] @ dense[f"{part}.lora_down.weight"] * 1.5
    expected = (whole * 0.25).double()
    expected[64:128] += more.double()
    adapter = read(tmp_path, tensors, flux() if is_known else None).resolved(flux())
    assert not adapter.unused
    got = torch.cat([adapter.layers[f"transformer.{path}"].delta_weight() for path in PARTS]).double()
    assert float((got - expected).norm() / expected.norm()) < 1e-6


def test_two_updates_that_depend_on_the_weight_do_not_add_up(tmp_path):
    tensors = pair(f"diffusion_model.{QKV}", 192, 64)[0]
    part = f"transformer.{PARTS[1]}"
    tensors |= pair(part, 64, 64)[0] | {f"{part}.dora_scale": torch.ones(64, 1)}
    adapter = read(tmp_path, tensors, flux())
    assert len(adapter.layers) == 3
    assert "do not add up" in adapter.unused[f"{part}.lora_up.weight"]


def test_of_two_updates_of_one_weight_one_counts(tmp_path):
    """In ComfyUI the names of a weight are one entry, which the later takes."""
    first = pair(f"diffusion_model.{QKV}", 192, 64)[0]
    adapter = read(tmp_path, first | pair("lora_unet_" + QKV.replace(".", "_"), 192, 64)[0], flux())
    assert len(adapter.layers) == 3
    assert all("same layer" in why for why in adapter.unused.values())
    assert len(adapter.unused) == 2


@pytest.mark.parametrize("naming", ["kohya", "original"])
@pytest.mark.parametrize("kind", ["lora", "loha", "diff"])
def test_parts_of_a_fused_weight_are_written_as_the_whole(tmp_path, naming, kind):
    """Zero rows for the rest: ComfyUI knows no name of the parts of some models."""
    tensors = {}
    for layer in flux().layers.values():
        if layer.rows is None or layer.path.endswith(("to_q", "to_v", "add_k_proj")):
            (m, n), r = layer.shape, 2
            shapes = {
                "lora": {"lora_A.weight": (r, n), "lora_B.weight": (m, r)},
                "loha": {"hada_w1_a": (m, r), "hada_w1_b": (r, n), "hada_w2_a": (m, r), "hada_w2_b": (r, n)},
                "diff": {"diff": (m, n)},
            }[kind]
            tensors |= {f"transformer.{layer.path}.{part}": torch.randn(*s, generator=G) for part, s in shapes.items()}
    adapter = read(tmp_path, tensors, flux())
    save_adapter(adapter, tmp_path / "b.safetensors", naming=naming)
    known = {
        layer.original if naming == "original" else layer.original.replace(".", "_") for layer in flux().layers.values()
    }
    prefix = {"kohya": "lora_unet_", "original": "diffusion_model."}[naming]
    ends = r"\.(lora_.*|hada_.*|diff|alpha)$"
    written = {re.sub(ends, "", key).removeprefix(prefix) for key in load_file(tmp_path / "b.safetensors")}
    if kind != "loha":  # two that share no factor have no LoHa of the whole: they keep diffusers' names
        assert written <= known
    again = load_adapter(tmp_path / "b.safetensors", flux())
    for name, own in adapter.layers.items():
        torch.testing.assert_close(again.layers[name].delta_weight(), own.delta_weight())
    added = again.layers.keys() - adapter.layers.keys()
    assert added
    for name in added:
        assert not again.layers[name].delta_weight().any()


def test_oft_of_kohya_s_scripts(tmp_path):
    """Their formula (networks/oft.py): Q held to `alpha * out`, then the rows turned by Cayley's rotation."""
    module, alpha = "oft_unet_transformer_blocks_0_attn_to_out_0", 1e-2
    blocks, weight = (torch.randn(*size, generator=G).double() for size in ((4, 16, 16), (64, 64)))
    adapter = read(tmp_path, {f"{module}.oft_blocks": blocks.float(), f"{module}.alpha": torch.tensor(alpha)}, flux())
    own = adapter.layers["transformer.transformer_blocks.0.attn.to_out.0"]
    Q = blocks - blocks.mT
    Q = Q * min(1.0, alpha * 64 / float(Q.norm()))
    eye = torch.eye(16, dtype=torch.float64)
    R = (eye + Q) @ torch.linalg.inv(eye - Q)
    turned = torch.einsum("knm,knp->kmp", R, weight.reshape(4, 16, 64)).reshape(64, 64)
    same(own.delta_weight(weight), turned - weight)


def test_oft_of_kohya_s_scripts_for_flux_is_refused_by_name(tmp_path):
    tensors = {f"oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.{i}": torch.randn(2, 32, 32) for i in range(3)}
    with pytest.raises(FormatError, match="OFT of kohya's scripts"):
        read(tmp_path, tensors | {"oft_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(1e-4)}, flux())


@pytest.mark.parametrize(
    "name", ["blocks.0.modulation", "head.modulation", "scale_shift_table", "transformer_blocks.3.scale_shift_table"]
)
def test_a_parameter_that_is_no_weight_of_a_layer_is_said_to_be_one(tmp_path, name):
    tensors = {f"diffusion_model.{name}.diff": torch.randn(1, 6, 64)} | pair(f"diffusion_model.{QKV}", 192, 64)[0]
    adapter = read(tmp_path, tensors, flux())
    assert len(adapter.layers) == 3
    assert "neither weight nor bias of a layer" in adapter.unused[f"diffusion_model.{name}.diff"]
