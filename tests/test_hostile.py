"""What hostile files try, one by one: limits, names as data, links, bombs, and what the product must never do."""

import ast
import json
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lorax import (
    FileError,
    FormatError,
    LoraxError,
    NumericsError,
    TransferOptions,
    compare_bases,
    convert_to_lora,
    convert_to_lora_x,
    load_adapter,
    load_assignment,
    open_base,
    save_adapter,
    similarity_json,
    transfer_adapter,
)
from lorax.adapters.layer import RANK, WEIGHT
from lorax.console import png
from lorax.files.tensorfile import DIMENSIONS, HEADER_BYTES, NAME_CHARACTERS, NUMBERS, TENSORS, TensorFile, parse_json
from lorax.inspect import DENSE, describe
from lorax.show.pictures import retained_picture
from reliability import seeds
from reliability.mutations import build
from reliability.readers import Tally
from tests.commands import FORBIDDEN, ROOT, RUN

UP, DOWN = f"lora_unet_{seeds.QUERY}.lora_up.weight", f"lora_unet_{seeds.QUERY}.lora_down.weight"
# What a name may try: colours, a cursor that moves, a bell, a new line, text that runs backwards, markup, HTML, a path.
EVIL = "\x1b[31m\x1b[2J\x07\r\n\u202e\x9b[bold]<img src=x onerror=alert(1)>/../../etc/passwd"


