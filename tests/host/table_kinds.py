"""Adapters of every kind as the tensors of a file, and what each means: its formula, written out in float64.

Nothing here is of the package under test. `parts` are the tensors of one module, by what follows `<module>.`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

RANK, ALPHA = 4, 2.0
ROTATED = 4  # rows of a block of OFT and BOFT
_SINGULAR = {}


@dataclass(frozen=True)
class Kind:
    """A row of the table.

    Attributes:
        label: What the row is called.
        make: (weight, random) -> parts.
        update: (parts, weight as a float64 matrix) -> the update before any magnitude, float64.
        on: The weights it is for: `matrix`, `conv` (3x3), `vector`.
    """

    label: str
    make: Callable
    update: Callable
    on: str = "matrix"


def dense(kind, parts, weight):
    """Return all that an adapter changes of a weight, as a matrix: with a magnitude, W' = m (W + u) / |W + u|."""
    weight = weight.double().reshape(len(weight), -1)
    parts = {name: part.double() for name, part in parts.items()}
    update = kind.update(parts, weight)
    return update if "dora_scale" not in parts else decomposed(update, weight, parts["dora_scale"])


def decomposed(update, weight, scale):
    merged = weight + update
    return merged * scale.flatten(1) / lengths(merged, scale) - weight


def lengths(weight, scale):
    """Return the norms of the rows or of the columns of a matrix, whichever the magnitude is of."""
    rows = scale.shape[0] == weight.shape[0] and scale.shape[1] == 1
    return weight.double().norm(dim=1, keepdim=True) if rows else weight.double().norm(dim=0, keepdim=True)


def low_rank(weight, random, size=0.3):
    """Return two factors whose product is about `size` of the weight, and alpha."""
    m, n, *kernel = weight.shape
    up, down = random(m, RANK), random(RANK, n)
    down *= size / ((ALPHA / RANK) * RANK**0.5 * n**0.5)
    one = [1] * len(kernel)
    return up.reshape(m, RANK, *one), down.reshape(RANK, n, *one), torch.tensor(ALPHA)


def make_lora(weight, random):
    up, down, alpha = low_rank(weight, random)
    return {"lora_up.weight": up, "lora_down.weight": down, "alpha": alpha}


def lora(parts, weight):
    scale = float(parts["alpha"]) / parts["lora_down.weight"].shape[0]
    return scale * parts["lora_up.weight"].flatten(1) @ parts["lora_down.weight"].flatten(1)


