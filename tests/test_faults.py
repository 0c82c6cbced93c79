"""Killed at every step on the disk, a full disk, a folder that cannot be written: no damaged file; a rerun works."""

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lorax import Cache, OutputError, cli, load_adapter, save_adapter
from lorax.files.output import check_output, write_bytes
from reliability import seeds
from reliability.faults import in_child, killed

pytestmark = pytest.mark.slow  # each fails at every step of a write

OLD, NEW = b"old" * 1000, b"new!" * 5000


def finals(folder):
    """Everything below a folder but what a killed process left, which nothing reads."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".part"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    for i in range(2):
        seeds.base_file(folder / f"{i}.safetensors", change=0.2 * i)
    (folder / "a.safetensors").write_bytes(seeds.adapters()["lora"])
    return folder


@pytest.mark.parametrize("old", [None, OLD], ids=["new", "replaced"])
@pytest.mark.parametrize("durable", [True, False], ids=["durable", "not durable"])
def test_write_bytes(tmp_path, old, durable):
    path = tmp_path / "out"
    if old:
        path.write_bytes(old)
    steps = []
    for step in killed(lambda: write_bytes(path, NEW, durable=durable)):
        steps.append(step)
        assert finals(tmp_path) in ([{Path("out"): c} for c in (old, NEW) if c] + [{}] * (old is None))
        write_bytes(path, NEW)
        assert finals(tmp_path) == {Path("out"): NEW}
        path.unlink()
        if old:
            path.write_bytes(old)
    assert len(steps) == 4 + durable  # open, write, fsync, rename, remove
    assert path.read_bytes() == NEW


def test_write_bytes_that_may_not_replace(tmp_path):
    path = tmp_path / "out"
    steps = []
    for step in killed(lambda: write_bytes(path, NEW, overwrite=False)):
        steps.append(step)
        assert finals(tmp_path) in ({}, {Path("out"): NEW})
        path.unlink(missing_ok=True)
    assert len(steps) == 5
    with pytest.raises(OutputError):
        write_bytes(path, OLD, overwrite=False)
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("old", [False, True])
def test_save_adapter(tmp_path, work, old):
    adapter = load_adapter(work / "a.safetensors")
    path = tmp_path / "out.safetensors"
    save_adapter(adapter, path)
    whole = path.read_bytes()
    before = OLD if old else None
    for _ in killed(lambda: save_adapter(adapter, path)):
        now = finals(tmp_path)
        assert now in ([{Path(path.name): c} for c in (before, whole) if c] + [{}] * (not old))
        path.unlink(missing_ok=True)
        if before:
            path.write_bytes(before)
    assert path.read_bytes() == whole


def test_cache(tmp_path):
    """Entries are written, read, and let go of where it is full; every kill leaves a sound cache that goes on."""

    def work():
        cache = Cache(tmp_path / "cache", 3000)
        for i in range(4):
            cache.write(bytes([i]) * 1000, "scores", i)
            assert cache.read("scores", i) == bytes([i]) * 1000

    steps = 0
    for steps in killed(work):
        cache = Cache(tmp_path / "cache", 3000)
        assert cache.verify().damaged == []
        for i in range(4):
            assert cache.read("scores", i) in (None, bytes([i]) * 1000)
        if steps % 2:  # begun anew, or gone on
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert steps > 15
    assert in_child(work) == 0


def command(work, out, *more):
    words = ["lorax", "transfer", work / "a.safetensors", "--source", work / "0.safetensors", "--target"]
    return [*map(str, [*words, work / "1.safetensors", "-o", out / "moved.safetensors", *more])]


def run(words):
    def main():
        sys.argv = words
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            cli.main()
        except SystemExit as left:
            os._exit(left.code or 0)

    return main


def test_a_whole_transfer_with_all_its_outputs(tmp_path, work):
    out = tmp_path / "out"
    more = [
        "--report",
        out / "r.json",
        "--png",
        out / "r.png",
        "--html",
        out / "r.html",
        "--save-assignment",
        out / "pairs.json",
    ]
    words = command(work, out, "--method", "copy", *more)
    out.mkdir()
    assert in_child(run(words)) == 0
    whole = finals(out)
    assert len(whole) == 5
    inputs = finals(work)
    shutil.rmtree(out)
    out.mkdir()
    steps = 0
    for steps in killed(run(words)):
        assert finals(out).items() <= whole.items()  # each is there and whole, or not there
        if steps == 7:
            assert in_child(run(words)) == 0
            assert finals(out) == whole
        shutil.rmtree(out)
        out.mkdir()
    assert steps == 5 * 5
    assert finals(out) == whole
    assert finals(work) == inputs


@pytest.mark.parametrize("output", ["--report", "--png", "--html", "--save-assignment"])
@pytest.mark.parametrize("size", [100, 1000])
def test_full_disk(tmp_path, work, output, size, capfd):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        run(command(work, tmp_path, output, tmp_path / "x"))()

    assert in_child(limited) == 1
    assert finals(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err.startswith("error: cannot write the output")


def test_full_file_system(tmp_path, work):
    """Where a small file system can be mounted: nothing is left of what does not fit, and what fitted before stays."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", tmp_path], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        path = tmp_path / "out"
        write_bytes(path, OLD)
        with pytest.raises(OutputError, match=os.strerror(errno.ENOSPC)):
            write_bytes(path, bytes(100_000))
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        assert path.read_bytes() == OLD
        assert in_child(run(command(work, tmp_path, "--dtype", "float32", "--method", "subspace-null"))) == 1
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


