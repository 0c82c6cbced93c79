"""Opening bases: every family in every naming and layout that it comes in, against the models of diffusers."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from demo.synthetic import base_tensors
from lorax import Base, FormatError, Layer, LayerTable, module_base, open_base
from lorax.models.families import families
from tests.conftest import small_base
from tests.models import MODELS, SWAPPED, UNETS, matrices, model_of, original, weights

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
NAMES = [*UNETS, *MODELS]


def check(base, model, name):
    """The base has the layers of the model of diffusers, by its names, with its weights (shift first, then scale)."""
    component = "unet" if name in UNETS else "transformer"
    assert base.family.name == name.split()[0]
    expected = weights(model)
    found = {layer.name: layer for layer in base.layers.values() if layer.is_main}
    assert found.keys() == {f"{component}.{path}" for path in expected}
    for path, weight in expected.items():
        layer = found[f"{component}.{path}"]
        assert torch.equal(base.read(layer), single_file.swap_scale_shift(weight, 0) if layer.swapped else weight), path
    assert any(layer.swapped for layer in found.values()) == (name in SWAPPED)


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return request.param, model_of(request.param)


@pytest.mark.slow
def test_a_model_of_diffusers_opens_as_a_file_a_folder_and_shards(model, tmp_path):
    name, model = model
    part = "unet" if name in UNETS else "transformer"
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path / "whole" / part)
    model.save_pretrained(tmp_path / "shards" / part, max_shard_size=size // 3)
    shards = sorted((tmp_path / "shards" / part).glob("*.safetensors"))
    assert len(shards) > 1
    file = tmp_path / "whole" / part / "diffusion_pytorch_model.safetensors"
    index = next((tmp_path / "shards" / part).glob("*.index.json"))
    whole = open_base(file)
    check(whole, model, name)
    check(open_base(index.parent.parent), model, name)
    for path in (file.parent, tmp_path / "whole", index.parent, shards[0], shards[-1], index):
        base = open_base(path)
        assert list(base.layers.values()) == list(whole.layers.values())
        assert base.identity() == whole.identity()
        assert set(base.vectors) == set(whole.vectors)
        assert base.naming == ("original" if name == "qwen_image" else "diffusers")
        assert base.parameters == sum(tensor.numel() for tensor in model.state_dict().values())


def test_a_model_in_memory_has_the_layers_and_the_weights_of_its_file(model):
    name, model = model
    check(module_base(model), model, name)


AROUND = ["", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "net.", "model."]
AROUND += ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "model.diffusion_model._orig_mod."]
AROUND += ["module.model.diffusion_model.", "model.diffusion_model.module.", "network.", "pipe.dit."]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_a_model_in_its_original_naming_opens_whatever_is_around_it(model, tmp_path):
    name, model = model
    family = families()[name.split()[0]]
    tensors = original(family, model)
    for around in AROUND:
        save_file({f"{around}{key}": weight for key, weight in tensors.items()}, tmp_path / "base.safetensors")
        base = open_base(tmp_path / "base.safetensors")
        assert (base.family, base.naming) == (family, "original"), around
    check(open_base(tmp_path / "base.safetensors"), model, name)
    blocks = {key.replace(".0.", ".0._checkpoint_wrapped_module.", 1): weight for key, weight in tensors.items()}
    save_file(blocks, tmp_path / "base.safetensors")
    check(open_base(tmp_path / "base.safetensors"), model, name)


@pytest.mark.parametrize("name", UNETS)
def test_an_original_unet_has_the_weights_that_diffusers_converts(name, tmp_path):
    family = families()[name]
    depth = (1, 0) if name != "sdxl" else (0, 2)
    unet = replace(
        family.unet, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=depth,
        transformer_depth_middle=1,
    )  # fmt: skip
    tensors = base_tensors(replace(family, unet=unet, text_encoders=()), 1, dtype=torch.float32)
    config = {"layers_per_block": 1, "class_embed_type": None, "addition_embed_type": None}
    config |= {"addition_embed_type": "text_time"} if name == "sdxl" else {}
    config |= {"down_block_types": ["x", "x"], "up_block_types": ["x", "x"]}
    converted = matrices(single_file.convert_ldm_unet_checkpoint(tensors, config))
    for around in AROUND:
        save_file({k.replace(AROUND[1], around): w for k, w in tensors.items()}, tmp_path / "base.safetensors")
        base = open_base(tmp_path / "base.safetensors")
        assert (base.family, base.naming) == (family, "original"), around
    base = open_base(tmp_path / "base.safetensors")
    assert {layer.path for layer in base.layers.values()} == converted.keys()
    for path, weight in converted.items():
        assert torch.equal(base.read(base.layers[f"unet.{path}"]), weight), path


CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 90}
T5 = {"d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 2, "d_kv": 32, "vocab_size": 90}
ENCODERS = {
    "clip_l": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
    "clip_h": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
    "clip_g": lambda: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**CLIP)),
    "t5xxl": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5, feed_forward_proj="gated-gelu")),
}
# Where sgm has those of Stable Diffusion 1 and 2.
SGM = {"sd1": "conditioner.embedders.0.transformer.", "sd2": "conditioner.embedders.0.model."}


def text_weights(model):
    """The matrices of the blocks, by the names that transformers 4 had."""
    known = ("text_model.", "encoder.block.")
    blocks = {path: weight for path, weight in weights(model).items() if ".layers." in path or ".block." in path}
    return {path if path.startswith(known) else f"text_model.{path}": weight for path, weight in blocks.items()}


def openclip(weights):
    """The same weights as OpenCLIP has them."""
    found = {}
    for i in range(CLIP["num_hidden_layers"]):
        ours, theirs = f"text_model.encoder.layers.{i}.", f"transformer.resblocks.{i}."
        projections = [weights[f"{ours}self_attn.{part}_proj"] for part in "qkv"]
        found[f"{theirs}attn.in_proj_weight"] = torch.cat(projections)
        found[f"{theirs}attn.out_proj.weight"] = weights[f"{ours}self_attn.out_proj"]
        found |= {f"{theirs}mlp.{a}.weight": weights[f"{ours}mlp.{b}"] for a, b in (("c_fc", "fc1"), ("c_proj", "fc2"))}
    return found


@pytest.mark.parametrize("name", [name for name, family in families().items() if family.text_encoders])
def test_the_text_encoders_of_a_family_are_found_in_every_spelling(name, tmp_path):
    family = families()[name]
    model = model_of(name)
    model.save_pretrained(tmp_path / family.component)
    tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in model.state_dict().items()}
    for encoder in family.text_encoders:
        torch.manual_seed(1)
        written = ENCODERS[encoder.kind]()
        written.save_pretrained(tmp_path / encoder.component)
        expected = text_weights(written)
        plain = {f"{path}.weight": weight for path, weight in expected.items()}
        spellings = [written.state_dict(), plain]
        if encoder.kind != "t5xxl":
            spellings += [{key.removeprefix("text_model."): w for key, w in plain.items()}, openclip(expected)]
        bases = [open_base(tmp_path)]
        for prefix in {*encoder.checkpoint, SGM.get(name, encoder.checkpoint[0])}:
            for spelling in spellings:
                text = {f"{prefix}{key}": tensor.clone() for key, tensor in spelling.items()}
                path = tmp_path / f"{encoder.component}-{len(bases)}.safetensors"
                save_file(tensors | text, path)
                bases.append(open_base(path))
        for base in bases:
            found = {path: layer for path, layer in base.layers.items() if layer.component == encoder.component}
            assert found.keys() == {f"{encoder.component}.{path}" for path in expected}
            for path, weight in expected.items():
                assert torch.equal(base.weight(f"{encoder.component}.{path}"), weight), path


def test_a_base_that_replaces_another_keeps_none_of_its_weights(tmp_path):
    base = small_base(tmp_path / "base.safetensors")
    first, *_ = names = list(base.layers)
    old = {name: (base.digest(name), base.weight(name)) for name in reversed(names)}  # of `first` last
    other = replace(base, read=lambda layer: 2 * base.read(layer))
    cut = LayerTable([replace(base.layers[first], shape=(8, *base.layers[first].shape[1:]))])
    fewer = replace(base, layers=cut, read=lambda layer: base.read(layer)[:8])
    assert torch.equal(other.weight(first), 2 * old[first][1])
    assert torch.equal(fewer.weight(first), old[first][1][:8])
    assert len({old[first][0], other.digest(first), fewer.digest(first)}) == 3
    assert {base, other, fewer} != {base}
    assert replace(base, name="renamed").digest(first) == base.digest(first) == old[first][0]


@pytest.mark.parametrize("packed", [torch.zeros(512, 1, dtype=torch.uint8), torch.zeros(32, 32, dtype=torch.int8)])
def test_a_weight_that_is_no_numbers_is_named_with_what_to_do(packed):
    """As bitsandbytes keeps the weights of a module of 32 x 32 in 4 bits and in 8."""
    module = torch.nn.Linear(32, 32)
    module.weight = torch.nn.Parameter(packed, requires_grad=False)
    base = module_base(torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.ModuleDict({"q": module})])}))
    with pytest.raises(FormatError, match=r"blocks\.0\.q in model is u?int8 \[\d+, \d+\]; .*fp16"):
        base.weight("transformer.blocks.0.q")


def test_a_weight_of_another_shape_than_its_layer_s_is_named():
    layers = LayerTable([Layer("transformer.blocks.0.q", (4, 3))])
    with pytest.raises(FormatError, match=r"blocks\.0\.q in model is float32 \[3, 4\], not \[4, 3\]"):
        Base("model", families()["flux"], layers, lambda _: torch.ones(3, 4)).weight("transformer.blocks.0.q")
