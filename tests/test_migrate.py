"""Migrations: the same bytes however they run, and nothing lost, doubled or damaged by what goes wrong on the way."""

import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, fields, replace
from importlib import import_module
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lorax import (
    FormatError,
    LoraxError,
    OptionError,
    OutputError,
    load_adapter,
    open_base,
    save_adapter,
    transfer_adapter,
)
from lorax.cache import Cache
from lorax.engine import Engine
from lorax.migration import Options, migrate, plan_folder, plan_manifest
from lorax.migration.job import Task
from lorax.migration.journal import JOURNAL, Journal
from lorax.migration.local import _in_pool, fitting_workers
from lorax.migration.run import Summary
from lorax.migration.work import Record
from tests.conftest import lora_tensors, small_base
from tests.test_cli import error_of

BROKEN = {"broken/cut.safetensors", "broken/text.safetensors", "broken/base.safetensors"}


@pytest.fixture(scope="module")
def library(bases, tmp_path_factory):
    """Adapters of several ranks in several folders, and files that are none."""
    folder = tmp_path_factory.mktemp("library")
    for i, (name, rank) in enumerate((("a", 4), ("b", 8), ("styles/a", 2), ("styles/deep/c", 16), ("d é", 1))):
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(lora_tensors(bases[0], rank, seed=i), path, {"ss_tag_frequency": name})
    (folder / "broken").mkdir()
    (folder / "broken" / "cut.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:-100])
    (folder / "broken" / "text.safetensors").write_text("not an adapter")
    save_file({"unet.x.weight": torch.zeros(2, 2)}, folder / "broken" / "base.safetensors")
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tasks(library, bases):
    return plan_folder(library, bases[0].files[0], bases[1].files[0], Options(method="project", rank=20))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and JOURNAL not in path.name
    }


@pytest.fixture
def expected(library, bases, tmp_path):
    """What the transfer of each file by itself gives."""
    folder = tmp_path / "expected"
    for path in sorted(library.rglob("*.safetensors")):
        name = path.relative_to(library)
        if name.as_posix() not in BROKEN:
            adapter = load_adapter(path, bases[0])
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_adapter(transfer_adapter(adapter, *bases, method="project", rank=20)[0], folder / name)
    return contents(folder)


@pytest.mark.parametrize(
    ("engine", "workers", "cached"), [("local", 1, False), ("local", 2, True), ("ray", 1, True), ("ray", 2, False)]
)
def test_the_same_bytes_on_any_engine_with_any_number_of_workers(tasks, expected, tmp_path, engine, workers, cached):
    seen = []
    summary = migrate(
        tasks,
        tmp_path / "out",
        run=engine,
        workers=workers,
        engine=Engine(cache=Cache() if cached else None),
        progress=lambda done, total, name: seen.append((done, total)),
    )
    assert contents(tmp_path / "out") == expected
    assert {record.name for record in summary.records if record.status == "failed"} == BROKEN
    assert [record.name for record in summary.records] == [task.name for task in tasks]
    assert seen == [(i, len(tasks)) for i in range(1, len(tasks) + 1)]
    assert (tmp_path / "cache").exists() == cached


