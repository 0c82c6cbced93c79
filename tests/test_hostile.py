"""What hostile files try, one by one: what is no file, numbers and JSON that are none."""

import json
import os
import time
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorax import (
    FileError,
    FormatError,
    LoraxError,
    NumericsError,
    TransferOptions,
    convert_to_lora,
    convert_to_lora_x,
    load_adapter,
    load_assignment,
    open_base,
    save_adapter,
    transfer_adapter,
)
from lorax.files.tensorfile import TensorFile, parse_json
from lorax.inspect import describe
from reliability import seeds
from reliability.mutations import build

UP, DOWN = f"lora_unet_{seeds.QUERY}.lora_up.weight", f"lora_unet_{seeds.QUERY}.lora_down.weight"
NOT_FILES = {
    "pipe": lambda p: os.mkfifo(p),
    "device": lambda p: p.symlink_to("/dev/zero"),
    "loop": lambda p: p.symlink_to(p),
}


READERS = {
    "adapter": (load_adapter, FileError),
    "base": (open_base, FileError),
    "facts": (describe, FileError),
    "assignment": (lambda path: load_assignment(path, None, None), FormatError),
}
every_reader = pytest.mark.parametrize(("read", "kind"), READERS.values(), ids=READERS)


@every_reader
@pytest.mark.parametrize("make", NOT_FILES.values(), ids=NOT_FILES)
def test_what_is_no_file_is_not_waited_for(tmp_path, make, read, kind):
    path = tmp_path / "a.safetensors"
    make(path)
    with pytest.raises(kind, match=r"not a file|cannot open|not an assignment"):
        read(path)


@every_reader
@pytest.mark.parametrize("path", ["x" * 5000, "x/" + "y/" * 3000], ids=["a long name", "many folders"])
def test_paths_that_the_system_refuses(tmp_path, path, read, kind):
    with pytest.raises(kind):
        read(tmp_path / path)


CONFIGS = ['{"r": 2, "lora_alpha": NaN}', '{"lora_alpha": 1e999}', '{"lora_alpha": {}}', "[" * 10**5, "[]", "null", "{",
    '{"alpha_pattern": {"to_q": ' + "9" * 400 + "}}", '{"rank_pattern": {"to_q": Infinity}}',
    '{"r": 1, "r": 2}']  # fmt: skip


@pytest.mark.parametrize("text", CONFIGS)
def test_configurations_that_are_none(tmp_path, text):
    path = tmp_path / "adapter_model.safetensors"
    save_file(
        {f"{seeds.PEFT}.lora_A.weight": torch.ones(2, 32), f"{seeds.PEFT}.lora_B.weight": torch.ones(32, 2)}, path
    )
    assert load_adapter(path).layers
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(FormatError, match=r"adapter_config\.json"):
        load_adapter(path)
    (tmp_path / "adapter_config.json").unlink()
    save_file(load_file(path), path, {"lora_adapter_metadata": text})
    with pytest.raises(FormatError, match=r"the metadata of .*adapter_model\.safetensors"):
        load_adapter(path)


@pytest.mark.slow
def test_many_patterns_take_no_time(tmp_path):
    patterns = {f"blocks.{i}.to_q": 4.0 for i in range(20_000)}
    tensors = {}
    for i in range(1000):
        tensors |= {f"base_model.model.blocks.{i}.to_q.lora_{s}.weight": torch.ones(1, 1) for s in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    text = json.dumps({"r": 1, "lora_alpha": 2, "alpha_pattern": patterns, "rank_pattern": patterns})
    (tmp_path / "adapter_config.json").write_text(text)
    start = time.process_time()
    assert {own.alpha for own in load_adapter(tmp_path / "adapter_model.safetensors").layers.values()} == {4.0}
    assert time.process_time() - start < 3


@pytest.mark.parametrize("method", ["project", "align", "subspace-null", "index"])
def test_an_update_that_grows_beyond_its_dtype(tmp_path, pair, method):
    """Finite in the file, infinite as an update."""
    path = tmp_path / "a.safetensors"
    save_file({UP: torch.full((32, 2), 3e38), DOWN: torch.full((2, 32), 3e38)}, path)
    with pytest.raises(NumericsError, match=r"grows beyond its dtype.*attn1\.to_q"):
        transfer_adapter(load_adapter(path, pair[0]), *pair, TransferOptions(method=method, rank=8))


def test_numbers_that_grow_beyond_their_dtype(tmp_path, pair):
    """Finite in the file, infinite as an update: said, and nothing is written."""
    path = tmp_path / "a.safetensors"
    save_file(
        {
            f"lora_unet_{seeds.QUERY}.hada_w{i}_{s}": torch.full((32, 2) if s == "a" else (2, 32), 1e30)
            for i in "12"
            for s in "ab"
        },
        path,
    )
    with pytest.raises(NumericsError, match="grows beyond"):
        convert_to_lora(load_adapter(path, pair[0]), pair[0])
    half = {f"hada_w{i}_{s}": torch.full((32, 2) if s == "a" else (2, 32), 1000.0).half() for i in "12" for s in "ab"}
    save_file({f"lora_unet_{seeds.QUERY}.{name}": part for name, part in half.items()}, path)
    with pytest.raises(NumericsError, match="float16"):
        transfer_adapter(load_adapter(path, pair[0]), *pair, TransferOptions(method="project", rank=8))


def test_an_update_of_another_size_than_its_base(tmp_path, pair):
    """It is converted as it is, without the base's shape, and cannot become a LoRA-X of that base."""
    save_file({f"lora_unet_{seeds.QUERY}.diff": torch.randn(12, 32)}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", pair[0])
    save_adapter(convert_to_lora(adapter, pair[0]), tmp_path / "b.safetensors")
    assert load_file(tmp_path / "b.safetensors")[UP].shape[0] == 12
    with pytest.raises(LoraxError, match="does not belong"):
        convert_to_lora_x(adapter, pair[0])


@pytest.mark.parametrize("place", [(slice(None), 0), (0, 0)], ids=["vector", "number"])
def test_a_projection_of_the_text_that_is_no_matrix(tmp_path, pair, place):
    tensors = load_file(pair[0].files[0])
    key = next(key for key in tensors if key.endswith("attn2.to_k.weight"))
    save_file({**tensors, key: tensors[key][place].clone()}, tmp_path / "b.safetensors")
    assert open_base(tmp_path / "b.safetensors").family.name != "sd1"
    assert describe(tmp_path / "b.safetensors")["kind"] == "base"


def scaled_base(path, shape):
    weight = torch.ones(8, 8).to(torch.float8_e4m3fn)
    save_file({"blocks.0.x.weight": weight, "blocks.0.x.scale_weight": torch.full(shape, 2.0)}, path)
    return open_base(path)


@pytest.mark.parametrize("shape", [(3,), (7, 1), (2, 8, 8), (8, 8, 1, 1)], ids=str)
def test_a_scale_that_does_not_fit_its_weight(tmp_path, shape):
    with pytest.raises(FileError, match=r"scale.*blocks\.0\.x\.scale_weight"):
        scaled_base(tmp_path / "b.safetensors", shape).weight("transformer.blocks.0.x")


@pytest.mark.parametrize("shape", [(), (1,), (8, 1), (1, 1)], ids=str)
def test_a_scale_that_fits_its_weight(tmp_path, shape):
    weight = scaled_base(tmp_path / "b.safetensors", shape).weight("transformer.blocks.0.x")
    assert torch.equal(weight, torch.full((8, 8), 2.0))


@pytest.mark.parametrize("read", [open_base, load_adapter, describe])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4\n", "Git LFS.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page.*download"),
        (b"<html><head>", "web page.*download"),
    ],
)
def test_what_people_take_for_a_safetensors_file_is_named(tmp_path, content, words, read):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(FileError, match=words):
        read(tmp_path / "a.safetensors")


