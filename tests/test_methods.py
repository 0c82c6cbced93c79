"""The transfer methods: the published formulas evaluated naively in float64, and their laws."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorax.linalg import Subspace, decompose
from lorax.transfer import methods
from lorax.transfer.methods import align, index, project, subspace_null
from tests.tensors import falling, orthogonal, randn


def naive(weight, rank):
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank].T


def close(B, A, expected):
    return float(torch.linalg.norm((B.double() @ A.double()) - expected) / torch.linalg.norm(expected))


size = st.integers(6, 24)
problems = st.tuples(size, size, st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6))


def problem(m, n, rank, k, seed):
    """Source and target weight, and an update of rank k."""
    B, A = randn(m, k, seed=seed + 20).double(), randn(k, n, seed=seed + 30).double()
    return falling(m, n, seed), falling(m, n, seed + 7), B, A


@given(problems)
@settings(deadline=None)
def test_project_is_the_published_formula(sizes):
    _, W_t, B, A = problem(*sizes)
    U, _, V = naive(W_t, sizes[2])
    expected = U @ U.T @ (B @ A) @ V @ V.T
    assume(torch.linalg.norm(expected) > 1e-3)
    assert close(*project(B.float(), A.float(), decompose(W_t.float(), sizes[2])), expected) < 1e-4


@given(problems)
@settings(deadline=None)
def test_subspace_null_is_the_published_formula_at_rank_k(sizes):
    W_s, W_t, B, A = problem(*sizes)
    (U_s, _, V_s), (U_t, _, V_t) = naive(W_s, sizes[2]), naive(W_t, sizes[2])
    P_s, Q_s, P_t, Q_t = (X @ X.T for X in (U_s, V_s, U_t, V_t))
    one_m, one_n, dW = torch.eye(len(P_s)).double(), torch.eye(len(Q_s)).double(), B @ A
    inside, outside = P_s @ dW @ Q_s, (one_m - P_s) @ dW @ (one_n - Q_s)
    whole = P_t @ inside @ Q_t + (one_m - P_t) @ outside @ (one_n - Q_t)
    U, S, Vh = torch.linalg.svd(whole)
    k = sizes[3]
    # The best approximation of rank k is unique only with a gap behind the k-th value.
    assume(S[k - 1] > 1e-3 and (len(S) <= k or S[k] < 0.9 * S[k - 1]))
    up, down = subspace_null(B.float(), A.float(), decompose(W_s.float(), sizes[2]), decompose(W_t.float(), sizes[2]))
    assert up.shape == B.shape
    assert close(up, down, (U[:, :k] * S[:k]) @ Vh[:k]) < 1e-3


@given(problems)
@settings(deadline=None)
def test_orthogonal_takes_away_what_goes_along_the_change_of_the_base(sizes):
    W_s, W_t, B, A = problem(*sizes)
    dW = B @ A
    F = (W_t - W_s) @ torch.linalg.pinv(A) @ A
    along = torch.vdot(dW.flatten(), F.flatten())
    assume(abs(along) > 1e-2 * torch.linalg.norm(dW) * torch.linalg.norm(F))
    expected = dW - along.clamp_min(0) / torch.linalg.norm(F) ** 2 * F
    assume(torch.linalg.norm(expected) > 1e-2 * torch.linalg.norm(dW))
    up, down = methods.orthogonal(*(x.float() for x in (B, A, W_s, W_t)))
    assert close(up, down, expected) < 1e-3
    assert torch.equal(down, A.float())
    # Where nothing overlaps, and on its own base, it is copied.
    for other in (2 * W_s - W_t if along > 0 else W_t, W_s):
        assert torch.equal(methods.orthogonal(*(x.float() for x in (B, A, W_s, other)))[0], B.float())


def test_orthogonal_of_an_update_of_less_rank_than_it_has_factors():
    W_s, W_t, B, A = problem(12, 16, 6, 4, 3)
    padded = torch.cat([B, 0 * B], dim=1), torch.cat([A, 0 * A])
    doubled = torch.cat([B / 2, B / 2], dim=1), torch.cat([A, A])
    W_t = W_s + B @ A + 0.1 * W_t  # overlaps
    up, down = methods.orthogonal(B, A, W_s, W_t)
    assert torch.linalg.norm(up @ down) < 0.5 * torch.linalg.norm(B @ A)
    for other in (padded, doubled):
        assert close(*methods.orthogonal(*other, W_s, W_t), up @ down) < 1e-9


@given(problems)
@settings(deadline=None)
def test_transfer_onto_the_same_base_is_a_projection(sizes):
    W, _, B, A = problem(*sizes)
    B, A, space = B.float(), A.float(), decompose(W.float(), sizes[2])
    once = project(B, A, space)
    # Absolute: of a random update the subspace may hold next to nothing.
    torch.testing.assert_close(project(*once, space), once, rtol=0, atol=1e-4)
    for same in (index(B, A, space, space), align(B, A, space, space)):
        torch.testing.assert_close(same, once, rtol=0, atol=1e-4)


@given(problems)
@settings(deadline=None)
def test_no_update_grows(sizes):
    W_s, W_t, B, A = problem(*sizes)
    B, A = B.float(), A.float()
    s, t = decompose(W_s.float(), sizes[2]), decompose(W_t.float(), sizes[2])
    before = torch.linalg.norm(B @ A)
    moved = [project(B, A, t), index(B, A, s, t), align(B, A, s, t), subspace_null(B, A, s, t)]
    for up, down in (*moved, methods.orthogonal(B, A, W_s.float(), W_t.float())):
        assert torch.linalg.norm(up @ down) <= before * (1 + 1e-4)


@given(problems, st.floats(-3, 3))
@settings(deadline=None)
def test_linear_in_strength(sizes, strength):
    W_s, W_t, B, A = problem(*sizes)
    s, t = decompose(W_s.float(), sizes[2]), decompose(W_t.float(), sizes[2])
    for method in (lambda b: project(b, A.float(), t), lambda b: align(b, A.float(), s, t)):
        up, down = method(B.float())
        scaled, down_too = method(B.float() * strength)
        torch.testing.assert_close(scaled @ down_too, strength * (up @ down), rtol=1e-4, atol=1e-4)  # absolute as above


@given(problems)
@settings(deadline=None)
def test_signs_and_rotations_of_singular_vectors_change_nothing(sizes):
    m, n, rank, _, seed = sizes
    W_s, W_t, B, A = (x.float() for x in problem(*sizes))
    s, t = decompose(W_s, rank), decompose(W_t, rank)
    Q = orthogonal(t.rank, t.rank, seed + 40).float()
    turned = Subspace(t.U @ Q, t.S, Q.T @ t.Vh)
    pairs = [(project(B, A, t), project(B, A, turned))]
    pairs += [(subspace_null(B, A, s, t), subspace_null(B, A, s, turned))]
    wider = decompose(falling(m + 5, n, seed + 50).float(), rank)
    Q = orthogonal(wider.rank, wider.rank, seed + 41).float()
    turned_wider = Subspace(wider.U @ Q, wider.S, Q.T @ wider.Vh)
    overlap = torch.linalg.svdvals(s.Vh.double() @ wider.Vh.double().T)
    if s.rank == wider.rank and overlap[-1] > 1e-2:  # the polar factor is unique where V_s^T V_t is regular
        pairs += [(align(B, A, s, wider), align(B, A, s, turned_wider))]
    for (up, down), (up_too, down_too) in pairs:
        torch.testing.assert_close(up_too @ down_too, up @ down, rtol=0, atol=1e-3)  # absolute as above


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("seed", range(5))
def test_align_recovers_the_exact_answer_where_index_fails(side, seed):
    """Method section 5: one side resized by an isometry, the target's vectors with arbitrary signs."""
    m, n, wide, r, k = 24, 18, 40, 10, 3
    W_s = falling(m, n, seed)
    U, S, V = naive(W_s, r)
    M = randn(r, r, seed=seed + 5).double()
    B, A = (U @ M)[:, :k].float(), V.T[:k].float()
    dW = B.double() @ A.double()
    Q = orthogonal(wide, m if side == "output" else n, seed + 9)
    signs = torch.tensor([1.0, -1.0] * (r // 2)).double()
    s = Subspace(U.float(), S.float(), V.T.float())
    if side == "output":
        t = Subspace((Q @ U * signs).float(), S.float(), (V * signs).T.float())
        exact = Q @ dW
    else:
        t = Subspace((U * signs).float(), S.float(), (Q @ V * signs).T.float())
        exact = dW @ Q.T
    assert close(*align(B, A, s, t), exact) < 1e-5
    assert close(*index(B, A, s, t), exact) > 0.5


def test_both_sides_resized_go_by_index_and_pair_signs_cancel():
    W_s, W_t = falling(12, 10, 1).float(), falling(20, 16, 2).float()
    s, t = decompose(W_s, 5), decompose(W_t, 5)
    delta = torch.arange(1.0, 6.0)
    B, A = s.U * delta, s.Vh
    expected = ((t.U * delta) @ t.Vh).double()
    signs = torch.tensor([1.0, -1, 1, -1, -1])
    flipped = Subspace(t.U * signs, t.S, signs[:, None] * t.Vh)
    for space in (t, flipped):
        assert close(*align(B, A, s, space), expected) < 1e-5
        assert close(*index(B, A, s, space), expected) < 1e-5


def test_one_side_index_is_the_least_squares_map():
    """Method section 5: `P = argmin ||P U_s - U_t||_F = U_t U_s^+`, against the pseudo-inverse."""
    W_s, W_t = falling(12, 16, 1), falling(20, 16, 2)
    s, t = decompose(W_s.float(), 5), decompose(W_t.float(), 5)
    B, A = randn(12, 3, seed=3).double(), randn(3, 16, seed=4).double()
    P = t.U.double() @ torch.linalg.pinv(s.U.double())
    V = t.Vh.double().T
    assert close(*index(B.float(), A.float(), s, t), P @ B @ A @ V @ V.T) < 1e-5