def test_what_is_in_a_result_and_its_record(tasks, tmp_path):
    summary = migrate(tasks, tmp_path / "out", workers=1)
    record = next(record for record in summary.records if record.name == "styles/a.safetensors")
    assert (record.status, record.arrived, record.layers) == ("done", record.layers, record.layers)
    with safe_open(tmp_path / "out" / record.output, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_tag_frequency"] == "styles/a"
    assert metadata["lorax_rank"] == "20"
    assert metadata["lorax_source_identity"] == open_base(tasks[0].source).identity()
    assert metadata["lorax_target_identity"] == open_base(tasks[0].target).identity()
    json.dumps(summary.to_json(), allow_nan=False)


def test_relative_paths_mean_the_same_on_ray(library, tmp_path, monkeypatch):
    """On a cluster that was started in another folder."""
    import ray

    def told(summary):
        return [replace(record, seconds=[]) for record in summary.records]

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        shutil.copytree(library, tmp_path / "loras")
        for name, change in (("s", 0), ("t", 0.2)):
            (tmp_path / name / "unet").mkdir(parents=True)
            small_base(tmp_path / name / "unet" / "model.safetensors", change=change)
        monkeypatch.chdir(tmp_path / "s")
        tasks = plan_folder(Path("../loras"), Path(), Path("../t"), Options(method="copy"))
        here = migrate(tasks, Path("here"), workers=1)
        there = migrate(tasks, Path("there"), run="ray")
    finally:
        ray.shutdown()
    assert told(here) == told(there)
    assert {record.name for record in here.records if record.status == "failed"} == BROKEN
    assert contents(Path("here")) == contents(Path("there"))


def test_resume_does_only_what_is_missing_or_changed(tasks, library, tmp_path):
    out = tmp_path / "out"
    migrate(tasks, out, workers=1)
    before = contents(out)
    with pytest.raises(OutputError, match="--resume"):
        migrate(tasks, out)
    again = migrate(tasks, out, workers=1, resume=True)
    assert {record.status for record in again.records} == {"kept", "failed"}
    (out / "a.safetensors").unlink()
    (out / "b.safetensors").write_bytes(b"damaged")
    state = (out / "styles/a.safetensors").stat()
    again = migrate(tasks, out, workers=1, resume=True)
    assert {record.name for record in again.records if record.status == "done"} == {"a.safetensors", "b.safetensors"}
    assert contents(out) == before
    assert (out / "styles/a.safetensors").stat().st_mtime_ns == state.st_mtime_ns
    other = [replace(task, options=replace(task.options, method="copy")) for task in tasks]
    again = migrate(other, out, workers=1, resume=True)
    assert sum(record.status == "done" for record in again.records) == len(before)


COMMAND = [sys.executable, "-m", "lorax", "migrate"]


def words(library, bases, out, *more):
    given = [library, "--source", bases[0].files[0], "--target", bases[1].files[0], "-o", out]
    return [*COMMAND, *map(str, given), "--method", "project", "--rank", "20", "--workers", "2", *more]


@pytest.mark.parametrize("files", [1, 3])
def test_killed_and_resumed(library, bases, tmp_path, expected, files):
    """SIGKILL of the whole process group once so many results are there."""
    out = tmp_path / "out"
    process = subprocess.Popen(words(library, bases, out), start_new_session=True, stderr=subprocess.PIPE)
    while process.poll() is None and (not out.exists() or len(contents(out)) < files):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = (
        {name: content for name, content in contents(out).items() if not name.endswith(".part")} if out.exists() else {}
    )
    assert done.items() <= expected.items()
    end = subprocess.run(words(library, bases, out, "--resume"), capture_output=True, text=True, check=False)
    assert (end.returncode, end.stderr.count("failed")) == (1, len(BROKEN)), end.stderr
    assert contents(out) == expected
    lines = [json.loads(line) for line in (out / JOURNAL).read_text().splitlines() if line.endswith("}")]
    outputs = [line["output"] for line in lines if line["status"] == "done"]
    assert sorted(outputs) == sorted(set(outputs)) == sorted(expected)


@pytest.mark.parametrize("cut", [1, 500])
def test_a_journal_that_was_cut_short(tasks, tmp_path, expected, cut):
    out = tmp_path / "out"
    migrate(tasks, out, workers=1)
    journal = out / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-cut])
    migrate(tasks, out, workers=1, resume=True)
    assert contents(out) == expected
    summary = migrate(tasks, out, workers=1, resume=True)
    assert sum(record.status == "kept" for record in summary.records) == len(expected)


def kill_one(process, candidates):
    """Kill the first worker of a running migration that `candidates` finds."""
    killed = 0
    while process.poll() is None and not killed:
        time.sleep(0.005)
        for child in itertools.islice(candidates(), 1):
            child.kill()
            killed += 1
    assert killed


