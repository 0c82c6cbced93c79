"""Weights, updates of each kind of them, and what each method makes of those, naively in float64."""

import math

import torch

from lorax import Base, Layer, LayerTable
from lorax.adapters import (
    DiffLayer,
    FouraLayer,
    GloraLayer,
    LohaLayer,
    LokrLayer,
    LoraLayer,
    LoraXLayer,
    OftLayer,
)
from lorax.models.families import UNKNOWN
from tests.tensors import randn

NAME = "transformer.blocks.0.attn.to_q"


def one_layer(name, weight):
    """A base of one layer."""
    return Base(name, UNKNOWN, LayerTable([Layer(NAME, tuple(weight.shape))]), lambda _: weight)


def updates(shape, k, alpha, seed, source):
    """An update of each kind of a weight of this shape."""
    layer, m, n = Layer(NAME, shape), shape[0], math.prod(shape[1:])
    up, down, gate = randn(m, k, seed=seed), randn(k, n, seed=seed + 1), randn(k, seed=seed + 2)
    found = {
        "lora": LoraLayer(layer, up, down, alpha),
        "foura": FouraLayer(layer, up, down, gate, alpha),
        "loha": LohaLayer(layer, up, down, randn(m, k, seed=seed + 3), randn(k, n, seed=seed + 4), alpha),
        "lokr": LokrLayer.read(layer, {"lokr_w1": randn(1, 1, seed=seed), "lokr_w2": randn(*shape, seed=seed)}),
        "diff": DiffLayer(layer, randn(*shape, seed=seed)),
        "oft": OftLayer(layer, 0.3 * randn(1, m, m, seed=seed)),
        "glora": GloraLayer(
            layer, randn(shape[1], k, seed=seed), randn(k, shape[1], seed=seed), up, down.reshape(k, *shape[1:]), alpha
        ),
    }
    if len(shape) > 2:
        mid, inner = randn(k, k, *shape[2:], seed=seed), randn(k, shape[1], seed=seed)
        found["lora cp"] = LoraLayer(layer, up, inner, alpha, lora_mid=mid)
    directions = len(triplets(source, min(m, n))[1])
    if directions:
        base = one_layer("s", source)
        found["lora-x"] = LoraXLayer(layer, randn(min(k, directions), seed=seed), base.fingerprint(NAME))
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
    """The formulas of `lorax.transfer.methods`, as they stand there."""
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
