"""Keys that programs write beside the usual ones: each means the same layer, and the same numbers."""

from functools import cache

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorax import load_adapter, save_adapter
from lorax.base import module_base

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
@pytest.mark.parametrize("naming", ["transformer.", "lora_transformer_"])
def test_what_diffusers_fuses_and_the_base_has_apart(tmp_path, fused, paths, naming):
    """`fuse_qkv_projections` of diffusers' models."""
    module = naming + (fused if naming.endswith(".") else fused.replace(".", "_"))
    tensors, update = pair(module, 192, 64)
    layers = read(tmp_path, tensors, flux()).layers
    torch.testing.assert_close(torch.cat([layers[f"transformer.{path}"].delta_weight() for path in paths]), update)
    assert len(layers) == 3
