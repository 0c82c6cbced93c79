"""Opening bases: every family in every naming and layout that it comes in, against the models of diffusers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.synthetic import base_tensors
from lorax import FileError, FormatError, LayerTable, module_base, open_base
from lorax.inspect import describe
from lorax.models.families import families
from tests.conftest import small_base
from tests.models import MODELS

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")

# Narrow: what a model of diffusers is here needs no true widths.
NARROW = {"num_attention_heads": 2, "attention_head_dim": 16}
SMALL = {
    "flux": NARROW | {"pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6)},
    "chroma": NARROW | {"approximator_hidden_dim": 32},
    "anima": NARROW,
    "krea2": {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "text_hidden_dim": 32},
    "sd3": NARROW | {"caption_projection_dim": 32, "pooled_projection_dim": 32},
    "wan": {"attention_head_dim": 32, "num_attention_heads": 2},
    "lumina2": {"hidden_size": 96, "num_attention_heads": 4, "num_kv_heads": 2, "axes_dim_rope": (8, 8, 8)},
    "qwen_image": NARROW,
    "hunyuan_video": NARROW | {"pooled_projection_dim": 32},
    "hunyuan_video_15": NARROW,
}
UNET = {
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
UNETS = {
    "sd1": UNET | {"cross_attention_dim": 768},
    "sd2": UNET | {"cross_attention_dim": 1024, "use_linear_projection": True},
    "sdxl": UNET | {"cross_attention_dim": 2048, "use_linear_projection": True},
}
NAMES = [*UNETS, *MODELS]
# Those that diffusers converts by `swap_scale_shift`.
SWAPPED = {"sd3", "flux", "flux2", "hunyuan_video", "hunyuan_video_15"}


def model_of(name):
    torch.manual_seed(0)
    if name in UNETS:
        return diffusers.UNet2DConditionModel(**UNETS[name])
    kind, config, _ = MODELS[name]
    return getattr(diffusers, kind)(**config | SMALL.get(name, {}))


def weights(model):
    """What `weight` has to return for each layer: the weights of more than one dimension."""
    return matrices(model.state_dict())


def matrices(tensors):
    return {key.removesuffix(".weight"): w for key, w in tensors.items() if key.endswith(".weight") and w.dim() > 1}


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


def original(family, model):
    """The weights of a model of diffusers as the original repository has them: parts stacked, in the order of rows.

    That the rows are the right ones is what test_tables.py asks diffusers' converters.
    """
    tensors = {}
    state = weights(model)
    layers = family.layers({path: tuple(weight.shape) for path, weight in state.items()})
    for layer in sorted(layers, key=lambda layer: layer.rows or (0, 0)):
        weight = state[layer.path]
        part = single_file.swap_scale_shift(weight, 0) if layer.swapped else weight
        tensors.setdefault(layer.original, []).append(part)
    return {f"{path}.weight": torch.cat(parts) for path, parts in tensors.items()}


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
    check(base, model, name)
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


def flux(prefix="", scale=1.0, **changed):
    """A small FLUX.1 in its original naming; some of it changed."""
    family = families()["flux"]
    tensors = {f"{prefix}{key}": weight * scale for key, weight in original(family, model_of("flux")).items()}
    return tensors | changed


def lora():
    return {f"transformer.{path}.lora_{side}.weight": torch.ones(2, 2) for path in ("x", "y") for side in "AB"}


def write(path, tensors, parts=0, index=True):
    """Write a model whole, or in shards with an index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not parts:
        save_file(tensors, path)
        return
    stem = path.name.removesuffix(".safetensors")
    names = [path.with_name(f"{stem}-{i + 1:05}-of-{parts:05}.safetensors") for i in range(parts)]
    for i, name in enumerate(names):
        save_file({key: tensors[key] for key in list(tensors)[i::parts]}, name)
    if index:
        weight_map = {key: names[i % parts].name for i, key in enumerate(tensors)}
        path.with_name(f"{path.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("index", [True, False])
def test_a_shard_stands_for_the_whole_model_and_a_missing_one_is_named(tmp_path, index):
    write(tmp_path / "whole.safetensors", flux())
    folder = tmp_path / "transformer"
    write(folder / "model.safetensors", flux(), 3, index)
    shards = sorted(folder.glob("*.safetensors"))
    whole = open_base(tmp_path / "whole.safetensors")
    for path in (tmp_path, folder, *shards):
        base = open_base(path)
        assert base.files == shards
        assert list(base.layers) == list(whole.layers)
        assert base.identity() == whole.identity()
    for lost in shards:
        content = lost.read_bytes()
        lost.unlink()
        for path in {tmp_path, folder, *shards} - {lost}:
            with pytest.raises(FileError, match=lost.name):
                open_base(path)
        lost.write_bytes(content)


def test_a_count_that_no_model_has_costs_nothing(tmp_path):
    save_file(flux(), tmp_path / f"x-1-of-{'9' * 200}.safetensors")
    with pytest.raises(FileError, match="x-2-of-999"):
        open_base(tmp_path / f"x-1-of-{'9' * 200}.safetensors")


def test_a_shard_that_lacks_what_the_index_says_is_refused(tmp_path):
    write(tmp_path / "model.safetensors", flux(), 2)
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    tensors = load_file(first)
    key = sorted(tensors)[0]
    del tensors[key]
    save_file(tensors, first)
    with pytest.raises(FileError, match=key):
        open_base(tmp_path)


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../b.safetensors"}}']
)
def test_an_index_that_says_nothing_of_use_is_an_error(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    save_file(flux(), tmp_path / "model-00001-of-00001.safetensors")
    for path in tmp_path, tmp_path / "model-00001-of-00001.safetensors":
        with pytest.raises(FileError, match="index"):
            open_base(path)


CHOICES = [
    # the files of a folder; the one that is meant
    (["diffusion_pytorch_model", "diffusion_pytorch_model.fp16"], "diffusion_pytorch_model"),
    (["diffusion_pytorch_model.fp16", "diffusion_pytorch_model.non_ema"], "diffusion_pytorch_model.fp16"),
    (["diffusion_pytorch_model.bf16", "a"], "diffusion_pytorch_model.bf16"),
    (["model", "a"], "model"),
    (["mine", "mine.fp16", "lora"], "mine"),
    (["mine", "b/lora"], "mine"),
    (["flux1-dev"], "flux1-dev"),
]


@pytest.mark.parametrize("part", ["transformer", "."])
@pytest.mark.parametrize(("names", "meant"), CHOICES, ids=lambda value: value if isinstance(value, str) else "")
def test_of_the_files_in_a_folder_the_model_in_full_precision_is_taken(tmp_path, names, meant, part):
    for name in names:
        write(tmp_path / part / f"{name}.safetensors", lora() if "lora" in name else flux(scale=2.0 * (name == meant)))
    (tmp_path / part / "._other.safetensors").write_bytes(b"what a Mac leaves on other disks")
    base = open_base(tmp_path)
    assert [file.name for file in base.files] == [f"{meant}.safetensors"]
    assert base.name == tmp_path.name
    assert base.weight("transformer.x_embedder").any()


def test_shards_and_a_variant_in_one_folder(tmp_path):
    write(tmp_path / "diffusion_pytorch_model.safetensors", flux(), 2)
    write(tmp_path / "diffusion_pytorch_model.fp16.safetensors", flux(scale=0.0), 2)
    for index in tmp_path.glob("*.fp16.safetensors.index.json"):  # as diffusers calls it
        index.rename(tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json")
    save_file(lora(), tmp_path / "a.safetensors")
    assert open_base(tmp_path).weight("transformer.x_embedder").any()
    half = open_base(tmp_path / "diffusion_pytorch_model.fp16-00001-of-00002.safetensors")
    assert len(half.files) == 2
    assert not half.weight("transformer.x_embedder").any()


def test_an_index_without_its_shards_gives_way_to_a_file(tmp_path):
    write(tmp_path / "model.safetensors", flux(), 2)
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(FileError, match="model-00001-of-00002"):
        open_base(tmp_path)
    save_file(flux(), tmp_path / "model.fp16.safetensors")
    assert open_base(tmp_path).family.name == "flux"


def test_a_folder_that_does_not_tell_which_model_is_meant_names_them(tmp_path):
    for name in ("one", "two"):
        save_file(flux(), tmp_path / f"{name}.safetensors")
    with pytest.raises(FormatError, match=r"several.*one\.safetensors.*two\.safetensors"):
        open_base(tmp_path)


def test_folders_inside_that_hold_a_model_are_named(tmp_path):
    for name in ("high_noise_model", "low_noise_model"):
        write(tmp_path / name / "diffusion_pytorch_model.safetensors", flux())
    with pytest.raises(FormatError, match="high_noise_model, low_noise_model"):
        open_base(tmp_path)
    assert open_base(tmp_path / "high_noise_model").family.name == "flux"


def test_the_folder_that_one_stands_in_has_its_name(tmp_path, monkeypatch):
    write(tmp_path / "mine" / "flux.safetensors", flux())
    monkeypatch.chdir(tmp_path / "mine")
    assert open_base(".").name == "mine"


def test_adapters_alone_are_no_base(tmp_path):
    save_file(lora(), tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="an adapter where a base"):
        open_base(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unet/diffusion_pytorch_model.bin", "pickle"),
        ("unet/model.ckpt", "pickle"),
        ("model.PT", "pickle"),
        ("transformer/flux-Q4_K_S.gguf", "GGUF"),
        ("flux-Q4_K_S.gguf", "GGUF"),
    ],
)
def test_files_that_are_never_read_are_named_with_what_to_do(tmp_path, name, words):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"GGUF\3\0\0\0" if "gguf" in name else b"PK\3\4")
    for given in {path, path.parent, tmp_path}:
        with pytest.raises(FileError, match=rf"{words}.*{path.name}.*safetensors|{words}.*{path.name}.*fp16"):
            open_base(given)


