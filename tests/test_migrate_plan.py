"""What is moved, and what is never replaced: folders, manifests, outputs."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorax import FormatError, LoraxError, OutputError, TransferOptions
from lorax.migration import migrate, plan_folder, plan_manifest
from lorax.migration.journal import JOURNAL
from tests.commands import error_of
from tests.library import BROKEN, contents


@pytest.fixture
def own(library, bases, tmp_path):
    """A library whose files may be damaged: an adapter, a base that is a file and one that is a folder."""
    files = (library / "a.safetensors", "loras"), (bases[0].files[0], "."), (bases[1].files[0], "pipe/unet")
    for file, folder in files:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / folder / "same.safetensors")
    manifest(
        tmp_path, f"[[move]]\nadapters = '*'\nsource = '{tmp_path}/same.safetensors'\ntarget = '{tmp_path}/pipe'\n"
    )
    return tmp_path


INPUTS = ["loras/same.safetensors", "same.safetensors", "pipe/unet/same.safetensors"]


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("name", [*INPUTS, "moves.toml"])
def test_the_report_replaces_no_input(run, own, name, linked):
    path = own / name
    if linked:
        path = own / "link"
        path.symlink_to(own / name)
    before = contents(own)
    words = ["migrate", own / "loras", "--manifest", own / "moves.toml", "-o", own / "out", "--report", path]
    assert "is one of the inputs" in error_of(run, *words)
    assert contents(own) == before
    assert not (own / "out").exists()


@pytest.mark.parametrize("name", ["same.safetensors", JOURNAL])
def test_the_report_is_none_of_the_results(run, own, name):
    (own / "out").mkdir()
    words = ["migrate", own / "loras", "--manifest", own / "moves.toml", "-o", own / "out"]
    assert "two outputs are one file" in error_of(run, *words, "--report", own / "loras/../out" / name)
    assert not list((own / "out").iterdir())


@pytest.mark.slow
def test_a_base_that_leads_in_a_circle(run, own):
    (own / "base").symlink_to(own / "base")
    words = ["migrate", own / "loras", "--source", own / "base", "--target", own / "pipe", "-o", own / "out"]
    assert "1 failed of 1" in run(*words, status=1)[0]
    manifest(own, "[[move]]\nadapters = '*'\nsource = 'base'\ntarget = 'pipe'\n")
    words = ["migrate", own / "loras", "--manifest", own / "moves.toml", "-o", own / "other"]
    assert "1 failed of 1" in run(*words, status=1)[0]


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("name", INPUTS)
def test_no_result_replaces_an_adapter_or_a_base(own, name, damaged):
    if damaged:
        (own / name).write_bytes(b"damaged")
    before = contents(own)
    tasks = plan_manifest(own / "moves.toml", own / "loras", TransferOptions())
    with pytest.raises(OutputError, match="is one of the inputs"):
        migrate(tasks, (own / name).parent, workers=1)
    assert contents(own) == before
    assert not list(own.rglob(f"*{JOURNAL}*"))


@pytest.mark.parametrize("name", ["same.safetensors", JOURNAL])
def test_neither_a_result_nor_the_journal_replaces_the_manifest(run, own, name):
    (own / "out").mkdir()
    path = (own / "moves.toml").rename(own / "out" / name)
    before = path.read_bytes()
    words = ["migrate", own / "loras", "--manifest", path, "-o", own / "out", "--resume"]
    assert "is one of the inputs" in error_of(run, *words)
    assert list((own / "out").iterdir()) == [path]
    assert path.read_bytes() == before


@pytest.mark.slow
def test_no_output_through_a_link(tasks, tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "styles").symlink_to(elsewhere)
    (out / "a.safetensors").symlink_to(elsewhere / "a.safetensors")
    summary = migrate(tasks, out, workers=1)
    failed = {record.name: record.error for record in summary.records if record.status == "failed"}
    assert failed.keys() - BROKEN == {"a.safetensors", "styles/a.safetensors", "styles/deep/c.safetensors"}
    assert "leads out of its folder" in failed["a.safetensors"]
    assert list(elsewhere.iterdir()) == []


def manifest(folder: Path, text: str) -> Path:
    path = folder / "moves.toml"
    path.write_text(text)
    return path


@pytest.mark.slow
def test_a_manifest_of_several_targets(library, bases, tmp_path):
    source, target = bases[0].files[0], bases[1].files[0]
    path = manifest(
        tmp_path,
        f"""
