"""What a transfer shall give, by the formulas alone in float64, and how far two sets of updates are apart."""

import math

import torch
from table_kinds import decomposed, dense, lengths, singular_vectors


def predicted(kind, pair, units, way):
    """Return the update on the target as a matrix for each parameter.

    Args:
        kind: The kind of the adapter.
        pair: The two models.
        units: Its modules with their tensors.
        way: `copy`, `project`, or `lora-x` (project, and stay a LoRA-X).
    """
    found = []
    for unit in units:
        source, target = pair.before[unit.parameter][unit.rows], pair.after[unit.parameter][unit.rows]
        if kind.on == "vector":
            found.append((unit.parameter, unit.rows, dense(kind, unit.parts, source)))
        elif kind.label == "LoRA-X":
            found.append((unit.parameter, unit.rows, _lora_x(dense(kind, unit.parts, source), target, way, pair.rank)))
        elif way == "copy":
            found.append((unit.parameter, unit.rows, dense(kind, _follow(unit.parts, source, target), target)))
        else:
            found += [(unit.parameter, rows, part) for rows, part in _projected(kind, pair, unit, source, target)]
    return joined(pair.after, found)


def _follow(parts, source, target):
    """Return parts whose magnitude, if there is one, keeps its ratio to the norms of the weight."""
    if "dora_scale" not in parts:
        return parts
    scale = parts["dora_scale"]
    ratio = lengths(target.flatten(1), scale) / lengths(source.flatten(1), scale)
    return parts | {"dora_scale": scale.double() * ratio.reshape(scale.shape)}


def _projected(kind, pair, unit, source, target):
    """Yield the rows of each layer of a weight and its update, U_t U_t^T dW V_t V_t^T; a magnitude follows after it."""
    pieces, scale = pair.rows_of(unit.parameter), unit.parts.get("dora_scale")
    # Columns of a fused weight have one norm over all of its layers: what the whole changes is moved.
    direction = scale is not None and (len(pieces) == 1 or scale.shape[0] == len(source))
    parts = {name: part.double() for name, part in unit.parts.items()}
    update = kind.update(parts, source.double().flatten(1)) if direction else dense(kind, parts, source)
    for rows in pieces:
        weight = target[rows].double().flatten(1)
        moved = _projection(update[rows], weight, pair.rank)
        if direction:
            own = scale[rows] if scale.shape[0] == len(source) else scale
            followed = _follow({"dora_scale": own}, source[rows], target[rows])["dora_scale"]
            moved = decomposed(moved, weight, followed)
        yield rows, moved


def _projection(update, weight, rank):
    U, Vh = singular_vectors(weight)
    return U[:, :rank] @ (U[:, :rank].T @ update @ Vh[:rank].T) @ Vh[:rank]


def _lora_x(update, target, way, rank):
    weight = target.double().flatten(1)
    if way == "copy":
        return update
    if way == "project":
        return _projection(update, weight, rank)
    U, Vh = singular_vectors(weight)
    return (U[:, :rank] * (U[:, :rank].T @ update @ Vh[:rank].T).diagonal()) @ Vh[:rank]


def joined(weights, pieces):
    """Put updates of rows together: a matrix for each parameter; rows without one are NaN."""
    whole = {}
    for parameter, rows, piece in pieces:
        weight = weights[parameter]
        if parameter not in whole:
            whole[parameter] = torch.full((len(weight), weight[0].numel()), math.nan, dtype=torch.float64)
        whole[parameter][rows] = piece
    return whole


def difference(found, expected):
    """Return the largest relative difference over the parameters; NaN if they are not the same or one is missing."""
    if found.keys() != expected.keys():
        return math.nan
    values = [float((found[key] - expected[key]).norm() / expected[key].norm()) for key in expected]
    return math.nan if any(map(math.isnan, values)) else max(values)


def worst(former, value):
    """Return the larger of two; what failed stays NaN."""
    return former + value if math.isnan(former + value) else max(former, value)
