"""Bases in GGUF files, as the gguf package writes and reads them."""

import sys

import numpy
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorax import FileError, FormatError, TransferOptions, load_adapter, open_base, transfer_adapter
from lorax.files.ggufile import GgufFile
from lorax.files.tensorfile import DIMENSIONS, HEADER_BYTES, NAME_CHARACTERS, NUMBERS, TENSORS
from lorax.inspect import describe
from lorax.models.families import families
from reliability.__main__ import attack
from reliability.readers import Tally
from tests.models import model_of, original

gguf = pytest.importorskip("gguf")
from tests.write_gguf import write_gguf

KINDS = list(gguf.quants._type_traits)


def flux():
    """A small FLUX.1 in its original naming."""
    return original(families()["flux"], model_of("flux"))


def blocks(data, kind):
    """Blocks of a kind for as many numbers: quantised where the package can, else any bytes are some numbers."""
    try:
        return gguf.quants.quantize(data, kind)
    except NotImplementedError:
        rows, numbers = data.shape
        size, nbytes = gguf.GGML_QUANT_SIZES[kind]
        generator = numpy.random.default_rng(numbers)
        found = generator.integers(0, 256, (rows, numbers // size * nbytes), dtype=numpy.uint8)
        # Every 16 bit a number that float16 has: where the scales lie differs from kind to kind.
        return (found.view(numpy.uint16) & 0xBBFF).view(numpy.uint8) if nbytes % 2 == 0 else found


def stored(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def numbers(tensor):
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_of_block_is_what_the_package_makes_of_it(tmp_path, kind):
    """The rows of 32 numbers do not end where blocks of 256 do; those of one layer in a fused weight neither."""
    path = tmp_path / "a.gguf"
    write_gguf(flux(), path, "flux", kind, blocks)
    base, found = open_base(path), stored(path)
    assert base.family.name == "flux"
    assert base.dtypes[kind.name] > 10
    for layer in base.layers.values():
        whole = numbers(found[f"{layer.original}.weight"]).reshape(-1, *layer.shape[1:])
        expected = whole if layer.rows is None else whole[slice(*layer.rows)]
        weight = base.read(layer)
        assert weight.dtype in (torch.float32, torch.float16, torch.bfloat16)
        torch.testing.assert_close(weight.float(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_file_of_half_precision_is_the_base_that_its_safetensors_file_is(tmp_path, prefix):
    tensors = {f"{prefix}{key}": weight.half() for key, weight in flux().items()}
    write_gguf(tensors, tmp_path / "a.gguf", "flux", gguf.GGMLQuantizationType.F16)
    save_file(tensors, tmp_path / "a.safetensors")
    ours, theirs = open_base(tmp_path / "a.gguf"), open_base(tmp_path / "a.safetensors")
    assert dict(ours.layers) == dict(theirs.layers)
    assert all(ours.digest(name) == theirs.digest(name) for name in theirs.layers)
    assert describe(tmp_path / "a.gguf") | {"file": ""} == describe(tmp_path / "a.safetensors") | {"file": ""}


@pytest.mark.parametrize("name", ["wan", "sd3", "qwen_image"])
def test_other_families_and_convolutions_of_three_dimensions(tmp_path, name):
    tensors = {key: weight.half() for key, weight in original(families()[name], model_of(name)).items()}
    write_gguf(tensors, tmp_path / "a.gguf", name, gguf.GGMLQuantizationType.F16)
    save_file(tensors, tmp_path / "a.safetensors")
    ours, theirs = open_base(tmp_path / "a.gguf"), open_base(tmp_path / "a.safetensors")
    assert ours.family.name == name
    assert dict(ours.layers) == dict(theirs.layers)
    assert ours.identity() == theirs.identity()


def test_half_precision_needs_no_package_and_the_rest_says_which(tmp_path, monkeypatch):
    for kind in ("F16", "BF16", "Q8_0"):
        write_gguf(flux(), tmp_path / f"{kind}.gguf", "flux", gguf.GGMLQuantizationType[kind])
    monkeypatch.setitem(sys.modules, "gguf", None)
    for kind in ("F16", "BF16"):
        assert open_base(tmp_path / f"{kind}.gguf").weight("transformer.x_embedder").any()
    with pytest.raises(FileError, match=r"Q8_0\.gguf.*pip install gguf"):
        open_base(tmp_path / "Q8_0.gguf")


def test_an_adapter_moves_from_a_quantised_base_as_from_the_whole(tmp_path):
    tensors = flux()
    write_gguf(tensors, tmp_path / "a.gguf", "flux")
    save_file(tensors, tmp_path / "a.safetensors")
    tuned = {key: weight + 0.1 * weight.std() * torch.randn(weight.shape) for key, weight in tensors.items()}
    save_file(tuned, tmp_path / "b.safetensors")
    lora = {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.randn(2, 32)}
    lora["transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight"] = torch.randn(32, 2)
    save_file(lora, tmp_path / "lora.safetensors")
    target, options = open_base(tmp_path / "b.safetensors"), TransferOptions(method="orthogonal")
    moved = []
    for name in ("a.gguf", "a.safetensors"):
        source = open_base(tmp_path / name)
        adapter, _ = transfer_adapter(load_adapter(tmp_path / "lora.safetensors", source), source, target, options)
        (layer,) = adapter.layers.values()
        moved.append(layer.delta_weight())
    assert not torch.equal(*moved)
    assert (moved[0] - moved[1]).norm() < 0.01 * moved[1].norm()


def test_parts_and_folders_of_gguf_files(tmp_path):
    tensors, folder = {key: weight.half() for key, weight in flux().items()}, tmp_path / "transformer"
    folder.mkdir()
    for number in (1, 2):
        part = dict(list(tensors.items())[number - 1 :: 2])
        write_gguf(part, folder / f"flux-Q8_0-0000{number}-of-00002.gguf", "flux")
    whole = open_base(folder)
    assert len(whole.files) == 2
    assert whole.layers == open_base(tmp_path).layers == open_base(whole.files[1]).layers
    write_gguf(tensors, folder / "flux-F16.gguf", "flux", gguf.GGMLQuantizationType.F16)
    with pytest.raises(FormatError, match=r"several.*flux-F16\.gguf"):
        open_base(folder)
    save_file(tensors, folder / "model.safetensors")
    assert open_base(folder).files == [folder / "model.safetensors"]
    whole.files[0].unlink()
    with pytest.raises(FileError, match="00001-of-00002"):
        open_base(whole.files[1])


def test_a_file_that_is_cut_short_or_odd_is_damaged_wherever_it_is(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(flux(), path, "flux")
    content = path.read_bytes()
    end = GgufFile(path).entries[
        "x_embedder.weight" if "x_embedder.weight" in GgufFile(path).entries else "img_in.weight"
    ]
    for size in [*range(0, 400, 7), end.offset - 1, len(content) // 2, len(content) - 33]:
        path.write_bytes(content[:size])
        with pytest.raises(FileError, match=r"damaged GGUF|safetensors|too large"):
            open_base(path)


def test_a_file_that_changes_while_it_is_used(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(flux(), path, "flux")
    base = open_base(path)
    base.weight("transformer.x_embedder")
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(FileError, match="changed while it was used"):
        base.weight("transformer.context_embedder")


@st.composite
def damaged(draw, content, header):
    """Bits flipped, a number replaced, bytes put in or left out, all within the header."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place, way = draw(st.integers(4, header)), draw(st.sampled_from(("flip", "number", "insert", "leave out")))
        if way == "flip":
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif way == "number":
            number = draw(st.sampled_from((0, 1, 9, 255, 2**16, 2**31, 2**40, 2**63, 2**64 - 1)))
            changed[place : place + 8] = number.to_bytes(8, "little")
        elif way == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=20))
        else:
            del changed[place : place + draw(st.integers(1, 20))]
    return bytes(changed)


def test_a_damaged_header_gives_a_model_or_a_clear_error_soon(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf({f"blocks.{i}.x.weight": torch.randn(16, 64) for i in range(8)}, path, "flux")
    files = damaged(path.read_bytes(), min(entry.offset for entry in GgufFile(path).entries.values()))
    tally = Tally()

    def read(tally, path, choice):
        def weights():
            base = open_base(path)
            return [base.weight(name) for name in base.layers]

        tally.files += 1
        tally.results += tally.call(weights)

    attack(tally, files, path, read, 200, 1)
    tally.check()
    assert tally.errors
    assert tally.results


def header(fields=b"", tensors=b"", count=1, name=b"x.weight", sizes=(2, 2), kind=0, offset=0):
    """A GGUF file of one tensor of float32, or what a header may say instead."""

    def number(value, size=8):
        return value.to_bytes(size, "little")

    text = number(len(name)) + name + number(len(sizes), 4) + b"".join(map(number, sizes)) + number(kind, 4)
    start = b"GGUF" + number(3, 4) + number(count) + number(1 if fields else 0) + fields
    found = start + (tensors or text + number(offset))
    return found + bytes(-len(found) % 32) + bytes(64)


STRING = (5).to_bytes(8, "little") + b"a.key" + (8).to_bytes(4, "little")
LIMITS = {
    "tensors": (header(count=TENSORS + 1), f"more than {TENSORS} tensors"),
    "name": (header(name=b"x" * (NAME_CHARACTERS + 1)), f"more than {NAME_CHARACTERS} characters"),
    "dimensions": (header(sizes=(1,) * (DIMENSIONS + 1)), f"more than {DIMENSIONS} dimensions"),
    "numbers": (header(sizes=(0, NUMBERS + 1)), "larger than any model"),
    "metadata": (header(STRING + (HEADER_BYTES + 1).to_bytes(8, "little")), "header is too large"),
    "a type of tomorrow": (header(kind=999), "does not know.*upgrade"),
    "metadata of a type of tomorrow": (header(STRING[:-4] + b"\x63\0\0\0"), "damaged GGUF.*type 99"),
    "data outside": (header(offset=2**40), "damaged GGUF.*not whole"),
    "a name twice": (header(count=2, tensors=header()[24:72] * 2), "damaged GGUF.*twice"),
    "version 1": (b"GGUF\1" + header()[5:], "damaged GGUF.*version 2 or 3"),
    "big-endian": (b"GGUF\0\0\0\3" + header()[8:], "damaged GGUF.*version 2 or 3"),
}


@pytest.mark.parametrize(("content", "words"), LIMITS.values(), ids=LIMITS)
def test_limits_of_a_header(tmp_path, content, words):
    (tmp_path / "sound.gguf").write_bytes(header())
    assert GgufFile(tmp_path / "sound.gguf").tensor("x.weight").shape == (2, 2)
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(FileError, match=words) as caught:
        GgufFile(tmp_path / "a.gguf")
    assert len(str(caught.value)) < 1000


def test_an_adapter_in_gguf_says_what_is_wanted(tmp_path):
    write_gguf({"blk.0.attn_q.weight.lora_a": torch.ones(256, 256)}, tmp_path / "a.gguf", "llama")
    for read in (load_adapter, describe):
        with pytest.raises(FileError, match=r"GGUF.*safetensors is wanted"):
            read(tmp_path / "a.gguf")