def make_mid(weight, random):
    up, down, alpha = low_rank(weight, random)
    return {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": random(RANK, RANK, 3, 3), "alpha": alpha}


def mid(parts, weight):
    up, down = (parts[f"lora_{side}.weight"].flatten(1) for side in ("up", "down"))
    moved = torch.stack([up @ core @ down for core in parts["lora_mid.weight"].flatten(2).permute(2, 0, 1)], dim=2)
    return float(parts["alpha"]) / RANK * moved.flatten(1)


def make_dora(per_output):
    def make(weight, random):
        rows, ones = weight.flatten(1), [1] * (weight.dim() - 2)
        norms = rows.norm(dim=1).reshape(-1, 1, *ones) if per_output else rows.norm(dim=0).reshape(1, -1, *ones)
        return make_lora(weight, random) | {"dora_scale": norms * (1 + 0.1 * random(*norms.shape))}

    return make


def make_loha(weight, random):
    up, down, alpha = low_rank(weight, random)
    second = random(weight.shape[0], RANK), random(RANK, weight.shape[1]) / RANK**0.5
    parts = {"hada_w1_a": up.flatten(1), "hada_w1_b": down.flatten(1), "hada_w2_a": second[0], "hada_w2_b": second[1]}
    return parts | {"alpha": alpha}


def loha(parts, weight):
    first, second = (parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"] for i in (1, 2))
    return float(parts["alpha"]) / RANK * first * second


def make_lokr(weight, random):
    half = weight[: weight.shape[0] // 2, : weight.shape[1] // 2]
    up, down, alpha = low_rank(half, random)
    return {"lokr_w1": random(2, 2), "lokr_w2_a": up.flatten(1), "lokr_w2_b": down.flatten(1), "alpha": alpha}


def lokr(parts, weight):
    w1, w2 = parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    rows = [torch.cat([number * w2 for number in row], dim=1) for row in w1]
    return float(parts["alpha"]) / RANK * torch.cat(rows)


def make_glora(weight, random):
    up, down, alpha = low_rank(weight, random)
    n, ones = weight.shape[1], [1] * (weight.dim() - 2)
    a1, a2 = random(n, RANK) / n**0.5, random(RANK, n) / RANK**0.5
    a1, a2 = a1.reshape(n, RANK, *ones), a2.reshape(RANK, n, *ones)
    return {"a1.weight": a1, "a2.weight": a2, "b1.weight": up, "b2.weight": down, "alpha": alpha}


def glora(parts, weight):
    a1, a2, b1, b2 = (parts[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    return float(parts["alpha"]) / RANK * (weight @ a1 @ a2 + b1 @ b2)


def rotation(block):
    """Return (I + Q) (I - Q)^-1, Q = block - block^T (Cayley)."""
    Q = block - block.T
    eye = torch.eye(len(Q), dtype=Q.dtype)
    return (eye + Q) @ torch.linalg.inv(eye - Q)


def make_oft(weight, random):
    blocks = random(weight.shape[0] // ROTATED, ROTATED, ROTATED)
    return {"oft_blocks": 0.1 * blocks, "alpha": torch.tensor(0.0)}


def oft(parts, weight):
    R = torch.block_diag(*(rotation(block) for block in parts["oft_blocks"]))
    return R.T @ weight - weight


def make_boft(weight, random):
    blocks = random(2, weight.shape[0] // ROTATED, ROTATED, ROTATED)
    return {"oft_blocks": 0.1 * blocks, "alpha": torch.tensor(0.0)}


def boft(parts, weight):
    turned = weight
    for stage, blocks in enumerate(parts["oft_blocks"]):
        apart = (ROTATED // 2) << stage
        starts = range(0, len(weight), 2 * apart)
        order = [start + first + half * apart for start in starts for first in range(apart) for half in (0, 1)]
        R = torch.zeros(len(weight), len(weight), dtype=weight.dtype)
        rows = torch.tensor(order)
        R[rows[:, None], rows] = torch.block_diag(*(rotation(block) for block in blocks))
        turned = R @ turned
    return turned - weight


def make_diff(weight, random):
    return {"diff": 0.3 * random(*weight.shape) / weight[0].numel() ** 0.5}


def diff(parts, weight):
    return parts["diff"].reshape(len(weight), -1)


def make_foura(weight, random):
    up, down, alpha = low_rank(weight, random)
    gate = 1 + 0.3 * random(RANK)
    return {"foura_up.weight": up.flatten(1), "foura_down.weight": down.flatten(1), "foura_gate": gate, "alpha": alpha}


def foura(parts, weight):
    filtered = torch.fft.ifft(parts["foura_gate"]).real
    circulant = torch.stack([filtered.roll(shift) for shift in range(RANK)], dim=1)
    return float(parts["alpha"]) / RANK * parts["foura_up.weight"] @ circulant @ parts["foura_down.weight"]


def make_lora_x(weight, random):
    return {"delta": 0.3 * random(min(weight.flatten(1).shape) // 2)}


def singular_vectors(weight):
    """Return U and Vh of a float64 matrix; computed once for the same numbers."""
    key = hash(weight.numpy().tobytes())
    if key not in _SINGULAR:
        U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
        _SINGULAR[key] = U, Vh
    return _SINGULAR[key]


def lora_x(parts, weight):
    U, Vh = singular_vectors(weight)
    r = len(parts["delta"])
    return (U[:, :r] * parts["delta"]) @ Vh[:r]


KINDS = (
    Kind("LoRA", make_lora, lora),
    Kind("LoRA of a 3x3 convolution, with `lora_mid`", make_mid, mid, on="conv"),
    Kind("DoRA, per output", make_dora(True), lora),
    Kind("DoRA, per input", make_dora(False), lora),
    Kind("LoHa", make_loha, loha),
    Kind("LoKr", make_lokr, lokr),
    Kind("GLoRA", make_glora, glora),
    Kind("OFT", make_oft, oft),
    Kind("BOFT", make_boft, boft),
    Kind("full difference", make_diff, diff),
    Kind("differences of norms and biases", make_diff, diff, on="vector"),
    Kind("FouRA", make_foura, foura),
    Kind("LoRA-X", make_lora_x, lora_x),
)
