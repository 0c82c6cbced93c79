"""The names that layers have in adapter files: every naming and spelling means the layer of its base."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorax import Base, FormatError, load_adapter, save_adapter
from lorax.adapters.keys import ROLES, parse
from lorax.models.families import UNKNOWN, families
from lorax.models.layers import Layer, LayerTable
from tests.adapter_files import DOWN, GUARD, QKV, SPELLINGS, UP, saved
from tests.tensors import randn


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


@pytest.mark.parametrize("key", ["", "a", "unet:", "unet:x:up", "unet:1:sideways"])
def test_odd_keys_are_of_no_update(key):
    assert parse(key) is None


@pytest.mark.parametrize("key", ROLES)
def test_a_role_alone_is_of_a_module_without_a_name(key):
    assert parse(key).path == ""


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
