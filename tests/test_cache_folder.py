"""The folder of the cache: damage, other processes, other users, full disks, and where it is."""

import logging
import os
import pwd
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorax import Cache, FileError, OptionError, OutputError, open_cache
from lorax.compute.cache import STALE_SECONDS, Verified
from reliability import seeds
from reliability.faults import in_child


@settings(deadline=None)
@given(content=st.binary(max_size=200), place=st.integers(0), bit=st.integers(0, 7), cut=st.booleans())
def test_damage_is_found(tmp_path_factory, content, place, bit, cut):
    cache = Cache(tmp_path_factory.mktemp("cache"), 2**20)
    cache.write(content, "scores", "key")
    (path,) = (cache.folder / "scores").iterdir()
    assert cache.read("scores", "key") == content
    stored = bytearray(path.read_bytes())
    if cut:
        stored = stored[: place % len(stored)]
    else:
        stored[place % len(stored)] ^= 1 << bit
    path.write_bytes(stored)
    if cut and place % (len(content) + 4) == 0:
        assert cache.verify() == Verified(0, [path])
    else:
        assert cache.read("scores", "key") is None
    assert not path.exists()


def test_the_oldest_go_when_it_is_full_and_what_was_read_is_young(tmp_path):
    cache = Cache(tmp_path / "cache", 10_000)
    for i in range(9):
        cache.write(bytes(1000), "scores", i)
        os.utime(cache._path("scores", (i,)), (i, i))
    assert cache.read("scores", 0) is not None
    for i in range(9, 13):
        cache.write(bytes(1000), "scores", i)
    assert sum(kind["bytes"] for kind in cache.info().values()) <= 10_000
    assert cache.read("scores", 0) is not None
    assert cache.read("scores", 1) is None
    assert cache.read("scores", 12) is not None
    cache.write(bytes(10_000), "scores", "larger than all")
    assert cache.read("scores", "larger than all") is None


def test_clear_removes_only_what_is_ours(cache):
    cache.write(b"content", "scores", 1)
    other = cache.folder / "scores" / "thesis.txt"
    other.write_text("not ours")
    assert cache.clear() == 1
    assert [path.name for path in cache.folder.rglob("*") if path.is_file()] == [other.name]


def test_what_a_killed_process_left_is_swept(cache):
    left = cache.folder / "scores" / ".lorax-0123abcd.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    cache.write(b"content", "scores", 1)
    assert left.exists()  # it may be in use
    long_ago = time.time() - STALE_SECONDS - 1
    os.utime(left, (long_ago, long_ago))
    Cache(cache.folder, cache.limit).write(b"content", "scores", 2)
    assert not left.exists()


WRITE = """
import sys
from pathlib import Path
from lorax import Cache
cache = Cache(Path(sys.argv[1]), 2**30)
print("ready", flush=True)
for i in range(10**6):
    cache.write(bytes([i % 251]) * 300_000, "subspaces", i)
"""


@pytest.mark.parametrize("seconds", [0.01, 0.03, 0.1])
def test_killed_while_writing(cache, seconds):
    with subprocess.Popen([sys.executable, "-c", WRITE, cache.folder], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(seconds)
        writer.send_signal(signal.SIGKILL)
    assert cache.verify().damaged == []
    for i in range(cache.info().get("subspaces", {"entries": 0})["entries"]):
        assert cache.read("subspaces", i) == bytes([i % 251]) * 300_000


def command(bases, adapter, output, cache):
    words = [sys.executable, "-m", "lorax", "transfer", adapter, "--source", bases[0].files[0], "--target"]
    words += [bases[1].files[0], "-o", output, "--method", "project", "--rank", "20"]
    return words, os.environ | {"LORAX_CACHE": str(cache), "COLUMNS": "200"}


@pytest.mark.slow
def test_several_processes_use_one_cache(bases, lora_file, tmp_path):
    outputs = [tmp_path / f"{i}.safetensors" for i in range(3)]
    started = [
        subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for words, env in (command(bases, lora_file, output, tmp_path / "cache") for output in outputs)
    ]
    assert not any(b"cache" in process.communicate()[1] for process in started)
    assert len({output.read_bytes() for output in outputs}) == 1
    assert Cache(tmp_path / "cache", 2**30).verify().damaged == []


@pytest.mark.slow
def test_full_disk_costs_the_cache_only(bases, lora_file, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    small = tmp_path / "small.safetensors"
    tensors = load_file(lora_file)
    first = next(key for key in tensors if key.endswith("attn2_to_k.lora_up.weight")).removesuffix("lora_up.weight")
    save_file({key: tensor for key, tensor in tensors.items() if key.startswith(first)}, small)
    words, env = command(bases, small, tmp_path / "out.safetensors", tmp_path / "cache")
    words[words.index("20")] = "32"
    done = subprocess.run(words, env=env, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.count("results are not kept") == 1
    assert not [path for path in (tmp_path / "cache").rglob("*.part")]
    assert not Cache(tmp_path / "cache", 2**30).info().get("subspaces")


def test_the_environment_says_where_and_how_large(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAX_CACHE", "off")
    assert open_cache() is None
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path))
    monkeypatch.setenv("LORAX_CACHE_GB", "0.5")
    cache = open_cache()
    assert cache is not None
    assert (cache.folder, cache.limit) == (tmp_path, 2**29)


@pytest.mark.parametrize("size", ["much", "0", "-1", "nan", "inf"])
def test_a_size_of_the_cache_that_is_none(monkeypatch, tmp_path, size):
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path))
    monkeypatch.setenv("LORAX_CACHE_GB", size)
    with pytest.raises(OptionError, match="LORAX_CACHE_GB"):
        open_cache()