[[move]]
adapters = "styles/**/*.safetensors"
source = "{source}"
target = "{target}"
method = "project"
threshold = 0
[[move]]
adapters = "*/a.safetensors"
source = "{target}"
target = "{source}"
""",
    )
    tasks = plan_manifest(path, library, TransferOptions(rank=20))
    assert [(task.output, task.options.method, task.options.rank) for task in tasks] == [
        (f"styles/a.{target.stem}.safetensors", "project", 20),
        ("styles/deep/c.safetensors", "project", 20),
        (f"styles/a.{source.stem}.safetensors", "auto", 20),
    ]
    summary = migrate(tasks, tmp_path / "out", workers=1)
    assert {record.status for record in summary.records} == {"done"}


MOVE = 'adapters = "a.safetensors"\nsource = "s"\ntarget = "t"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no \\[\\[move"),
        ("move = 3", "no \\[\\[move"),
        ("[[move]\n", "not a manifest"),
        ("[[move]]\nadapters = 'x'", "move 1 lacks"),
        ("move = [1]", "move 1 lacks"),
        (f"[[move]]\n{MOVE}colour = 3", "colour"),
        (f"[[move]]\n{MOVE}rank = 'high'", "rank = 'high'"),
        (f"[[move]]\n{MOVE}fast = 1", "fast = 1"),
        (f"[[move]]\n{MOVE}method = 'magic'", "magic"),
        (f"[[move]]\n{MOVE}[[move]]\n{MOVE}method = 'copy'", "give one output"),
        ("[[move]]\nadapters = '../x'\nsource = 's'\ntarget = 't'", "leads out"),
        ("[[move]]\nadapters = '/etc/*'\nsource = 's'\ntarget = 't'", "leads out"),
        ("[[move]]\nadapters = 'none*'\nsource = 's'\ntarget = 't'", "finds no adapter"),
        ("\x00", "not a manifest"),
        ("move = " + "[" * 100_000, "not a manifest"),
        ("[[move]]\nadapters = 'a**b'\nsource = 's'\ntarget = 't'", "pattern"),
        ("[[move]]\nadapters = '*'\nsource = \"s\\u0000\"\ntarget = 't'", "cannot be a file"),
    ],
)
def test_what_a_manifest_cannot_be(library, tmp_path, text, message):
    with pytest.raises(LoraxError, match=message):
        plan_manifest(manifest(tmp_path, text), library, TransferOptions())


HOSTILE = st.one_of(
    st.sampled_from(
        ["", "*", "**", "**/*", "a**", "../*", "/etc/*", "[", "*" * 300, "x" * 5000, "\x00", "\x1b[2J", "~", "a\nb"]
    ),
    st.text(max_size=20),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    move=st.fixed_dictionaries(
        {"adapters": HOSTILE, "source": HOSTILE, "target": HOSTILE}, optional={"rank": st.integers(), "method": HOSTILE}
    )
)
def test_a_manifest_of_anything_is_read_or_refused(library, tmp_path, move):
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in move.items())
    path = manifest(tmp_path, "[[move]]\n" + text)
    try:
        tasks = plan_manifest(path, library, TransferOptions())
    except LoraxError:
        return
    assert all((library / task.output).resolve().is_relative_to(library) for task in tasks)
    assert all(Path(task.adapter).is_relative_to(library) for task in tasks)


def test_no_adapters_and_bases_and_results_are_none(library, bases, tmp_path):
    with pytest.raises(FormatError, match="no adapter to migrate"):
        plan_folder(tmp_path, bases[0].files[0], bases[1].files[0], TransferOptions())
    out = tmp_path / "out"
    out.mkdir()
    base, adapter = tmp_path / "base.safetensors", tmp_path / "a.safetensors"
    for path in (base, adapter, out / "a.safetensors"):
        path.write_bytes((library / "a.safetensors").read_bytes())
    assert [task.name for task in plan_folder(tmp_path, base, bases[1].files[0], TransferOptions(), out)] == [
        "a.safetensors"
    ]


@pytest.mark.parametrize("base", ["other.safetensors", "pipe"])
@pytest.mark.parametrize("order", [1, -1])
def test_no_base_of_any_move_is_an_adapter(library, tmp_path, base, order):
    for name in ("a", "first", "other", "pipe/unet/other"):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((library / "a.safetensors").read_bytes())
    moves = [("**/*.safetensors", "first.safetensors", "x"), ("a*", base, "y")][::order]
    text = "".join(f"[[move]]\nadapters = '{a}'\nsource = '{s}'\ntarget = '{t}'\n" for a, s, t in moves)
    left = {"a.safetensors", "other.safetensors", "pipe/unet/other.safetensors"}
    tasks = plan_manifest(manifest(tmp_path, text), tmp_path, TransferOptions())
    assert {task.name for task in tasks} == {name for name in left if not name.startswith(base)}
