"""A cell of the table: an adapter of one kind is read, moved, written and handed to the host; each step is measured."""

import json
from dataclasses import dataclass, field, replace

import torch
from safetensors.torch import load_file, save_file
from table_expected import difference, joined, predicted, worst
from table_kinds import KINDS, dense
from table_models import randomness

from lorax import Outcome, TransferOptions, load_adapter, save_adapter, transfer_adapter
from lorax.adapters.dora import per_output

VECTOR_ROLES = {"weight": "w_norm", "bias": "diff_b"}


@dataclass
class Cell:
    """What was measured, each the largest relative difference over all layers; NaN is what failed.

    Attributes:
        read: Our reading of the file against the formula.
        moved: The transferred update against the formula.
        written: What is read back from our file against what was transferred.
        applied: What the host makes of our file against what was transferred.
        stock: Whether the host's LoRA loader alone read all of our files of kinds that it knows.
        faults: What went wrong, in words.
        files: What the host shall apply: case -> parameter -> the change that is expected.
    """

    read: float = 0.0
    moved: float = 0.0
    written: float = 0.0
    applied: float = 0.0
    stock: bool = True
    faults: list[str] = field(default_factory=list)
    files: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def measure_ours(pair):
    """Read, move and write an adapter of every kind; return the cells by kind, without those of no such weights."""
    cells = {}
    for number, kind in enumerate(KINDS):
        if units := _made(kind, pair):
            cells[kind.label] = Cell()
            _measure(cells[kind.label], f"{number:02}", kind, pair, units)
    return cells


def measure_host(pair, cells, log):
    """Compare what the host made of every file of a model with what was expected."""
    applied = load_file(pair.folder / "applied.safetensors")
    for cell in cells.values():
        for case, expected in cell.files.items():
            names = {key.partition(":")[2]: key for key in applied if key.startswith(f"{case}:")}
            weights = {name: pair.after[name].double() for name in names}
            changes = [(name, slice(None), _matrix(applied[names[name]].double() - weights[name])) for name in names]
            cell.applied = worst(cell.applied, difference(joined(weights, changes), expected))
            cell.faults += [f"{case}: {what}: {text}" for what, texts in log[case].items() for text in texts]
            cell.stock &= not (log[case]["left"] or log[case]["refused"]) or case.endswith(".pack")


def _measure(cell, number, kind, pair, units):
    path = pair.folder / f"{number}.safetensors"
    _write(kind, pair, units, path)
    adapter = load_adapter(path, pair.source)
    cell.faults += [f"not read: {key}: {why}" for key, why in adapter.unused.items()]
    updates = [(unit, dense(kind, unit.parts, pair.before[unit.parameter][unit.rows])) for unit in units]
    formula = joined(pair.before, [(unit.parameter, unit.rows, update) for unit, update in updates])
    cell.read = difference(_assembled(adapter, pair.source, pair.before), formula)
    for way, options in _ways(kind, pair).items():
        moved, report = transfer_adapter(
            adapter, pair.source, pair.target, TransferOptions(**options), assignment=pair.assignment
        )
        lost = [row for row in report.rows if row.outcome is not Outcome.TRANSFERRED]
        cell.faults += [f"{way}: {row.source}: {row.outcome} {row.note}" for row in lost]
        ours = _assembled(moved, pair.target, pair.after)
        cell.moved = worst(cell.moved, difference(ours, predicted(kind, pair, units, way)))
        case = f"{number}-{way}.{'pack' if moved.kind in ('foura', 'lora-x') else 'adapter'}"
        _save(cell, pair, case, moved, ours)


def _save(cell, pair, case, moved, ours):
    """Write a transferred adapter, read it again, and note what the host shall make of it."""
    out = pair.folder / f"{case}.safetensors"
    save_adapter(moved, out, naming="kohya")
    again = load_adapter(out, pair.target)
    cell.faults += [f"{case}: not read again: {key}: {why}" for key, why in again.unused.items()]
    cell.written = worst(cell.written, difference(_assembled(again, pair.target, pair.after), ours))
    cell.files[case] = _assembled(moved, pair.target, pair.after, _host_reading)


def _ways(kind, pair):
    """Return the ways to move an adapter: name -> options of `transfer_adapter`."""
    ways = {"copy": {"method": "copy"}, "project": {"method": "project", "rank": pair.rank, "lora_rank": pair.rank}}
    if kind.label == "LoRA-X":
        ways["lora-x"] = ways["project"] | {"format": "lora-x"}
    return ways


def _made(kind, pair):
    """Return the modules of an adapter with their tensors."""
    random = randomness(pair.name, kind.label)
    units = pair.layer_units() if kind.label == "LoRA-X" else pair.units(kind.on)
    return [replace(unit, parts=kind.make(pair.before[unit.parameter][unit.rows], random)) for unit in units]


def _write(kind, pair, units, path):
    """Write an adapter file as its trainer would."""
    tensors, header = {}, {}
    for unit in units:
        roles = {"diff": VECTOR_ROLES[unit.parameter.rpartition(".")[2]]} if kind.on == "vector" else {}
        tensors |= {f"{unit.module}.{roles.get(role, role)}": part.contiguous() for role, part in unit.parts.items()}
    for module in [key.removesuffix(".w_norm") for key in tensors if key.endswith(".w_norm")]:
        if f"{module}.diff_b" in tensors:  # of a norm, LyCORIS calls it so
            tensors[f"{module}.b_norm"] = tensors.pop(f"{module}.diff_b")
    if kind.label == "LoRA-X":
        prints = {unit.module: pair.source.fingerprint(unit.module) for unit in units}
        header = {"lorax_format_version": "1", "fingerprints": json.dumps(prints)}
    save_file(tensors, path, header)


def _our_reading(own, weight):
    return own.delta_weight(weight)


def _host_reading(own, weight):
    """Return what the host makes of a layer by its own rule, where it has one: m (W + u) / |W| - W per output."""
    scale = own.parts().get("dora_scale")
    if scale is None or not per_output(scale, weight):
        return own.delta_weight(weight)
    update = replace(own, dora_scale=None).delta_weight(weight)
    weight = weight.flatten(1)
    return (weight + update) * scale.double().reshape(-1, 1) / weight.norm(dim=1, keepdim=True) - weight


def _assembled(adapter, base, weights, reading=_our_reading):
    """Return the updates of an adapter as a matrix for each parameter of the model, computed in float64."""
    found = []
    for name, own in adapter.layers.items():
        vector, layer = base.vectors.get(name), base.layers.get(name, own.layer)
        parameter = vector.original if vector else f"{layer.original}.weight"
        rows = slice(*(layer.rows or (None,)))
        found.append((parameter, rows, reading(own, weights[parameter][rows].double())))
    return joined(weights, found)


def _matrix(tensor):
    return tensor.reshape(len(tensor), -1)
