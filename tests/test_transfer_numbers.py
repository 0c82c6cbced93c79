"""Every method on every kind of update, of odd shapes and on weights of low rank, against naive float64."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax import Base, Layer, LayerTable, transfer_adapter
from lorax.adapters import (
    Adapter,
    DiffLayer,
    FouraLayer,
    GloraLayer,
    LohaLayer,
    LokrLayer,
    LoraLayer,
    LoraXLayer,
    OftLayer,
)
from lorax.families import UNKNOWN

NAME = "transformer.blocks.0.attn.to_q"
SAME = ("copy", "orthogonal", "project", "subspace-null", "align", "index")
THIN = ("lora", "lora cp", "foura")


def one_layer(name, weight):
    """A base of one layer."""
    return Base(name, UNKNOWN, LayerTable([Layer(NAME, tuple(weight.shape))]), lambda _: weight)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weight_of(shape, kind, seed, size):
    """A weight; of low rank with small whole numbers as factors, so that its rank is exact in float32."""
    m, n = shape[0], math.prod(shape[1:])
    if kind == "zero":
        return torch.zeros(shape)
    W = random(seed, m, n)
    if kind == "deficient":
        k = max(1, min(m, n) // 2)
        W = random(seed, m, k).mul(4).round() @ random(seed + 1, k, n).mul(4).round()
    return (W * size).reshape(shape)


def updates(shape, k, alpha, seed, source):
    """An update of each kind of a weight of this shape."""
    layer, m, n = Layer(NAME, shape), shape[0], math.prod(shape[1:])
    up, down, gate = random(seed, m, k), random(seed + 1, k, n), random(seed + 2, k)
    found = {
        "lora": LoraLayer(layer, up, down, alpha),
        "foura": FouraLayer(layer, up, down, gate, alpha),
        "loha": LohaLayer(layer, up, down, random(seed + 3, m, k), random(seed + 4, k, n), alpha),
        "lokr": LokrLayer.read(layer, {"lokr_w1": random(seed, 1, 1), "lokr_w2": random(seed, *shape)}),
        "diff": DiffLayer(layer, random(seed, *shape)),
        "oft": OftLayer(layer, 0.3 * random(seed, 1, m, m)),
        "glora": GloraLayer(
            layer, random(seed, shape[1], k), random(seed, k, shape[1]), up, down.reshape(k, *shape[1:]), alpha
        ),
    }
    if len(shape) > 2:
        mid, inner = random(seed, k, k, *shape[2:]), random(seed, k, shape[1])
        found["lora cp"] = LoraLayer(layer, up, inner, alpha, lora_mid=mid)
    directions = len(triplets(source, min(m, n))[1])
    if directions:
        base = one_layer("s", source)
        found["lora-x"] = LoraXLayer(layer, random(seed, min(k, directions)), base.fingerprint(NAME))
    return found


def triplets(weight, rank):
    U, S, Vh = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
    keep = min(rank, int((1e-6 * S[0] < S).sum()))
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()  # `index` depends on it where one side is resized
    return (U * sign)[:, :keep], S[:keep], (Vh * sign.T)[:keep]


def polar(X):
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


def moved_naively(method, dW, A, source, target, rank):
    """The formulas of `lorax.methods`, as they stand there."""
    (U_s, _, V_s), (U_t, _, V_t) = triplets(source, rank), triplets(target, rank)
    W_s, W_t = source.double().flatten(1), target.double().flatten(1)
    left, right = W_s.shape[0] == W_t.shape[0], W_s.shape[1] == W_t.shape[1]
    P_t, Q_t, r = U_t @ U_t.T, V_t.T @ V_t, min(len(V_s), len(V_t))
    if method == "copy":
        return dW
    if method == "project":
        return P_t @ dW @ Q_t
    if method == "orthogonal":
        F = (W_t - W_s) @ torch.linalg.pinv(A, rtol=1e-6) @ A
        along = (dW * F).sum()
        return dW - along / F.square().sum() * F if along > 0 else dW
    if method == "subspace-null":
        P_s, Q_s = U_s @ U_s.T, V_s.T @ V_s
        one, too = torch.eye(len(P_s)).double(), torch.eye(len(Q_s)).double()
        return P_t @ P_s @ dW @ Q_s @ Q_t + (one - P_t) @ (one - P_s) @ dW @ (too - Q_s) @ (too - Q_t)
    L = P_t if left else U_t[:, :r] @ U_s[:, :r].T
    R = Q_t if right else V_s[:r].T @ V_t[:r]
    if method == "align" and left != right:
        L = P_t if left else U_t[:, :r] @ polar(V_s[:r] @ V_t[:r].T).T @ U_s[:, :r].T
        R = Q_t if right else V_s[:r].T @ polar(U_s[:, :r].T @ U_t[:, :r]) @ V_t[:r]
    return L @ dW @ R


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
            result, report = transfer_adapter(
                Adapter("a", None, "kohya", {NAME: stored}), *bases,
                method=method, rank=rank, lora_rank=1000, threshold=-1e9, dtype=torch.float32,
            )  # fmt: skip
            moved = result.layers[NAME]
            arrived = moved.delta_weight(target.double() if moved.needs_weight else None).double()
            if method == "copy" and moved.needs_weight:
                continue
            most = k if kind in THIN else max(len(triplets(dW, min(dW.shape))[1]), 1)
            beyond = torch.linalg.svdvals(whole)[most:].norm() if method == "subspace-null" else torch.tensor(0.0)
            case = f"{kind} by {method}"
            assert abs(float((arrived - whole).norm() - beyond)) <= 1e-4 * float(dW.norm()), case
            assert abs(report.rows[0].target_norm - float(arrived.norm())) <= 1e-4 * float(dW.norm()), case
