"""Programs that nobody here wrote: diffusers, PEFT and transformers agree with our names, files and updates."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.synthetic import base_tensors
from lorax import TransferOptions, load_adapter, open_base, save_adapter, transfer_adapter
from lorax.models.families import families
from tests.conftest import small_base, small_family
from tests.tensors import lora_tensors, same

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow  # each makes models of these libraries

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SD1 = {"cross_attention_dim": 768}
SDXL = {
    "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SMALL = {
    "block_out_channels": (32, 64),
    "down_block_types": (CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP),
    "layers_per_block": 1,
    "cross_attention_dim": 768,
}
SMALL_XL = SDXL | {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": (1, 1, 2)}


def unet_of(config, device="cpu"):
    with torch.device(device):
        return diffusers.UNet2DConditionModel(**config)


@pytest.mark.parametrize(("family", "config"), [("sd1", SD1), ("sdxl", SDXL)])
def test_names_and_shapes_of_full_size_models(family, config):
    shapes = {key: tuple(value.shape) for key, value in unet_of(config, "meta").state_dict().items()}
    weights = {key.removesuffix(".weight"): shape for key, shape in shapes.items() if key.endswith(".weight")}
    expected = {name: shape for name, shape in weights.items() if len(shape) in (2, 4)}
    ours = [layer for layer in families()[family].table.values() if layer.component == "unet"]
    assert {layer.path: layer.shape for layer in ours} == expected
    # The same layers, found from the other naming, have the same two names.
    assert set(families()[family].layers(weights)) == set(ours)
    assert sorted(families()[family].unet.parameters().values()) == sorted(shapes.values())


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_names_of_text_encoders(family):
    for encoder in families()[family].text_encoders:
        config = transformers.CLIPTextConfig(
            hidden_size=encoder.width, num_hidden_layers=encoder.depth, intermediate_size=4 * encoder.width
        )
        with torch.device("meta"):
            model = transformers.CLIPTextModel(config)
        linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        # transformers 5 dropped the outer `text_model.`; files keep it. The order is that of the indexed format.
        found = {
            "text_model." + name.removeprefix("text_model."): tuple(module.weight.shape) for name, module in linear
        }
        assert found == encoder.shapes()
        assert list(found) == list(encoder.shapes())


def test_diffusers_files_and_folders_open_as_the_same_base(tmp_path, bases):
    single = bases[0]
    unet = {layer.path: single.read(layer) for layer in single.layers.values() if layer.component == "unet"}
    model = unet_of(SMALL)
    state = model.state_dict() | {f"{path}.weight": weight for path, weight in unet.items()}
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "unet")
    (tmp_path / "text_encoder").mkdir()
    prefix = single.family.text_encoders[0].checkpoint[0]
    text = {k.removeprefix(prefix): v for k, v in load_file(single.files[0]).items() if k.startswith(prefix)}
    save_file(text, tmp_path / "text_encoder" / "model.safetensors")
    for path in (tmp_path, tmp_path / "unet" / "diffusion_pytorch_model.safetensors"):
        base = open_base(path)
        assert base.family.name == "sd1"
        names = [name for name in single.layers if path == tmp_path or name.startswith("unet.")]
        assert set(base.layers) == set(names)
        for name in names:
            assert base.layers[name] == single.layers[name]
            assert torch.equal(base.weight(name), single.weight(name))
            assert base.fingerprint(name) == single.fingerprint(name)


def test_fused_openclip_projections_are_cut_into_q_k_v(tmp_path):
    family = families()["sdxl"]
    encoders = tuple(replace(encoder, width=32, depth=2) for encoder in family.text_encoders)
    unet = replace(family.unet, model_channels=32, transformer_depth=(0, 1, 1), transformer_depth_middle=1)
    tensors = base_tensors(replace(family, unet=unet, text_encoders=encoders), 1)
    save_file(tensors, tmp_path / "xl.safetensors")
    base = open_base(tmp_path / "xl.safetensors")
    assert base.components == ["unet", "text_encoder", "text_encoder_2"]
    fused = tensors["conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"].float()
    parts = [base.weight(f"text_encoder_2.text_model.encoder.layers.1.self_attn.{p}_proj") for p in "qkv"]
    assert torch.equal(torch.cat(parts), fused)


def updates(model, before):
    return {name: module.weight.detach() - before[name] for name, module in linear_and_conv(model)}


def linear_and_conv(model):
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def weights(model):
    return {name: module.weight.detach().clone() for name, module in linear_and_conv(model)}


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("method", ["copy", "project"])
def test_diffusers_applies_the_transferred_update(tmp_path, bases, lora_file, naming, method):
    result, _ = transfer_adapter(load_adapter(lora_file, bases[0]), *bases, TransferOptions(method=method, rank=24))
    save_adapter(result, tmp_path / "a.safetensors", naming=naming)
    unet = unet_of(SMALL)
    before = weights(unet)
    state, alphas, *_ = diffusers.StableDiffusionPipeline.lora_state_dict(
        str(tmp_path / "a.safetensors"), unet_config=unet.config
    )
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    unet.fuse_lora()
    unet.unload_lora()
    seen = updates(unet, before)
    ours = {own.layer.path: own.delta_weight() for own in result.layers.values() if own.layer.component == "unet"}
    assert len(ours) > 30
    for path, change in seen.items():
        expected = ours.get(path, torch.zeros(1)).reshape(change.shape if path in ours else ())
        same(change, expected.expand(change.shape))


def test_diffusers_reads_kohyas_sdxl_spelling(tmp_path):
    depths = {"transformer_depth": (0, 1, 2), "transformer_depth_middle": 2}
    config = replace(families()["sdxl"].unet, channel_mult=(1, 2, 2), model_channels=32, **depths)
    family = replace(families()["sdxl"], unet=config, text_encoders=())
    save_file(base_tensors(family, 1), tmp_path / "xl.safetensors")
    base = open_base(tmp_path / "xl.safetensors")
    unet = unet_of(SMALL_XL)
    assert {layer.path: layer.shape for layer in base.layers.values()} == {
        name: tuple(module.weight.shape) for name, module in linear_and_conv(unet)
    }
    save_file(lora_tensors(base), tmp_path / "in.safetensors")
    adapter = load_adapter(tmp_path / "in.safetensors", base)
    save_adapter(adapter, tmp_path / "out.safetensors", naming="kohya")
    assert any(key.startswith("lora_unet_input_blocks_") for key in load_file(tmp_path / "out.safetensors"))
    again = load_adapter(tmp_path / "out.safetensors", base)
    assert all(torch.equal(again.layers[n].delta_weight(), own.delta_weight()) for n, own in adapter.layers.items())
    # diffusers maps blocks of transformers only, so give it those.
    kept = {n: own for n, own in adapter.layers.items() if own.layer.is_attention}
    only = type(adapter)("a", adapter.family, "kohya", kept)
    save_adapter(only, tmp_path / "attention.safetensors", naming="kohya")
    path = str(tmp_path / "attention.safetensors")
    state, alphas, *_ = diffusers.StableDiffusionXLPipeline.lora_state_dict(path, unet_config=unet.config)
    before = weights(unet)
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    unet.fuse_lora()
    unet.unload_lora()
    for path, change in updates(unet, before).items():
        own = kept.get(f"unet.{path}")
        expected = own.delta_weight() if own else torch.zeros_like(change)
        same(change, expected.reshape(change.shape))


def test_peft_applies_the_transferred_update(tmp_path, bases, lora_file):
    result, _ = transfer_adapter(load_adapter(lora_file, bases[0]), *bases, TransferOptions(method="project", rank=24))
    save_adapter(result, tmp_path / "a.safetensors", naming="diffusers")
    state = load_file(tmp_path / "a.safetensors")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256, "num_attention_heads": 4}
    for component, model in (
        ("unet", unet_of(SMALL)),
        ("text_encoder", transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))),
    ):
        prefix = f"{component}."
        inner = "" if component == "unet" or hasattr(model, "text_model") else "text_model."
        part = {k.removeprefix(prefix + inner): v for k, v in state.items() if k.startswith(prefix)}
        before = weights(model)
        targets = sorted({key.rpartition(".lora_")[0] for key in part})
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets))
        outcome = peft.set_peft_model_state_dict(wrapped, {f"base_model.model.{k}": v for k, v in part.items()})
        assert not outcome.unexpected_keys
        merged = wrapped.merge_and_unload()
        for path, change in updates(merged, before).items():
            own = result.layers.get(f"{prefix}{inner}{path}")
            expected = own.delta_weight().reshape(change.shape) if own else torch.zeros_like(change)
            same(change, expected)


def test_peft_writes_what_we_read(tmp_path):
    model = unet_of(SMALL)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path)
    base = small_base(tmp_path / "base.safetensors", text=False)
    adapter = load_adapter(tmp_path / "adapter_model.safetensors", base)
    for own in adapter.layers.values():
        module = wrapped.base_model.model.get_submodule(own.layer.path)
        expected = module.get_delta_weight("default")
        same(own.delta_weight(), expected)
    assert len(adapter.layers) == 2 * 2 * sum(".attn1.to_q" in name for name in base.layers)


def test_small_family_is_what_diffusers_builds():
    shapes = {key.removesuffix(".weight"): tuple(v.shape) for key, v in unet_of(SMALL, "meta").state_dict().items()}
    expected = {layer.path for layer in families()["sd1"].layers(shapes)}
    ours = small_family().unet.parameters()
    found = families()["sd1"].layers(
        {key.removesuffix(".weight"): shape for key, shape in ours.items() if key.endswith(".weight")}
    )
    assert {layer.path for layer in found} == expected