def test_a_text_encoder_that_is_only_there_as_a_pickle_is_not_left_out(tmp_path):
    write(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", flux())
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text("{}")
    assert open_base(tmp_path).components == ["transformer"]
    (tmp_path / "text_encoder" / "pytorch_model.bin").write_bytes(b"PK\3\4")
    with pytest.raises(FileError, match=r"pickle.*pytorch_model\.bin"):
        open_base(tmp_path)
    assert open_base(tmp_path / "transformer").components == ["transformer"]


MODULE = "double_blocks.0.img_attn.proj"
WHOLE = torch.zeros(16, 1, dtype=torch.uint8)
# What programs write in the place of a weight, and the word that has to be said.
QUANTISED = {
    "NF4": {"weight": WHOLE, "weight.absmax": torch.ones(4), "weight.quant_state.bitsandbytes__nf4": WHOLE[0]},
    "8 bit by bitsandbytes": {"weight": WHOLE.to(torch.int8), "SCB": torch.ones(16)},
    "nunchaku": {"qweight": WHOLE.to(torch.int8), "wscales": torch.ones(1, 16), "lora_down": torch.ones(16, 2)},
    "GPTQ": {"qweight": WHOLE.int(), "qzeros": WHOLE.int(), "scales": torch.ones(1, 16), "g_idx": WHOLE[:, 0].int()},
    "NVFP4": {
        "weight": WHOLE,
        "weight_scale": torch.ones(16, 1).to(torch.float8_e4m3fn),
        "weight_scale_2": WHOLE[0, 0].float(),
    },
    "fp8 in blocks": {"weight": torch.ones(16, 16).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)},
    "quanto": {"weight._data": WHOLE.to(torch.int8), "weight._scale": torch.ones(16, 1)},
    "torchao": {"_weight_qdata": WHOLE.to(torch.int8), "_weight_scale": torch.ones(16, 1)},
    "scale": {"weight": torch.ones(16, 16).to(torch.float8_e4m3fn), "scale": torch.ones(16, 1)},
    "U8": {"weight": WHOLE, "comfy_quant": WHOLE[:, 0]},
}


