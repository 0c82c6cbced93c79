"""Migrations: the same bytes however they run, and nothing lost, doubled or damaged by what goes wrong on the way."""

import json
import os
import shutil
import subprocess
from dataclasses import asdict, fields, replace
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorax import OptionError, OutputError, TransferOptions, open_base
from lorax.compute.cache import Cache
from lorax.compute.engine import CPU, Engine
from lorax.migration import migrate, plan_folder, work
from lorax.migration.journal import JOURNAL, Journal
from lorax.migration.local import fitting_workers, largest_of_each
from lorax.migration.run import Summary, _tells_case
from lorax.migration.work import Record, move, opened
from reliability import seeds
from tests.commands import error_of
from tests.conftest import small_base
from tests.library import BROKEN, contents, words

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_relative_paths_mean_the_same_on_ray(library, tmp_path, monkeypatch):
    """On a cluster that was started in another folder."""
    ray = pytest.importorskip("ray")

    def told(summary):
        return [replace(record, seconds=[]) for record in summary.records]

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        shutil.copytree(library, tmp_path / "loras")
        for name, change in (("s", 0), ("t", 0.2)):
            (tmp_path / name / "unet").mkdir(parents=True)
            small_base(tmp_path / name / "unet" / "model.safetensors", change=change)
        monkeypatch.chdir(tmp_path / "s")
        tasks = plan_folder(Path("../loras"), Path(), Path("../t"), TransferOptions(method="copy"))
        here = migrate(tasks, Path("here"), workers=1)
        there = migrate(tasks, Path("there"), run="ray")
    finally:
        ray.shutdown()
    assert told(here) == told(there)
    assert {record.name for record in here.records if record.status == "failed"} == BROKEN
    assert contents(Path("here")) == contents(Path("there"))


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_workers_fit_the_memory(tasks, monkeypatch):
    free = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=5 * 2**30))
    assert fitting_workers(tasks, 64) == 2
    assert fitting_workers(tasks, 1) == 1
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=2**20))
    assert fitting_workers(tasks, None) == 1


