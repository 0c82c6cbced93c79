"""Every method on every kind of update, of odd shapes and on weights of low rank, against naive float64."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax import Layer, TransferOptions, transfer_adapter
from lorax.adapters import (
    Adapter,
)
from tests.naive import NAME, moved_naively, one_layer, triplets, updates
from tests.tensors import randn

SAME = ("copy", "orthogonal", "project", "subspace-null", "align", "index")
THIN = ("lora", "lora cp", "foura")


def weight_of(shape, kind, seed, size):
    """A weight; of low rank with small whole numbers as factors, so that its rank is exact in float32."""
    m, n = shape[0], math.prod(shape[1:])
    if kind == "zero":
        return torch.zeros(shape)
    W = randn(m, n, seed=seed)
    if kind == "deficient":
        k = max(1, min(m, n) // 2)
        W = randn(m, k, seed=seed).mul(4).round() @ randn(k, n, seed=seed + 1).mul(4).round()
    return (W * size).reshape(shape)


sides = st.tuples(st.integers(1, 12), st.integers(1, 12))
shapes = st.one_of(
    sides,
    st.builds(lambda side, kernel: (*side, *kernel), sides, st.sampled_from([(1, 1), (3, 3), (3,), (2, 2, 2)])),
)
weights = st.tuples(
    st.sampled_from(["plain", "plain", "deficient", "zero"]), st.sampled_from([1.0, 1e-15, 1e15, 1e-30, 1e30])
)


@given(
    shapes,
    st.integers(1, 20),
    st.sampled_from([None, 1.0, 8.0, -3.0]),
    st.integers(1, 12),
    weights,
    st.sampled_from([(0, 0), (0, 0), (0, 0), (2, 0), (0, 3), (1, 1)]),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=20)
def test_every_method_is_its_formula_for_every_kind(shape, k, alpha, rank, weight, more, dtype, seed):
    """What is compressed is as close to the formula as any matrix of that rank, whichever of the best ones it is."""
    shape_t = (shape[0] + more[0], shape[1] + more[1], *shape[2:])
    source, target = weight_of(shape, *weight[:1], seed, weight[1]), weight_of(shape_t, weight[0], seed + 9, weight[1])
    bases = one_layer("s", source), one_layer("t", target)
    rank = min(rank, max(*(min(Layer("", s).matrix_shape) for s in (shape, shape_t)), 1))
    for kind, own in updates(shape, k, alpha, seed, source).items():
        stored = own.moved(own.layer, dtype if kind in ("lora", "loha") else torch.float32)
        dW = stored.delta_weight(source.double()).double()
        A = stored.factors()[1].double() if kind in THIN else torch.linalg.svd(dW, full_matrices=False)[2]
        for method in SAME if shape == shape_t else ("align", "index"):
            whole = moved_naively(method, dW, A, source, target, rank)
            if kind not in THIN and method == "orthogonal":  # its factors depend on how the update is refactored
                continue
            options = TransferOptions(method=method, rank=rank, lora_rank=1000, threshold=-1e9, dtype="float32")
            result, report = transfer_adapter(Adapter("a", None, "kohya", {NAME: stored}), *bases, options)
            moved = result.layers[NAME]
            arrived = moved.delta_weight(target.double() if moved.needs_weight else None).double()
            if method == "copy" and moved.needs_weight:
                continue
            most = k if kind in THIN else max(len(triplets(dW, min(dW.shape))[1]), 1)
            beyond = torch.linalg.svdvals(whole)[most:].norm() if method == "subspace-null" else torch.tensor(0.0)
            case = f"{kind} by {method}"
            assert abs(float((arrived - whole).norm() - beyond)) <= 1e-4 * float(dW.norm()), case
            assert abs(report.rows[0].target_norm - float(arrived.norm())) <= 1e-4 * float(dW.norm()), case
