"""Files and folders of bases: shards, variants, what is no model, quantised weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorax import FileError, FormatError, open_base
from lorax.inspect import describe
from lorax.models.families import families
from tests.models import model_of, original


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
    ],
)
def test_files_that_are_never_read_are_named_with_what_to_do(tmp_path, name, words):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"PK\3\4")
    for given in {path, path.parent, tmp_path}:
        with pytest.raises(FileError, match=rf"{words}.*{path.name}.*safetensors"):
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