def test_an_output_folder_that_cannot_be_is_named(tasks, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make a folder"):
        migrate(tasks, tmp_path / "file" / "out")


def test_an_empty_journal_is_no_migration(tasks, tmp_path):
    (tmp_path / JOURNAL).touch()
    Journal(tmp_path, resume=False).close()


@pytest.mark.slow
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
        numbers = (*record.seconds, record.layers, record.arrived, record.retained or 0)
        texts = (record.name, record.status, record.error, record.output_hash, *record.warnings)
        assert {type(number) for number in numbers} <= {int, float}
        assert {type(text) for text in texts} == {str}
    assert not sound or journal.records["a"] == known


@pytest.mark.slow
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


@pytest.fixture
def small(tmp_path):
    """Two small bases and an adapter of PEFT: a folder for each of two libraries."""
    for i in range(2):
        seeds.base_file(tmp_path / f"{i}.safetensors", change=0.2 * i)
    ones = {f"{seeds.PEFT}.lora_A.weight": torch.ones(4, 32), f"{seeds.PEFT}.lora_B.weight": torch.ones(32, 4)}
    (tmp_path / "loras" / "x").mkdir(parents=True)
    save_file(ones, tmp_path / "loras" / "x" / "adapter_model.safetensors")
    return tmp_path


def planned(folder):
    return plan_folder(
        folder / "loras", folder / "0.safetensors", folder / "1.safetensors", TransferOptions(method="copy")
    )


def done(folder, out="out", previous=None):
    """Do the tasks of a folder in this process; return their records."""
    return [move(task, str(folder / out), previous, CPU) for task in planned(folder)]


def test_resume_sees_a_changed_configuration(small):
    config, previous = small / "loras" / "x" / "adapter_config.json", None
    for alpha in (None, 4, 16):
        if alpha:
            config.write_text(json.dumps({"r": 4, "lora_alpha": alpha}))
        (previous,) = done(small, previous=previous)
        assert previous.status == "done"
        (again,) = done(small, previous=previous)
        assert again == replace(previous, status="kept")
        done(small, f"fresh {alpha}")
        assert contents(small / "out") == contents(small / f"fresh {alpha}")
    assert contents(small / "fresh 4") != contents(small / "fresh 16")
    config.unlink()
    assert done(small, previous=previous)[0].status == "done"


@pytest.mark.parametrize("field", ["output_hash", "input_hash"])
def test_a_journal_without_a_hash_keeps_nothing(small, field):
    (record,) = done(small)
    (small / "out" / record.output).unlink()
    (again,) = done(small, previous=replace(record, **{field: ""}))
    assert again.status == "done"
    assert (small / "out" / record.output).exists()


def test_each_that_cannot_be_read_has_a_row(small):
    """Links to nothing, a pipe, a closed folder, a link to a folder elsewhere, a file that vanished."""
    loras = small / "loras"
    (loras / "gone.safetensors").symlink_to("nowhere")
    os.mkfifo(loras / "PIPE.SAFETENSORS")
    (small / "elsewhere").mkdir()
    (loras / "linked").symlink_to(small / "elsewhere")
    (loras / "y.safetensors").write_bytes(b"")
    tasks = planned(small)
    (loras / "y.safetensors").unlink()
    assert fitting_workers(tasks, 1) == len(largest_of_each(tasks)) == 1
    errors = {record.name: record.error for task in tasks for record in [move(task, str(small / "out"), None, CPU)]}
    assert "not a file" in errors.pop("PIPE.SAFETENSORS")
    assert "cannot open a file" in errors.pop("gone.safetensors")
    assert "cannot open a file" in errors.pop("y.safetensors")
    assert "links to folders are not followed" in errors.pop("linked")
    assert errors == {"x/adapter_model.safetensors": ""}


def test_a_folder_whose_path_is_too_long_for_windows_has_a_row(small, monkeypatch):
    """The system's own error there, of more than 260 characters."""

    def refused(path, **_):
        raise FileNotFoundError(2, "The system cannot find the path specified", str(path))

    monkeypatch.setattr(Path, "mkdir", refused)
    (record,) = done(small)
    assert record.status == "failed"
    assert record.error.startswith("cannot make a folder: ")


@pytest.mark.parametrize("method", ["copy", "project"])
@pytest.mark.parametrize("name", ["0.safetensors", "1.safetensors"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_base_that_is_replaced_meanwhile_gives_no_result(small, name, method, linked):
    """By name or through a link, whether its weights are read again or not."""
    if linked:
        (small / "old").mkdir()
        os.rename(small / name, small / "old" / name)
        (small / name).symlink_to(small / "old" / name)
    opened.cache_clear()
    (task,) = (replace(task, options=TransferOptions(method=method, rank=8)) for task in planned(small))
    first = move(task, str(small / "out"), None, CPU)
    seeds.base_file(small / "new", change=0.1)
    os.replace(small / "new", small / name)
    for previous in (None, first):
        record = move(task, str(small / "out"), previous, CPU)
        assert (record.status, "changed" in record.error) == ("failed", True)
    opened.cache_clear()  # another process
    assert move(task, str(small / "out"), first, CPU).status == "done"


def test_an_adapter_that_is_replaced_while_it_is_moved_gives_no_result(small, monkeypatch):
    (task,), transfer = planned(small), work.transfer_adapter

    def late(*words, **options):
        save_file(load_file(task.adapter), small / "new")
        os.replace(small / "new", task.adapter)
        return transfer(*words, **options)

    monkeypatch.setattr(work, "transfer_adapter", late)
    assert "changed during the migration" in move(task, str(small / "out"), None, CPU).error
    assert not (small / "out").exists()


@pytest.mark.skipif(not os.getuid(), reason="root reads every folder")
def test_a_closed_folder_has_a_row(small):
    (small / "loras" / "closed").mkdir(mode=0)
    assert [record.name for record in done(small) if "Permission denied" in record.error] == ["closed"]


@pytest.mark.slow
def test_adapters_below_more_folders_than_calls_can_be(small, deep):
    shutil.copy(small / "loras" / "x" / "adapter_model.safetensors", deep(small / "loras") / "a.safetensors")
    assert [record.error for record in done(small)] == ["", ""]
    Journal(small / "out", resume=False).close()


@pytest.mark.parametrize("name", [JOURNAL, f".{JOURNAL}.lock"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_a_journal_that_is_no_file_is_refused(small, name, kind):
    path, other = small / "out" / name, small / "other"
    path.parent.mkdir()
    other.write_text("not ours")
    make = {
        "link": lambda: path.symlink_to(other),
        "dangling": lambda: path.symlink_to("nowhere"),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }
    make[kind]()
    with pytest.raises(OutputError, match="no file"):
        migrate(planned(small), small / "out", resume=True)
    assert other.read_text() == "not ours"
    assert [entry.name for entry in path.parent.iterdir()] == [name]


@pytest.mark.slow
def test_names_that_differ_in_case_only(small, monkeypatch):
    """On a disk that does not tell case, made by what such a disk says of the journal: one result, and a row."""
    names = ["a", "A", "B\N{LATIN SMALL LETTER E WITH ACUTE}", "be\N{COMBINING ACUTE ACCENT}"]
    for name in names:
        shutil.copy(small / "loras" / "x" / "adapter_model.safetensors", small / "loras" / f"{name}.safetensors")
    Journal(small / "out", resume=False).close()
    assert _tells_case(small / "out")
    exists, samefile = os.path.exists, Path.samefile

    def lower(path):
        return Path(path).with_name(Path(path).name.lower())

    monkeypatch.setattr(os.path, "exists", lambda path: exists(path) or exists(lower(path)))
    monkeypatch.setattr(Path, "samefile", lambda path, other: samefile(path, lower(other)))
    records = migrate(planned(small), small / "out", workers=1).records
    errors = {record.output: record.error for record in records if record.status == "failed"}
    assert errors.keys() == {"a.safetensors", f"{names[3]}.safetensors"}
    assert "A.safetensors" in errors["a.safetensors"]
    assert contents(small / "out").keys() == {record.output for record in records if record.status == "done"}
    assert sum('"failed"' in line for line in (small / "out" / JOURNAL).read_text().splitlines()) == 2