def test_digits_that_are_no_numbers(tmp_path):
    save_file(
        {"unet:\u00b2:up": torch.ones(320, 2), "unet:\u00b2:down": torch.ones(2, 320)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(FormatError, match="no LoRA"):
        load_adapter(tmp_path / "a.safetensors")
    tensors = {
        "unet:0:up": torch.ones(320, 2),
        "unet:0:down": torch.ones(2, 320),
        "lora_unet_weird.diff": torch.ones(2, 2),
    }
    tensors |= {"unet:1:up": torch.ones(320, 2), "unet:1:down": torch.ones(2, 320)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert "unet.weird" in load_adapter(tmp_path / "a.safetensors").layers


@pytest.mark.slow
def test_bytes_that_the_cache_did_not_write(tmp_path, pair):
    """With a right checksum: computed again, whatever they are."""
    from lorax import Cache, Engine

    (tmp_path / "a.safetensors").write_bytes(seeds.adapters()["lora"])
    adapter = load_adapter(tmp_path / "a.safetensors", pair[0])
    cache = Cache(tmp_path / "cache", 2**26)

    def moved():
        engine = Engine(cache=cache)
        bases = [open_base(base.files[0]) for base in pair]
        return transfer_adapter(
            adapter, *bases, TransferOptions(method="project", rank=8, matching="order"), engine=engine
        )[1].to_json()

    plain = moved()
    files = [path for path in cache.folder.rglob("*") if path.is_file()]
    kept = [path.read_bytes() for path in files]
    junk = (
        b"",
        b"\0" * 7,
        b"\xff" * 12,
        b"\xff" * 50,
        b"[]",
        b'{"a": 1}',
        b"[" * 10**5,
        (2**30).to_bytes(4, "little") * 3,
    )
    for content in junk:
        for path in files:
            path.write_bytes(zlib.crc32(content).to_bytes(4, "little") + content)
        assert moved() == plain
        for path, whole in zip(files, kept, strict=True):
            path.write_bytes(whole)


def test_json_from_outside():
    assert parse_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    with pytest.raises(ValueError, match="more than 2 objects"):
        parse_json("[{}, {}, {}]", objects=2)


NO_JSON = {
    "deep": "[" * 10**5,
    "twice": '{"a": 1, "a": 2}',
    "property name": "{",
    "digits": "9" * 5000,
    "decode": b"\xff",
}


@pytest.mark.parametrize("words", NO_JSON)
def test_json_that_is_none(words):
    with pytest.raises(ValueError, match=words):
        parse_json(NO_JSON[words])


def test_build_makes_sound_files(tmp_path):
    (tmp_path / "a").write_bytes(build({"k": "v"}, [("x.diff", "F32", [1, 1], bytes(4))]))
    assert TensorFile(tmp_path / "a").metadata == {"k": "v"}


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_looks_like_a_pickle_is_none(tmp_path, length):
    """Their first bytes are those of pickle protocols 2 to 5."""
    path = tmp_path / "a.safetensors"
    tensors = {"lora_unet_x.diff": torch.ones(2, 2)}
    save_file(tensors, path, {"note": ""})
    shorter = int.from_bytes(path.read_bytes()[:8], "little")
    save_file(tensors, path, {"note": "x" * (length - shorter)})
    assert path.read_bytes()[:2] == length.to_bytes(2, "little")
    assert load_adapter(path).layers