def header(entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return [open_base(seeds.base_file(folder / f"{i}.safetensors", change=0.2 * i)) for i in range(2)]


def entry(shape, place=0, size=0):
    return {"dtype": "F32", "shape": shape, "data_offsets": [place, place + size]}


TWICE = b'{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
LIMITS = {
    "header": ((HEADER_BYTES + 1).to_bytes(8, "little") + b"{" + b" " * HEADER_BYTES, "header is too large"),
    "tensors": (header({f"{i}.diff": entry([0]) for i in range(TENSORS + 1)}), f"more than {TENSORS} tensors"),
    "many tensors": (header({f"{i}.diff": entry([0]) for i in range(3 * TENSORS)}), f"more than {TENSORS + 2} objects"),
    "name": (header({"x" * (NAME_CHARACTERS + 1) + ".diff": entry([0])}), f"more than {NAME_CHARACTERS} characters"),
    "name of 10 MB": (header({"9" * 10**7: entry([0])}), f"more than {NAME_CHARACTERS} characters"),
    "dimensions": (header({"x.diff": entry([0] * (DIMENSIONS + 1))}), f"more than {DIMENSIONS} dimensions"),
    "dimensions, very many": (header({"x.diff": entry([1] * 10**5, size=4)}) + bytes(4), "dimensions"),
    "numbers": (header({"x.diff": entry([0, NUMBERS + 1])}), "larger than any model"),
    "numbers that overflow": (header({"x.diff": entry([0, 2**62, 2**62])}), "larger than any model|damaged"),
    "nesting": (b"\x10\x27\0\0\0\0\0\0" + b'{"a":' * 2000, "nested too deep"),
    "a name twice": (
        len(TWICE).to_bytes(8, "little") + TWICE, "a name twice"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("content", "words"), LIMITS.values(), ids=LIMITS)
def test_limits_of_a_file(tmp_path, content, words):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    for read in (TensorFile, load_adapter, open_base, describe):
        start = time.process_time()
        with pytest.raises(FileError, match=words) as caught:
            read(path)
        assert time.process_time() - start < 1
        assert len(str(caught.value)) < 1000


def test_a_file_at_the_limits_is_read(tmp_path):
    """As many tensors as there may be, with the longest names; an adapter of a hundred times the usual size."""
    names = [f"{i:06}.{'x' * 200}.diff" for i in range(TENSORS)]
    path = tmp_path / "a.safetensors"
    path.write_bytes(
        header({name: entry([1], 0, 4) if not i else entry([0], 4) for i, name in enumerate(names)}) + bytes(4)
    )
    assert len(TensorFile(path).entries) == TENSORS


def test_limits_of_a_layer(tmp_path):
    path = tmp_path / "a.safetensors"

    def refused(words, **tensors):
        save_file({f"lora_unet_x.{name.replace('__', '.')}": part for name, part in tensors.items()}, path)
        with pytest.raises(FormatError, match=words):
            load_adapter(path)
        with pytest.raises(FormatError):
            describe(path)

    e = torch.zeros
    refused("rank", lora_up__weight=e(2, RANK + 1), lora_down__weight=e(RANK + 1, 2))
    refused("rank", foura_up__weight=e(2, RANK + 1), foura_down__weight=e(RANK + 1, 2), foura_gate=e(RANK + 1))
    refused("rank", lokr_w1=e(1, 1), lokr_w2_a=e(2, RANK + 1), lokr_w2_b=e(RANK + 1, 2))
    side = int(WEIGHT**0.5) + 1
    refused("larger than any", lora_up__weight=e(side, 1), lora_down__weight=e(1, side))
    refused("larger than any", lokr_w1=e(side, 1), lokr_w2=e(1, side))
    loha = {f"hada_w{i}_{s}": e(side, 1) if s == "a" else e(1, side) for i in "12" for s in "ab"}
    refused("larger than any", **loha)
    middle = {"lora_up__weight": e(1, 1000), "lora_down__weight": e(1000, 20_000, 1, 1)}
    refused(
        "lora_mid", **middle, lora_mid__weight=torch.zeros(1000, 1000, 8, 8, dtype=torch.float16)[:1000, :1000, :8, :8]
    )


def test_a_rank_above_its_layer_costs_what_the_file_costs(tmp_path, pair):
    """A Gram matrix of the rank would take 2 GB."""
    path = tmp_path / "a.safetensors"
    up, down = torch.randn(32, RANK) / 100, torch.randn(RANK, 32) / 100
    save_file({UP: up, DOWN: down}, path)
    adapter = load_adapter(path, pair[0])
    (layer,) = adapter.layers.values()
    assert layer.norm() == pytest.approx(float((up.double() @ down.double()).norm()), rel=1e-5)
    tally = Tally()
    for work in (
        lambda: describe(path),
        lambda: transfer_adapter(adapter, *pair, TransferOptions(method="project", rank=8)),
    ):
        assert tally.call(work)
    tally.check()


def test_a_bomb_is_not_unfolded_to_be_described(tmp_path):
    """A small file stands for a dense update of more numbers than are worth their norm."""
    side = int(DENSE**0.5) + 1
    save_file(_loha(side), tmp_path / "a.safetensors")
    start = time.process_time()
    facts = describe(tmp_path / "a.safetensors")
    assert facts["norm"] is None
    assert facts["rows"][0]["shape"] == [side, side]
    assert time.process_time() - start < 1


@pytest.mark.slow
def test_the_largest_that_is_unfolded_fits_the_memory(tmp_path):
    side = int(DENSE**0.5)
    save_file(_loha(side), tmp_path / "a.safetensors")
    program = "import sys, lorax.inspect as i; print(i.describe(sys.argv[1])['norm']); "
    program += "from benchmarks.memory import peak; print(peak())"
    command = [sys.executable, "-c", program, tmp_path / "a.safetensors"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    norm, peak = map(float, told.stdout.split())
    assert norm == pytest.approx(side, rel=1e-6)
    assert peak < 1.3 * 2**30  # torch itself, and three matrices of float32


def _loha(side):
    shapes = {"a": (side, 1), "b": (1, side)}
    return {f"lora_unet_x.hada_w{i}_{s}": torch.ones(shapes[s]) for i in "12" for s in "ab"}


@pytest.mark.slow
def test_time_grows_with_the_tensors_and_no_faster(tmp_path):
    """Modules of no family, more than any adapter has: four times as many take four times as long, not sixteen."""

    def seconds(count):
        tensors = {f"lora_unet_thing_{i}_x.diff": torch.ones(1, 1) for i in range(count)}
        save_file(tensors, tmp_path / "a.safetensors")
        start = time.process_time()
        assert len(load_adapter(tmp_path / "a.safetensors").layers) == count
        return time.process_time() - start

    seconds(100)  # imports, first use
    few, many = seconds(2_500), seconds(10_000)
    assert many < 8 * few, (few, many)


NOT_FILES = {
    "pipe": lambda p: os.mkfifo(p),
    "device": lambda p: p.symlink_to("/dev/zero"),
    "loop": lambda p: p.symlink_to(p),
}


@pytest.mark.parametrize("make", NOT_FILES.values(), ids=NOT_FILES)
def test_what_is_no_file_is_not_waited_for(tmp_path, pair, make):
    path = tmp_path / "a.safetensors"
    make(path)
    for read in (load_adapter, open_base, describe):
        with pytest.raises(FileError, match=r"not a file|cannot open"):
            read(path)
    with pytest.raises(FormatError, match="not an assignment"):
        load_assignment(path, *pair)


def test_paths_that_the_system_refuses(tmp_path, pair):
    for path in (tmp_path / ("x" * 5000), tmp_path / "x" / ("y/" * 3000)):
        for read in (load_adapter, open_base, describe):
            with pytest.raises(FileError):
                read(path)
        with pytest.raises(FormatError):
            load_assignment(path, *pair)


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


def test_numbers_that_grow_beyond_their_dtype(tmp_path, pair):
    """Finite in the file, infinite as an update: said, and nothing is written."""
    path = tmp_path / "a.safetensors"
    save_file({UP: torch.full((32, 2), 3e38), DOWN: torch.full((2, 32), 3e38)}, path)
    adapter = load_adapter(path, pair[0])
    for method in ("project", "align", "subspace-null", "index"):
        with pytest.raises(NumericsError, match=r"grows beyond its dtype.*attn1\.to_q"):
            transfer_adapter(adapter, *pair, TransferOptions(method=method, rank=8))
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


def test_a_projection_of_the_text_that_is_no_matrix(tmp_path, pair):
    tensors = load_file(pair[0].files[0])
    key = next(key for key in tensors if key.endswith("attn2.to_k.weight"))
    for tensor in (tensors[key][:, 0].contiguous(), tensors[key][0, 0].clone()):
        save_file({**tensors, key: tensor}, tmp_path / "b.safetensors")
        assert open_base(tmp_path / "b.safetensors").family.name != "sd1"
        assert describe(tmp_path / "b.safetensors")["kind"] == "base"


@pytest.mark.parametrize("shape", [(3,), (7, 1), (2, 8, 8), (8, 8, 1, 1)])
def test_a_scale_that_does_not_fit_its_weight(tmp_path, shape):
    weight = torch.ones(8, 8).to(torch.float8_e4m3fn)
    path = tmp_path / "b.safetensors"
    save_file({"blocks.0.x.weight": weight, "blocks.0.x.scale_weight": torch.full(shape, 2.0)}, path)
    with pytest.raises(FileError, match=r"scale.*blocks\.0\.x\.scale_weight"):
        open_base(path).weight("transformer.blocks.0.x")
    for fitting in ((), (1,), (8, 1), (1, 1)):
        save_file({"blocks.0.x.weight": weight, "blocks.0.x.scale_weight": torch.full(fitting, 2.0)}, path)
        assert torch.equal(open_base(path).weight("transformer.blocks.0.x"), torch.full((8, 8), 2.0))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF\3\0\0\0\0\0\0\0\0\0\0\0", "GGUF.*bf16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4\n", "Git LFS.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page.*download"),
        (b"<html><head>", "web page.*download"),
    ],
)
def test_what_people_take_for_a_safetensors_file_is_named(tmp_path, content, words):
    (tmp_path / "a.safetensors").write_bytes(content)
    for read in (open_base, load_adapter, describe):
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


# ------------------------------------------------------------------------------------------------------ names as data


def is_harmless(text):
    return all(c.isprintable() or c == "\n" for c in text)


@pytest.fixture
def evil(tmp_path):
    """An adapter and two bases of no family, whose names, keys and metadata try everything."""
    folder = tmp_path / EVIL.replace("/", "_")
    folder.mkdir()
    base = {f"blocks.{i}.attn{EVIL}.weight": torch.randn(8, 8) for i in range(2)} | {
        "blocks.0.mlp.weight": torch.randn(8, 8)
    }
    for i in range(2):
        save_file({key: value + i / 10 for key, value in base.items()}, folder / f"{i}.safetensors", {EVIL: EVIL})
    adapter = {f"{EVIL}.nothing": torch.ones(1), f"unet.blocks.0.{EVIL}.lora_up.weight": torch.ones(8, 1)}
    for module in (*base, f"elsewhere{EVIL}"):
        module = f"unet.{module.removesuffix('.weight')}"
        adapter |= {f"{module}.lora_up.weight": torch.randn(8, 2), f"{module}.lora_down.weight": torch.randn(2, 8)}
    save_file(adapter, folder / "a.safetensors", {"base_family": EVIL, EVIL: EVIL, "ss_output_name": EVIL})
    return folder


@pytest.mark.slow
def test_nothing_in_a_name_reaches_the_screen(evil, tmp_path):
    a, s, t = (evil / f"{name}.safetensors" for name in "a01")
    out = tmp_path / "out"
    out.mkdir()
    bases = ["--source", s, "--target", t]
    commands = [
        (0, "inspect", a), (0, "inspect", a, "--json"), (0, "inspect", s), (0, "inspect", s, "--json"),
        (0, "similarity", s, t, "--layers", "all", "--json", out / "s.json", "--png", out / "s.png",
            "--html", out / "s.html"),
        (0, "migrate", evil, *bases, "-o", out / "library", "--workers", "1", "--report", out / "m.json"),
        (0, "transfer", a, *bases, "-o", out / "m", "--report", out / "r.json", "--png", out / "r.png",
            "--html", out / "r.html", "--save-assignment", out / "pairs.json"),
        (0, "convert", a, "--to", "lora-x", "--source", s, "-o", out / "x", "--rank", "4"),
        (0, "convert", a, "--to", "lora", "-o", out / "l"),
        (0, "cache", "info"), (0, "cache", "verify"), (0, "cache", "clear"),
        (1, "transfer", a, *bases, "-o", out / "m", "--strict"),
        (1, "transfer", a, *bases, "-o", evil / "no" / EVIL), (1, "inspect", evil), (1, "inspect", evil / "nowhere"),
        (1, "transfer", a, *bases, "-o", out / "m", "--assignment", evil / "nowhere"),
        (1, "similarity", s, t, "--rank", EVIL), (2, "inspect", a, evil), (2, "convert", a, "--to", EVIL), (2, EVIL),
        (2, "inspect", a, f"--{EVIL}"),
    ]  # fmt: skip
    words = [[status, [*map(str, words)]] for status, *words in commands]
    environment = os.environ | {"LORAX_CACHE": str(evil / "cache"), "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(words)], env=environment, capture_output=True, cwd=ROOT, check=False
    )
    shown = done.stdout.decode() + done.stderr.decode()
    assert done.returncode == 0, shown[-3000:]
    assert shown.count("=== ") == len(commands)
    assert "onerror" in shown  # the names were shown
    # Of what is wrong usage typer shows the user's own words; it escapes what a terminal would obey.
    for part in shown.replace("\u202e", "").split("=== "):
        assert is_harmless(part), part
    assert shown.count("\u202e") <= 4
    for name in ("s.html", "r.html"):
        text = (out / name).read_text()
        assert is_harmless(text)
        assert "onerror" in text
        assert "<img" not in text
    for name in ("s.json", "r.json", "m.json", "pairs.json"):
        text = (out / name).read_text()
        assert is_harmless(text)
        assert "onerror" in text or name == "pairs.json"
    for name in ("s.png", "r.png"):
        with Image.open(out / name) as image:
            assert image.width > 100


def test_pictures_of_names_that_try_things(evil):
    source, target = (open_base(evil / f"{i}.safetensors") for i in range(2))
    adapter = load_adapter(evil / "a.safetensors", source)
    _, report = transfer_adapter(adapter, source, target, TransferOptions(threshold=-1))
    assert retained_picture(report).width > 100
    result = compare_bases(source, target, attention_only=False)
    assert png(result)
    assert json.loads(json.dumps(similarity_json(result)))["kinds"]


def opened_by(work):
    """Return the files that a call opens to read or write, by what the interpreter tells."""
    files = []

    def told(event, arguments):
        if event == "open" and isinstance(arguments[0], str | bytes) and listening:
            files.append(os.fsdecode(arguments[0]))

    listening = True
    sys.addaudithook(told)
    work()
    listening = False
    return files


def test_no_path_from_a_file_is_opened(tmp_path, pair):
    path, secret = tmp_path / "adapter_model.safetensors", tmp_path / "secret.json"
    secret.write_text("{}")
    names = {
        key: str(secret)
        for key in ("base_model_name_or_path", "ss_sd_model_name", "modelspec.thumbnail", "base_family")
    }
    save_file(
        {f"{seeds.PEFT}.lora_A.weight": torch.ones(2, 32), f"{seeds.PEFT}.lora_B.weight": torch.ones(32, 2)},
        path,
        names,
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "parent_library": str(secret), **names}))
    files = opened_by(lambda: (describe(path), transfer_adapter(load_adapter(path, pair[0]), *pair)))
    own = {str(path), str(tmp_path / "adapter_config.json"), *(str(base.files[0]) for base in pair)}
    assert str(path) in files
    assert {
        file for file in files if not file.endswith((".py", ".pyc", ".toml", ".json")) or str(tmp_path) in file
    } <= own


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    folder = seeds.base_folder(tmp_path / "model")
    outside = tmp_path / "outside.safetensors"
    save_file({"conv_in.weight": torch.zeros(32, 4, 3, 3)}, outside)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(
        json.dumps(
            {"weight_map": {"conv_in.weight": "../../outside.safetensors", "x": str(outside), "y": "/etc/passwd"}}
        )
    )

    def opened():
        with pytest.raises(FileError, match="index"):
            open_base(folder)

    files = opened_by(opened)
    assert {Path(file).name for file in files if str(tmp_path) in file} == {index.name}
    assert not [file for file in files if "passwd" in file]