NOBODY = 65534


def test_a_folder_that_cannot_be_written(work):
    """As another user, for root writes everywhere."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in work.iterdir():
            shutil.copy(file, folder)
        out = folder / "out"
        out.mkdir()
        out.chmod(0o555)
        folder.chmod(0o755)

        def as_nobody():
            if not os.geteuid():
                os.setegid(NOBODY)
                os.seteuid(NOBODY)
            os.environ["LORAX_CACHE"] = str(out / "cache")  # which costs the cache only
            words = command(folder, out, "--method", "copy")
            with pytest.raises(OutputError, match="cannot be written"):
                save_adapter(load_adapter(folder / "a.safetensors"), out / "x")
            with pytest.raises(OutputError, match="cannot write"):
                write_bytes(out / "x", NEW)
            run(words)()

        assert in_child(as_nobody) == 1
        assert list(out.iterdir()) == []


def test_the_longest_names(tmp_path, work):
    """The longest that the disk takes, and what is too long by itself: said before any work is done."""
    adapter = load_adapter(work / "a.safetensors")
    for length in (256, 5000):
        with pytest.raises(OutputError, match=r"a name that no file has.*too long"):
            check_output(tmp_path / ("x" * length), [])
        with pytest.raises(OutputError, match="too long"):
            write_bytes(tmp_path / ("x" * length), NEW)
    save_adapter(adapter, tmp_path / ("x" * 255))
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


def test_the_tool_on_the_command_line(tmp_path, work):
    words = [sys.executable, "-m", "reliability.faults", "0", *command(work, tmp_path)[1:]]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.stderr.splitlines()[-1] == "5 steps"
    (tmp_path / "moved.safetensors").unlink()
    words[3] = "2"
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == -9
    assert finals(tmp_path) == {}


def test_two_processes_on_one_output(tmp_path, work):
    """Whoever is last wins; the file is always whole."""
    started = [
        subprocess.Popen([sys.executable, "-m", *command(work, tmp_path)], cwd=Path(__file__).parents[1], stdout=-3)
        for _ in range(2)
    ]
    assert [process.wait() for process in started] == [0, 0]
    assert list(finals(tmp_path)) == [Path("moved.safetensors")]
    assert load_adapter(tmp_path / "moved.safetensors").layers
    assert list(tmp_path.iterdir()) == [tmp_path / "moved.safetensors"]