def test_a_killed_worker_costs_nothing(library, bases, tmp_path, expected):
    out = tmp_path / "out"
    process = subprocess.Popen(words(library, bases, out), stderr=subprocess.PIPE)

    def busy():
        for child in psutil.Process(process.pid).children() if process.poll() is None else []:
            if "spawn_main" in " ".join(child.cmdline()) and child.cpu_times().user > 0.5:
                yield child

    kill_one(process, busy)
    assert process.wait(timeout=120) == 1
    assert contents(out) == expected


DEADLY = """
import os
from lorax.migration import Record
def work(task, previous):
    if task.name == "poison":
        os._exit(9)
    return Record(task.name, task.output, "done")
"""


def test_what_kills_its_process_is_told_from_what_ran_beside_it(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(tmp_path)
    work = import_module("deadly").work
    tasks = [Task("", name, name, "", "") for name in ("good", "poison", "better")]
    pool = _in_pool(work, [list(tasks)], {}, 1)
    found, left = [], None
    while left is None:
        try:
            found.append(next(pool).name)
        except StopIteration as end:
            left = [task.name for task in end.value]
    assert (found, left) == (["good"], ["poison"])


def test_a_worker_killed_between_two_adapters_costs_nothing(tasks, tmp_path, expected):
    """The pool is broken when the next adapter is handed to it."""
    threads = set(threading.enumerate())

    def progress(done, total, name):
        if done == 1:
            for worker in multiprocessing.active_children():
                worker.kill()
            for thread in set(threading.enumerate()) - threads:  # they end when they have seen it
                thread.join(60)

    summary = migrate(tasks, tmp_path / "out", workers=1, progress=progress)
    assert {record.name for record in summary.records if record.status == "failed"} == BROKEN
    assert contents(tmp_path / "out") == expected


def test_workers_fit_the_memory(tasks, monkeypatch):
    free = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=5 * 2**30))
    assert fitting_workers(tasks, 64) == 2
    assert fitting_workers(tasks, 1) == 1
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=2**20))
    assert fitting_workers(tasks, None) == 1