NOBODY = 65534


def as_nobody(work):
    """Run `work` as another user, for root reads and writes everywhere."""

    def other():
        if not os.geteuid():
            os.setegid(NOBODY)
            os.seteuid(NOBODY)
        work()

    return in_child(other)


@pytest.fixture
def shared():
    """A cache of two entries in a folder that other users may look into."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        cache = Cache(Path(name) / "cache", 2**30)
        for key in "ab":
            cache.write(b"content", "scores", key)
        yield cache


def test_a_cache_that_may_only_be_read_is_used(shared):
    for folder in (shared.folder, shared.folder / "scores"):
        folder.chmod(0o555)

    def work():
        assert shared.read("scores", "a") == b"content"
        assert shared.verify() == Verified(2)
        shared.write(b"more", "scores", "c")  # said by logging
        assert shared.read("scores", "c") is None
        with pytest.raises(OutputError, match=r"cannot be removed: 2 of 2.*Permission denied"):
            shared.clear()

    assert as_nobody(work) == 0
    assert shared.verify() == Verified(2)


def test_what_of_it_cannot_be_read_is_counted(shared, run, monkeypatch):
    shared._path("scores", ("a",)).chmod(0)

    def work():
        assert shared.read("scores", "a") is None
        found = shared.verify()
        assert (found.sound, list(found.left.values())) == (1, ["Permission denied"])

    def closed():
        for call in (shared.verify, shared.clear, shared.info):
            with pytest.raises(FileError, match=r"cannot read the cache.*Permission denied"):
                call()
        assert shared.read("scores", "a") is None

    assert as_nobody(work) == 0
    (shared.folder / "scores").chmod(0)
    assert as_nobody(closed) == 0
    (shared.folder / "scores").chmod(0o755)
    (shared.folder / "file").write_text("")
    monkeypatch.setenv("LORAX_CACHE", str(shared.folder / "file"))
    for word in ("info", "verify", "clear"):
        assert "cannot read the cache" in run("cache", word, status=1)[1]


def holes(path):
    path.write_bytes(b"")
    os.truncate(path, 3 * 2**40)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, holes, lambda path: path.symlink_to(path)],
                         ids=["pipe", "folder", "holes", "loop"])  # fmt: skip
def test_what_is_no_entry(cache, run, monkeypatch, make):
    cache.write(b"content", "scores", "a")
    cache.write(b"content", "scores", "b")
    path = cache._path("scores", ("a",))
    path.unlink()
    make(path)
    start = time.monotonic()
    assert cache.read("scores", "a") is None
    if make is holes:  # damaged, and removed
        make(path)
    assert cache.read("scores", "b") == b"content"
    found = cache.verify()
    assert found.sound == 1
    assert found.damaged + list(found.left) == [path]
    assert time.monotonic() - start < 5
    if make is os.mkdir:
        with pytest.raises(OutputError, match="1 of 2"):
            cache.clear()
        monkeypatch.setenv("LORAX_CACHE", str(cache.folder))
        assert "cannot be read or removed: 1" in run("cache", "verify", status=1)[1]
    else:
        cache.write(b"again", "scores", "a")
        assert cache.read("scores", "a") == b"again"
        assert cache.clear() == 2


@pytest.mark.slow
def test_a_look_at_it_while_another_process_lets_go_of_entries(cache):
    words = WRITE.replace("2**30", "3_000_000")
    writer = subprocess.Popen([sys.executable, "-c", words, cache.folder], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    looks, end = 0, time.monotonic() + 1.5
    while time.monotonic() < end:
        found = cache.verify()
        assert (found.damaged, found.left) == ([], {})
        cache.info()
        looks += 1
        if looks % 5 == 0:
            cache.clear()
    writer.kill()
    writer.communicate()
    assert looks > 5


def test_a_cache_that_is_off_is_no_folder(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAX_CACHE", "off")
    Cache(tmp_path / "off", 2**30).write(b"content", "scores", 1)
    for word in ("clear", "info", "verify"):
        assert "the cache is off" in run("cache", word, status=1)[1]
    assert Cache(tmp_path / "off", 2**30).read("scores", 1) == b"content"


def test_a_user_without_a_home(monkeypatch, run, caplog, tmp_path):
    def unknown(_):
        raise KeyError

    for name in ("LORAX_CACHE", "HOME", "USERPROFILE", "LOCALAPPDATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    source, target = (seeds.base_file(tmp_path / f"{name}.safetensors") for name in "st")
    (tmp_path / "a.safetensors").write_bytes(seeds.adapters()["lora"])
    with caplog.at_level(logging.WARNING):
        run("transfer", tmp_path / "a.safetensors", "--source", source, "--target", target, "-o", tmp_path / "out")
    assert [record.message.count("has no home") for record in caplog.records] == [1]
    assert (tmp_path / "out").exists()
    assert "has no home" in run("cache", "info", status=1)[1]