@pytest.mark.parametrize("target", ["elsewhere/file", "elsewhere/nothing", "/nowhere/at/all"])
def test_an_output_that_is_a_link_is_replaced_and_not_followed(tmp_path, target):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("not ours")
    (tmp_path / "a.safetensors").write_bytes(seeds.adapters()["lora"])
    link = tmp_path / "out.safetensors"
    link.symlink_to(target)
    save_adapter(load_adapter(tmp_path / "a.safetensors"), link)
    assert not link.is_symlink()
    assert load_adapter(link).layers
    assert [(p.name, p.read_text()) for p in (tmp_path / "elsewhere").iterdir()] == [("file", "not ours")]


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
    for text, words in (
        ("[" * 10**5, "deep"),
        ('{"a": 1, "a": 2}', "twice"),
        ("{", "property name"),
        ("9" * 5000, "digits"),
        (b"\xff", "decode"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_json(text)
    with pytest.raises(ValueError, match="more than 2 objects"):
        parse_json("[{}, {}, {}]", objects=2)


# ------------------------------------------------------------------------------------------------- what is never done


@pytest.mark.slow
def test_no_network_no_pickle_no_other_program(tmp_path, pair):
    """The whole command line, under a hook of the interpreter that ends it at the first forbidden thing."""
    a, x = tmp_path / "a.safetensors", tmp_path / "x.safetensors"
    a.write_bytes(seeds.adapters()["lora"])
    folder = seeds.base_folder(tmp_path / "folder")
    s, t = (base.files[0] for base in pair)
    bases = ["--source", s, "--target", t]
    pickle = tmp_path / "old.ckpt"
    torch.save({"x": torch.ones(1)}, pickle)
    commands = [
        (0, "inspect", a), (0, "inspect", s), (0, "inspect", folder), (1, "inspect", pickle),
        (0, "similarity", s, t, "--json", tmp_path / "s.json", "--png", tmp_path / "s.png",
            "--html", tmp_path / "s.html"),
        (0, "transfer", a, *bases, "-o", tmp_path / "m", "--report", tmp_path / "r.json", "--png", tmp_path / "r.png",
            "--save-assignment", tmp_path / "pairs.json", "--html", tmp_path / "r.html",
            "--method", "project", "--rank", "8"),
        (0, "transfer", a, "--source", folder, "--target", t, "-o", tmp_path / "m", "--method", "align",
            "--assignment", tmp_path / "pairs.json"),
        (1, "transfer", pickle, *bases, "-o", tmp_path / "n"),
        (1, "transfer", a, "--source", pickle, "--target", t, "-o", x),
        (0, "convert", a, "--to", "lora-x", "--source", s, "-o", x, "--rank", "8"),
        (0, "convert", x, "--to", "lora", "--source", s, "-o", tmp_path / "l"),
        (0, "cache", "info"), (0, "cache", "verify"), (0, "cache", "clear"), (2, "nonsense"), (0, "--version"),
    ]  # fmt: skip
    words = json.dumps([[status, [*map(str, words)]] for status, *words in commands])
    environment = os.environ | {"LORAX_CACHE": str(tmp_path / "cache")}
    code = FORBIDDEN + RUN
    done = subprocess.run(
        [sys.executable, "-c", code, words], env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("=== ") == len(commands)


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["import socket; socket.socket()", "import pickle; pickle.loads(b'cos\\nsystem\\n.')",
    "import subprocess; subprocess.run(['true'])", "import os; os.system('true')"])  # fmt: skip
def test_the_hook_sees_what_is_forbidden(deed):
    done = subprocess.run([sys.executable, "-c", FORBIDDEN + deed], capture_output=True, text=True, check=False)
    assert done.returncode == 99
    assert "FORBIDDEN" in done.stderr


SOURCES = sorted(path for part in ("lorax", "nodes") for path in (ROOT / part).rglob("*.py"))
# Modules that unpickle, talk to the network, run other programs or code.
MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "socket", "ssl", "http",
    "urllib", "ftplib", "smtplib", "telnetlib", "xmlrpc", "requests", "httpx", "aiohttp", "urllib3",
    "huggingface_hub", "subprocess", "ctypes", "pty", "webbrowser", "code", "codeop", "runpy", "xml",
}  # fmt: skip
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.spawnv", "os.startfile",
    "torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "torch.package", "np.load", "numpy.load",
    "np.memmap", "yaml.load", "tempfile.mktemp", "input",
}  # fmt: skip


def forbidden(tree):
    """Return what a module imports or calls of these, as far as its text tells."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if (node.module or "").split(".")[0] in MODULES:
                yield node.module
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS or name.startswith(("torch.hub.", "torch.jit.", "torch.package.")):
                yield name
            elif name.endswith("import_module") and not ast.unparse(node.args[0]).startswith("f'.{"):
                yield f"{name}({ast.unparse(node.args[0])})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_source_imports_and_calls_nothing_forbidden(path):
    assert not [*forbidden(ast.parse(path.read_text()))]


def test_the_look_at_the_source_sees_what_is_forbidden():
    text = "import pickle, os.path\nfrom urllib.request import urlopen\ntorch.load(x)\neval('1')\nimport_module(name)"
    assert sorted(forbidden(ast.parse(text))) == [
        "eval",
        "import_module(name)",
        "pickle",
        "torch.load",
        "urllib.request",
    ]


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