def test_one_process_at_a_time(library, bases, tasks, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(words(library, bases, out), start_new_session=True, stderr=subprocess.PIPE)
    while process.poll() is None and not (out / JOURNAL).exists():
        time.sleep(0.01)
    with pytest.raises(OutputError, match="another process"):
        migrate(tasks, out, resume=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_full_disk(library, bases, tmp_path, expected):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    out = tmp_path / "out"
    environment = os.environ | {"LORAX_CACHE": "off"}
    end = subprocess.run(
        words(library, bases, out), preexec_fn=limit, env=environment, capture_output=True, text=True, check=False
    )
    assert end.returncode == 1
    assert "cannot write the output" in end.stderr
    assert "Traceback" not in end.stderr
    assert contents(out).items() <= expected.items()
    subprocess.run(words(library, bases, out, "--resume"), capture_output=True, check=False)
    assert contents(out) == expected


def test_an_output_folder_that_cannot_be_is_named(tasks, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the journal"):
        migrate(tasks, tmp_path / "file" / "out")


def test_an_empty_journal_is_no_migration(tasks, tmp_path):
    (tmp_path / JOURNAL).touch()
    Journal(tmp_path, resume=False).close()


def test_ray_that_is_missing_is_named_before_anything_is_made(library, bases, tmp_path):
    """In a Python that has every package but Ray."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if entry.name != "ray":
            (packages / entry.name).symlink_to(entry)
    command = words(library, bases, tmp_path / "out", "--engine", "ray")
    environment = os.environ | {"PYTHONPATH": str(packages)}
    end = subprocess.run([command[0], "-S", *command[1:]], env=environment, capture_output=True, text=True, check=False)
    assert (end.returncode, end.stderr.count("\n")) == (1, 1), end.stderr
    assert "error: the engine ray needs Ray" in end.stderr
    assert "pip install ray" in end.stderr
    assert not (tmp_path / "out").exists()


def test_a_journal_nested_without_end_counts_as_not_written(tasks, tmp_path):
    (tmp_path / JOURNAL).write_text("[" * 100_000 + "\n")
    journal = Journal(tmp_path, resume=True)
    journal.close()
    assert journal.records == {}


FIELDS = [field.name for field in fields(Record)]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.lists(st.text()),
    st.dictionaries(st.text(), st.text()),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.dictionaries(st.sampled_from(FIELDS), ODD)), sound=st.booleans())
def test_a_journal_of_anything_gives_sound_records_only(tmp_path, lines, sound):
    known = Record("a", "a", "done", layers=3, retained=0.5, warnings=["w"], seconds=[1.0, 2])
    written = [asdict(known) | line for line in lines] + [asdict(known)] * sound
    (tmp_path / JOURNAL).write_text("\n".join(json.dumps(line) for line in written) + "\n")
    journal = Journal(tmp_path, resume=True)
    journal.close()
    for record in journal.records.values():
        Summary([record, replace(record, status="kept")]).to_json()
        assert isinstance(record.output, str)
        assert sum(record.seconds) + record.layers + record.arrived + (record.retained or 0) is not None
        assert ", ".join([record.name, record.status, record.error, record.output_hash, *record.warnings]) is not None
    assert not sound or journal.records["a"] == known


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
    assert "is one of the results" in error_of(run, *words, "--report", own / "loras/../out" / name)
    assert not list((own / "out").iterdir())


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
    tasks = plan_manifest(own / "moves.toml", own / "loras", Options())
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
    tasks = plan_manifest(path, library, Options(rank=20))
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
        plan_manifest(manifest(tmp_path, text), library, Options())


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
        tasks = plan_manifest(path, library, Options())
    except LoraxError:
        return
    assert all((library / task.output).resolve().is_relative_to(library) for task in tasks)
    assert all(Path(task.adapter).is_relative_to(library) for task in tasks)


def test_no_adapters_and_bases_and_results_are_none(library, bases, tmp_path):
    with pytest.raises(FormatError, match="no adapter to migrate"):
        plan_folder(tmp_path, bases[0].files[0], bases[1].files[0], Options())
    out = tmp_path / "out"
    out.mkdir()
    base, adapter = tmp_path / "base.safetensors", tmp_path / "a.safetensors"
    for path in (base, adapter, out / "a.safetensors"):
        path.write_bytes((library / "a.safetensors").read_bytes())
    assert [task.name for task in plan_folder(tmp_path, base, bases[1].files[0], Options(), out)] == ["a.safetensors"]


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
    tasks = plan_manifest(manifest(tmp_path, text), tmp_path, Options())
    assert {task.name for task in tasks} == {name for name in left if not name.startswith(base)}


def test_command_line(run, library, bases, tmp_path):
    out, err = run(*words(library, bases, tmp_path / "out", "--report", str(tmp_path / "r.json"))[3:], status=1)
    assert "5 done, 0 kept, 3 failed of 8" in out
    assert err.count("failed: broken/") == 3
    report = json.loads((tmp_path / "r.json").read_text())
    assert [record["status"] for record in report["records"]].count("done") == 5
    assert "--manifest" in error_of(run, "migrate", library, "-o", tmp_path / "x", "--source", bases[0].files[0])
    for more in (["--workers", "0"], ["--method", "copy", "--rank", "0"]):
        run(*words(library, bases, tmp_path / "y", *more)[3:], status=1)
    with pytest.raises(OptionError):
        migrate([], tmp_path / "z", run="cloud")


def test_a_killed_worker_of_ray_costs_nothing(library, bases, tmp_path, expected):
    out = tmp_path / "out"
    process = subprocess.Popen(words(library, bases, out, "--engine", "ray"), stderr=subprocess.PIPE)

    def moving():
        for child in psutil.process_iter(["cmdline"]):
            if (child.info["cmdline"] or [""])[0].startswith("ray::_move"):
                yield child

    kill_one(process, moving)
    assert process.wait(timeout=300) == 1
    assert contents(out) == expected


def test_a_lost_machine_of_ray_costs_nothing(tasks, tmp_path, expected):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        other = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        cluster.wait_for_nodes()
        lost = []

        def progress(done, total, name):
            if not lost:
                lost.append(name)
                cluster.remove_node(other, allow_graceful=False)

        migrate(tasks, tmp_path / "out", run="ray", progress=progress)
        assert lost
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert contents(tmp_path / "out") == expected
