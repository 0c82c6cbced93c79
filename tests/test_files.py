"""Files that change while they are used, and what their headers may say: the library is the measure."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lorax import Cache, Engine, FileError, TransferOptions, load_adapter, open_base, transfer_adapter
from lorax.files.tensorfile import BYTES, TensorFile, file_hash, file_state
from lorax.train.state import Checkpoint
from reliability import seeds

ROOT = Path(__file__).parents[1]


@pytest.fixture
def work(tmp_path):
    """Two bases, the content of a third of the same size, and an adapter."""
    seeds.base_file(tmp_path / "s.safetensors")
    seeds.base_file(tmp_path / "t.safetensors", change=0.2)
    seeds.base_file(tmp_path / "new", seed=77)
    (tmp_path / "a.safetensors").write_bytes(seeds.adapters()["lora"])
    return tmp_path


def in_place(path, content):
    path.write_bytes(content)


def replaced(path, content):
    """With the size and the time of the old one, as archives and stores set it."""
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


def led_elsewhere(path, content):
    other = path.with_name("elsewhere")
    other.write_bytes(content)
    path.unlink()
    path.symlink_to(other)


CHANGES = {
    "in place": in_place,
    "replaced": replaced,
    "led elsewhere": led_elsewhere,
    "cut short": lambda path, _: os.truncate(path, path.stat().st_size - 8),
    "emptied": lambda path, _: os.truncate(path, 0),
    "longer": lambda path, content: path.write_bytes(path.read_bytes() + b"x"),
    "gone": lambda path, _: path.unlink(),
    "a pipe": lambda path, _: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path, _: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_opened_is_read_or_nothing(work, change):
    base, file = open_base(work / "t.safetensors"), TensorFile(work / "t.safetensors")
    first, *_, last = base.layers
    base.weight(first)
    change(work / "t.safetensors", (work / "new").read_bytes())
    for read in (lambda: base.weight(last), lambda: file.tensor(next(iter(file.entries))), file.content):
        with pytest.raises(FileError, match=r"t\.safetensors"):
            read()


def test_a_file_that_stays_as_it_is_is_read_again_and_again(work):
    file = TensorFile(work / "t.safetensors")
    os.utime(work / "t.safetensors", ns=(1, file.state[1])) if os.name == "nt" else None
    (work / "t.safetensors").read_bytes()  # the time of reading tells nothing
    tensors = load_file(work / "t.safetensors")
    assert all(torch.equal(file.tensor(key), tensors[key]) for key in file.entries)
    assert file.content() == (work / "t.safetensors").read_bytes()
    assert file.state == file_state(work / "t.safetensors")
    assert open_base(work / "t.safetensors").state == open_base(work / "t.safetensors").state


def moved(engine, rank, source, target, work, **more):
    adapter = load_adapter(work / "a.safetensors", source)
    return transfer_adapter(
        adapter, source, target, TransferOptions(method="project", rank=rank), engine=engine, **more
    )[0]


def equal(one, other):
    return all(torch.equal(one.layers[name].lora_up, other.layers[name].lora_up) for name in one.layers)


@pytest.mark.parametrize("held", [False, True], ids=["while it is read", "between two transfers"])
def test_nothing_of_a_new_file_is_kept_as_of_the_old(work, held):
    """Saved again under a transfer, or while a program holds the base; the old one comes back under another name."""
    engine = Engine(cache=Cache(work / "cache", 2**30))
    t, old, new = work / "t.safetensors", (work / "t.safetensors").read_bytes(), (work / "new").read_bytes()
    source, target = open_base(work / "s.safetensors"), open_base(t)
    moved(engine, 8, source, target, work)  # what names the weights is known now
    if held:
        t.write_bytes(new)
        with pytest.raises(FileError, match="changed"):
            moved(engine, 12, source, target, work)
    else:
        with pytest.raises(FileError, match="changed"):
            moved(engine, 12, source, open_base(t), work, progress=lambda *_: t.write_bytes(new))
    copy = work / "copy.safetensors"
    copy.write_bytes(old)
    for file in (copy, t):  # the old one, and then the new one
        plain = moved(Engine(), 12, source, open_base(file), work)
        assert equal(moved(engine, 12, source, open_base(file), work), plain)
        assert equal(moved(engine, 12, source, open_base(file), work), plain)


def test_an_adapter_is_of_one_state(work, monkeypatch):
    """Replaced after its first tensor was read, by another with the same header."""
    path, kept = work / "a.safetensors", TensorFile.tensor

    def tensor(self, key, rows=None):
        found = kept(self, key, rows)
        save_file({name: part + 1 for name, part in load_file(path).items()}, path.with_name("b"), self.metadata)
        os.replace(path.with_name("b"), path)
        return found

    monkeypatch.setattr(TensorFile, "tensor", tensor)
    with pytest.raises(FileError, match="changed while it was used"):
        load_adapter(path)


READ = """
import sys
from lorax import LoraxError, load_adapter
while True:
    try: load_adapter(sys.argv[1])
    except LoraxError: pass
    print(flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a file that is open cannot be cut there")
def test_a_file_that_is_cut_while_it_is_opened_does_not_end_the_process(work):
    path = work / "a.safetensors"
    whole = path.read_bytes()
    reader = subprocess.Popen([sys.executable, "-c", READ, path], stdout=subprocess.PIPE, cwd=ROOT)
    assert reader.stdout is not None
    reader.stdout.readline()
    end = time.monotonic() + 2
    while time.monotonic() < end and reader.poll() is None:
        path.write_bytes(whole)
        time.sleep(0.0005)
        os.truncate(path, 0)
    reader.send_signal(signal.SIGKILL)
    assert len(reader.communicate()[0]) > 20
    assert reader.returncode == -signal.SIGKILL


def test_a_training_goes_on_from_one_state(tmp_path):
    path = tmp_path / "step"
    seeds.training().save(path)
    again = seeds.training()
    again.load(path)
    assert again.losses == [1.0]
    opened = TensorFile(path)
    other = Checkpoint(again.names, again.parameters, again.optimizer, [2.0])
    other.save(path)
    with pytest.raises(FileError, match="changed"):
        opened.content()


def test_the_hash_of_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert file_hash(tmp_path / "pipe") == file_hash(tmp_path) == file_hash(tmp_path / "none") == ""
    assert file_hash(Path("a\0b")) == file_hash(Path("\ud800")) == ""


# -------------------------------------------------------------------------------------------------------- the header


@st.composite
def headers(draw):
    """A header whose tensors follow one another, with at most two things that may be wrong; and so many bytes."""
    header, place = {}, 0
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.sampled_from([None, {}, {"a": "b"}, {"a": 1}, [], "", 0, {"a": None}]))
    for name in draw(st.lists(st.sampled_from("abcdé"), unique=True, max_size=4)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        dtype = draw(st.sampled_from([*BYTES]))
        size = BYTES[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    names = [name for name in header if name != "__metadata__"]
    for _ in range(draw(st.integers(0, 2)) if names else 0):
        entry = header[draw(st.sampled_from(names))]
        if not isinstance(entry, dict):
            continue
        part = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more", "less"]))
        wrong = st.one_of(
            st.lists(st.integers(-1, 16), min_size=1, max_size=3),
            st.sampled_from([None, 1, "F32", "F16", [], {}, [0, 1.0], [True, 1], [0, 2**64], ["0", "4"]]),
        )
        if part == "more":
            entry["more"] = 5
        elif part == "less":
            entry.pop(draw(st.sampled_from([*entry])))
        else:
            entry[part] = draw(wrong)
    text = (
        json.dumps(header).encode() + b" " * draw(st.integers(0, 3)) + draw(st.sampled_from([b"", b"", b"\0", b"{}"]))
    )
    return text, max(0, place + draw(st.sampled_from([0, 0, 0, 1, -1, 8])))


@settings(deadline=None, max_examples=400)
@given(made=headers())
def test_a_header_is_sound_where_the_library_says_so(made, tmp_path_factory):
    """It maps a file to check it, so its check is ours here: what it refuses is refused, what it takes is taken."""
    text, size = made
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    try:
        with safe_open(path, "pt") as opened:
            theirs = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
            words = opened.metadata() or {}
    except SafetensorError:
        with pytest.raises(FileError, match=r"header\.safetensors"):
            TensorFile(path)
    else:
        ours = TensorFile(path)
        assert {key: list(entry.shape) for key, entry in ours.entries.items()} == theirs
        assert ours.metadata == words


@pytest.mark.parametrize("places", [[[0, 4], [0, 4]], [[0, 4], [2, 6]], [[4, 8], [4, 8]], [[0, 4], [8, 12]]])
def test_tensors_that_share_data_or_leave_some_out(tmp_path, places):
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": place} for name, place in zip("ab", places, strict=True)
    }
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(SafetensorError):
        safe_open(path, "pt")
    with pytest.raises(FileError, match="damaged"):
        TensorFile(path)


@pytest.mark.parametrize("text", [b'"\\ud800"', b'"\xff"', b'"x"'])
def test_names_that_are_half_a_character(tmp_path, text):
    header = b'{%s:{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' % text
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    if text == b'"x"':
        assert list(TensorFile(path).entries) == ["x"]
    else:
        with pytest.raises(FileError, match="damaged"):
            TensorFile(path)


def test_a_dtype_that_came_later_hides_only_its_own_tensor(tmp_path):
    entries = {"new": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    entries["x"] = {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}
    text = json.dumps(entries).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(6))
    assert TensorFile(path).tensor("x").item() == 0
    with pytest.raises(FileError, match="F4"):
        TensorFile(path).tensor("new")
