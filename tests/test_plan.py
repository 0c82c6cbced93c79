"""What a plan says before anything is moved is what a transfer then does."""

import json
from dataclasses import dataclass, field, replace

import pytest

from lorax import Engine, OptionError, Outcome, TransferOptions, load_adapter, plan_transfer, run_plan, transfer_adapter
from lorax.options import Format, Method
from lorax.transfer.plan import Piece
from lorax.transfer.run import needed_pieces
from tests import every_kind as every

SAID = [f"{method} {form}{' fast' * fast}" for method in Method for form in Format for fast in (False, True)]
OPTIONS = [
    TransferOptions(method=method, format=form, rank=6, lora_rank=4, fast=fast)
    for method in Method
    for form in Format
    for fast in (False, True)
]


@dataclass(frozen=True, slots=True)
class Asked(Engine):
    """An engine that keeps which decompositions it was asked for."""

    asked: set = field(default_factory=set)

    def _subspace(self, base, name, rank, accuracy):
        self.asked.add(Piece(base.name.startswith("target"), name, rank, accuracy == "fast"))
        return Engine._subspace(self, base, name, rank, accuracy)


def unreadable(base):
    def read(layer):
        raise AssertionError(f"{layer.name} was read")

    return replace(base, read=read)


@pytest.fixture
def adapter(lora_file, bases):
    return load_adapter(lora_file, bases[0])


@pytest.fixture(scope="module")
def fluxes(tmp_path_factory):
    return every.flux_bases(tmp_path_factory.mktemp("flux"))


@pytest.mark.parametrize("options", OPTIONS, ids=SAID)
def test_a_transfer_asks_for_the_decompositions_of_its_plan_and_no_others(adapter, bases, options):
    plan = plan_transfer(adapter, *bases, options)
    needed = needed_pieces(plan, Engine())
    engine = Asked()
    run_plan(plan, engine=engine)
    assert engine.asked == set(needed)
    assert len(needed) == len(set(needed))


@pytest.mark.parametrize("options", OPTIONS[::4], ids=SAID[::4])
def test_the_kinds_that_are_not_thin_too(options, fluxes):
    source, target = fluxes
    for update in (*every.kinds(source.layers[every.NAME]).values(), *every.kinds(every.QKV).values()):
        plan = plan_transfer(every.adapter_of(update), source, target, options)
        engine = Asked()
        run_plan(plan, engine=engine)
        assert engine.asked == set(needed_pieces(plan, Engine())), update.kind


@pytest.mark.parametrize("threshold", [-9, 0.9, 0.98])
def test_what_is_not_alike_needs_nothing(adapter, bases, threshold):
    plan = plan_transfer(adapter, *bases, TransferOptions(method="project", rank=6, threshold=threshold))
    needed = {piece.layer for piece in needed_pieces(plan, Engine())}
    _, report = run_plan(plan)
    assert needed == {row.target for row in report.rows if row.outcome is Outcome.TRANSFERRED}


def test_a_plan_of_bases_of_one_depth_reads_no_weight(adapter, bases):
    plan = plan_transfer(adapter, *map(unreadable, bases), TransferOptions(method="project"))
    real = plan_transfer(adapter, *bases, TransferOptions(method="project"))
    assert [step.row for step in plan.steps] == [step.row for step in real.steps]
    _, report = run_plan(real)
    told = [(step.row.source, step.row.target, step.row.method) for step in plan.steps]
    assert told == [(row.source, row.target, row.method) for row in report.rows]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(run, lora_file, bases, tmp_path):
    files = [lora_file, "--source", bases[0].files[0], "--target", bases[1].files[0], "--no-cache"]
    out = tmp_path / "out.safetensors"
    said, _ = run("transfer", *files, "-o", out, "--report", tmp_path / "report.json", "--dry-run", "--method", "align")
    assert not list(tmp_path.iterdir())
    run("transfer", *files, "-o", out, "--report", tmp_path / "report.json", "--method", "align")
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    *lines, count = said.splitlines()
    assert lines == [f"{row['source']} -> {row['target']}: {row['method']}" for row in rows]
    assert count == f"{len(rows)} of {len(rows)} layers would be moved; {len(rows)} align"


def test_a_dry_run_of_a_library_names_what_will_fail(run, library, bases, tmp_path):
    words = ["migrate", library, "-o", tmp_path / "out", "--source", bases[0].files[0], "--target", bases[1].files[0]]
    said, _ = run(*words, "--dry-run", "--no-cache", status=1)
    assert not list(tmp_path.iterdir())
    run(*words, "--no-cache", "--workers", 1, "--report", tmp_path / "report.json", status=1)
    records = json.loads((tmp_path / "report.json").read_text())["records"]
    lines = dict(line.split(" -> ", 1) for line in said.splitlines())
    assert lines.keys() == {record["name"] for record in records}
    for record in records:
        if record["status"] == "done":
            assert f": {record['arrived']} of {record['layers']} layers would be moved" in lines[record["name"]]
        else:
            assert lines[record["name"]].endswith(record["error"])


def test_options_by_name_count_in_place_of_others(adapter, bases):
    given = TransferOptions(method="align", rank=6, threshold=-9)
    named, report = transfer_adapter(adapter, *bases, given, method="copy", rank=None)
    expected, _ = transfer_adapter(adapter, *bases, TransferOptions(method="copy", threshold=-9))
    assert {row.method for row in report.rows} == {"copy"}
    assert named.metadata == expected.metadata
    for wrong in ({"best": 1}, {"rank": 2.5}, {"rank": True}, {"method": "best"}, {"strict": "yes"}):
        with pytest.raises(OptionError):
            transfer_adapter(adapter, *bases, **wrong)
