"""Where results are written: disks without links or case, names at the limits, and what must not be replaced."""

import json
import os
import shutil
import subprocess
import unicodedata
from pathlib import Path

import pytest

from lorax import OutputError, load_adapter, save_adapter
from lorax.files import output
from lorax.files.output import TEMPORARY, UNNAMEABLE, check_output, write_bytes
from reliability import seeds
from reliability.faults import killed

NEW, OLD = b"new" * 1000, b"old"


def without_links(monkeypatch, folder):
    """What exFAT says, as many network mounts do."""

    def link(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    return folder


def exfat(folder):
    """Mount a real one, by FUSE; yield where."""
    tools = [shutil.which(name, path=f"{os.environ['PATH']}:/sbin:/usr/sbin") for name in TOOLS]
    if not all(tools):
        pytest.skip(f"not all of {', '.join(TOOLS)} are here")
    image, place = folder / "image", folder / "exfat"
    image.write_bytes(b"")
    os.truncate(image, 2**24)
    place.mkdir()
    subprocess.run([tools[0], image], check=True, capture_output=True)
    loop = subprocess.run([tools[2], "-f", "--show", image], check=False, capture_output=True, text=True)
    if loop.returncode or subprocess.run([tools[1], loop.stdout.strip(), place], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    return place, [[tools[3], place], [tools[2], "-d", loop.stdout.strip()]]


TOOLS = ("mkfs.exfat", "mount.exfat-fuse", "losetup", "umount")


@pytest.fixture(params=["as it is", "no links", "exfat"])
def disk(request, tmp_path, monkeypatch):
    if request.param == "exfat":
        place, ends = exfat(tmp_path)
        yield place
        for words in ends:
            subprocess.run(words, check=True)
    else:
        yield tmp_path if request.param == "as it is" else without_links(monkeypatch, tmp_path)


def test_never_over_another_file(disk):
    path = disk / "out.safetensors"
    write_bytes(path, OLD, overwrite=False)
    with pytest.raises(OutputError, match="choose another name"):
        write_bytes(path, NEW, overwrite=False)
    assert path.read_bytes() == OLD
    write_bytes(path, NEW)
    assert path.read_bytes() == NEW
    assert [file.name for file in disk.iterdir() if file.is_file() and file.name != "image"] == [path.name]


def test_an_adapter_is_saved_there_by_the_node_and_the_command_line(disk):
    (disk / "a.safetensors").write_bytes(seeds.adapters()["lora"])
    adapter = load_adapter(disk / "a.safetensors")
    for name, overwrite in (("b", True), ("c", False)):
        save_adapter(adapter, disk / f"{name}.safetensors", overwrite=overwrite)
    assert (disk / "b.safetensors").read_bytes() == (disk / "c.safetensors").read_bytes()


def test_no_half_of_a_file_has_its_name_where_there_are_no_links(tmp_path, monkeypatch):
    """For a moment an empty one has, which no reader takes; other processes see that the name is gone."""
    path, steps = without_links(monkeypatch, tmp_path) / "out", []
    for _ in killed(lambda: write_bytes(path, NEW, overwrite=False)):
        steps.append(path.read_bytes() if path.exists() else None)
        path.unlink(missing_ok=True)
    assert set(steps[:-1]) <= {None, b"", NEW}
    assert steps.count(b"") == 1
    for file in tmp_path.glob(TEMPORARY):
        file.unlink()
    path.unlink(missing_ok=True)

    def replace(*_):
        raise PermissionError(13, "open elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(OutputError, match="open elsewhere"):
            write_bytes(path, NEW, overwrite=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 255, "\u00e9" * 127, "x" * 243 + ".safetensors", "x"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_every_name_that_the_disk_takes_can_be_written(tmp_path, name, overwrite):
    (tmp_path / name).write_bytes(b"")
    (tmp_path / name).unlink()
    write_bytes(tmp_path / name, NEW, overwrite=overwrite)
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x/\udfff"])
def test_names_that_no_file_has(tmp_path, name):
    with pytest.raises(OutputError, match="a name that no file has"):
        check_output(tmp_path / name, [])


# ------------------------------------------------------------------------------------------- files are compared


def test_one_file_by_two_paths(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    (tmp_path / "in").write_bytes(OLD)
    os.link(tmp_path / "in", tmp_path / "sub" / "hard")
    (tmp_path / "sub" / "soft").symlink_to("../in")
    for path in ("in", "sub/../in", "link/../in", "sub/hard", "link/hard", "sub/soft"):
        with pytest.raises(OutputError, match="one of the inputs"):
            check_output(tmp_path / path, [tmp_path / "link" / ".." / "in"])
    for first, second in (("out", "sub/../out"), ("sub/out", "link/out"), ("out", "OUT"), ("Stra\u00dfe", "STRASSE")):
        with pytest.raises(OutputError, match="two outputs are one file"):
            check_output(tmp_path / first, [], [tmp_path / second])
    composed = unicodedata.normalize("NFC", "e\u0301")
    with pytest.raises(OutputError, match="two outputs are one file"):
        check_output(tmp_path / composed, [], [tmp_path / "e\u0301"])
    for first, second in (("out", "sub/out"), ("out", "other"), ("sub/hard", "sub/soft")):
        check_output(tmp_path / first, [], [tmp_path / second])


def test_files_without_numbers(tmp_path, monkeypatch):
    """Some disks under Windows number no files: there paths are compared, with all links followed."""
    (tmp_path / "in").write_bytes(OLD)
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "other").write_bytes(OLD)
    found = Path.stat

    def stat(self, **more):
        numbers = list(found(self, **more))
        return os.stat_result([numbers[0], 0, 0, *numbers[3:]])

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(OutputError, match="one of the inputs"):
        check_output(tmp_path / "link", [tmp_path / "in"])
    check_output(tmp_path / "other", [tmp_path / "in"])


def test_what_is_read_beside_an_adapter_is_an_input(tmp_path, run):
    source, target = (seeds.base_file(tmp_path / f"{name}.safetensors") for name in "st")
    (tmp_path / "adapter_model.safetensors").write_bytes(seeds.adapters()["peft"])
    config = tmp_path / "adapter_config.json"
    config.write_text('{"r": 2, "lora_alpha": 4}')
    words = ["transfer", tmp_path / "adapter_model.safetensors", "--source", source, "--target", target, "-o"]
    out = tmp_path / "out"
    out.mkdir()
    for more in (["--report", config], ["--png", out / ".." / "adapter_config.json"]):
        assert "one of the inputs" in run(*words, out / "x", *more, status=1)[1]
    for more in (["--report", out / ".." / "out" / "x"], ["--html", out / "X"]):
        assert "two outputs are one file" in run(*words, out / "x", *more, status=1)[1]
    assert json.loads(config.read_text()) == {"r": 2, "lora_alpha": 4}
    assert list(out.iterdir()) == []
    library = ["migrate", tmp_path, "--source", source, "--target", target, "-o", out, "--report"]
    assert "one of the inputs" in run(*library, config, status=1)[1]
    assert "two outputs are one file" in run(*library, out / "../out/ADAPTER_model.safetensors", status=1)[1]
    assert list(out.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_no_text(tmp_path, run):
    """Bytes that are no UTF-8, as archives of other systems leave them, in the names of all files and folders."""
    try:
        (folder := tmp_path / os.fsdecode(b"b\xff\xfe")).mkdir()
    except OSError:
        pytest.skip("this disk has no such names")
    name = f"{folder}/{folder.name}".__add__
    source, target = (
        seeds.base_file(Path(name("s.safetensors"))),
        seeds.base_file(Path(name("t.safetensors")), change=0.2),
    )
    Path(name("a.safetensors")).write_bytes(seeds.adapters()["lora"])
    bases = ["--source", source, "--target", target]
    files = [word for option in ("report", "png", "html") for word in (f"--{option}", name(option))]
    run("similarity", source, target, "--rank", 4, "--json", name("json"), *files[2:])
    run("transfer", name("a.safetensors"), *bases, "-o", name("moved"), *files, "--save-assignment", name("pairs"))
    run("convert", name("moved"), "--source", target, "--to", "lora-x", "--rank", 4, "-o", name("x"))
    assert "udcff" in run("inspect", name("moved"), "--json")[0]
    assert load_adapter(name("moved")).layers
    assert {Path(name(file)).exists() for file in ("report", "png", "html", "json", "pairs", "x")} == {True}


# ------------------------------------------------------------------------------------------------- as on Windows


FOREIGN = ("CON", "nul", "aux.safetensors", "COM1.x", "lpt\u00b2", "conin$", "nul .x", "a:b", "a ", "a.", "a?b", "x\n")


@pytest.mark.parametrize("name", FOREIGN)
def test_names_that_windows_has_not(tmp_path, monkeypatch, name):
    check_output(tmp_path / name, [])
    monkeypatch.setattr(output, "WINDOWS", True)
    with pytest.raises(OutputError, match="a name that no file has"):
        check_output(tmp_path / name, [])


@pytest.mark.parametrize("name", ["console", "a.con", "COM10", "aux-1.safetensors", ".lorax", "a.b c", "\u00e9"])
def test_names_that_windows_has(name):
    assert not UNNAMEABLE.fullmatch(name)


def test_a_file_that_is_open_elsewhere(tmp_path, monkeypatch):
    """Windows replaces none: said before any work is done, and again where it was opened meanwhile."""
    path = tmp_path / "out"
    path.write_bytes(OLD)

    def refused(*_):
        raise PermissionError(13, "The process cannot access the file because it is being used by another process")

    monkeypatch.setattr(output, "WINDOWS", True)
    check_output(path, [])
    monkeypatch.setattr(os, "rename", refused)
    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(OutputError, match="another process; close the program"):
        check_output(path, [])
    with pytest.raises(OutputError, match="another process; close the program"):
        write_bytes(path, NEW)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [OLD]
