"""Files that a pattern finds: as `pathlib` does on what anyone can read, and told where it can look no further."""

import os
from pathlib import Path

import pytest

from lorax.migration.find import find


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    for name in ("a.st", "b.st", "n.txt", "s/a.st", "s/deep/c.st", "s/deep/er/a.st", ".hidden/a.st", "x1.st"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "in").symlink_to("s")
    (folder / "loop").symlink_to(".")
    return folder


def names(folder, paths):
    return [path.relative_to(folder).as_posix() for path in paths]


@pytest.mark.parametrize(
    "pattern",
    ["*", "*.st", "**/*", "**/*.st", "s/**/*.st", "*/a.st", "*/*/*", "in/*", "loop/s/a.st", "**/deep/**/*", "?.st",
     "[ab].st", "a.st", "./a.st", "s//a.st", "**/**/a.st", "none/*", "a.st/x", ".", "**/in/a.st"],
)  # fmt: skip
def test_a_pattern_means_what_it_means_to_pathlib(tree, pattern):
    wanted = sorted(path for path in tree.glob(pattern) if path.is_file()) if pattern != "." else []
    assert find(tree, pattern) == (wanted, [])


def test_a_name_with_a_bracket_is_itself_where_it_is_there(tree):
    (tree / "x[1].st").touch()
    assert names(tree, find(tree, "x[1].st")[0]) == ["x[1].st"]
    assert names(tree, find(tree, "x[12].st")[0]) == ["x1.st"]
    assert names(tree, find(tree, "x[[]1].st")[0]) == ["x[1].st"]


def test_nothing_is_left_out_in_silence(tree, tmp_path):
    """Links to nothing are found; links to folders elsewhere are told, those to what is found anyway are not."""
    (tree / "gone.st").symlink_to("nowhere")
    (tree / "circle.st").symlink_to("circle.st")
    os.mkfifo(tree / "pipe.st")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.st").touch()
    (tree / "s" / "out").symlink_to(tmp_path / "elsewhere")
    found, unread = find(tree, "**/*.st")
    assert {"gone.st", "circle.st", "pipe.st"} < set(names(tree, found))
    assert names(tree, unread) == ["s/out"]
    assert find(tree, "*.st")[1] == []
    assert names(tree, find(tree, "s/out/*")[0]) == ["s/out/far.st"]


def test_a_folder_that_cannot_be_read_is_told_where_a_pattern_leads_into_it(tree, monkeypatch):
    """Root may read all, so that the system's refusal is made here."""
    listed = os.listdir

    def refused(path):
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", refused)
    assert names(tree, find(tree, "**/*.st")[1]) == ["s/deep"]
    assert find(tree, "*/a.st")[1] == []


@pytest.mark.slow
def test_folders_deeper_than_calls_can_be(tmp_path, deep):
    (deep(tmp_path) / "z.st").touch()
    found, _ = find(tmp_path, "**/z.st")
    assert names(tmp_path, found) == ["d/" * 1500 + "z.st"]


def test_a_junction_of_windows_is_a_link(tree, monkeypatch):
    """What `lstat` says of one there: a folder, and a tag."""
    state = os.lstat

    class Junction:
        st_mode, st_reparse_tag = 0o40777, 0xA0000003

    monkeypatch.setattr(os, "lstat", lambda path: Junction() if Path(path).name == "s" else state(path))
    assert names(tree, find(tree, "**/*.st")[0]) == [".hidden/a.st", "a.st", "b.st", "x1.st"]
    assert "s/a.st" in names(tree, find(tree, "s/*.st")[0])