@pytest.mark.parametrize("word", QUANTISED)
def test_quantised_weights_are_refused_by_name_and_no_number_is_made_of_them(tmp_path, word):
    for prefix in ("", "model.diffusion_model."):
        tensors = flux(prefix)
        del tensors[f"{prefix}{MODULE}.weight"]
        tensors |= {f"{prefix}{MODULE}.{name}": tensor.clone() for name, tensor in QUANTISED[word].items()}
        save_file(tensors, tmp_path / "base.safetensors")
        for read in (open_base, describe):
            with pytest.raises(FileError, match=rf"quantised.*{MODULE}.*{word}.*fp16"):
                read(tmp_path / "base.safetensors")


@pytest.mark.parametrize("scale", [(), (1,), (96,), (96, 1), (1, 32)])
def test_a_scale_is_that_of_its_rows_in_a_fused_weight_too(tmp_path, scale):
    """One for all, or one for each row (as BFL, torchao and ComfyUI write them), or for each column."""
    tensors = flux()
    key = "double_blocks.0.img_attn.qkv"
    stored = tensors[f"{key}.weight"].to(torch.float8_e4m3fn)
    factor = torch.rand(scale) + 1
    expected = stored.float() * (factor[:, None] if scale == (96,) else factor)
    save_file(tensors | {f"{key}.weight": stored, f"{key}.weight_scale": factor}, tmp_path / "base.safetensors")
    base = open_base(tmp_path / "base.safetensors")
    parts = [base.weight(f"transformer.transformer_blocks.0.attn.to_{part}") for part in "qkv"]
    assert torch.equal(torch.cat(parts), expected)


def test_one_scale_a_row_of_a_square_weight_is_no_scale_of_its_columns(tmp_path):
    tensors = flux()
    key = "double_blocks.0.img_attn.proj"
    stored, factor = tensors[f"{key}.weight"].to(torch.float8_e4m3fn), torch.rand(32) + 1
    assert stored.shape == (32, 32)
    save_file(tensors | {f"{key}.weight": stored, f"{key}.weight_scale": factor}, tmp_path / "base.safetensors")
    base = open_base(tmp_path / "base.safetensors")
    found = base.weight("transformer.transformer_blocks.0.attn.to_out.0")
    assert torch.equal(found, stored.float() * factor[:, None])


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
