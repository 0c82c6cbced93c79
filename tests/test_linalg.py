"""The linear algebra against torch.linalg.svd in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorax import OptionError
from lorax.linalg import all_finite, decompose, gram, leading_subspace, norm, polar, recompress, refactor
from tests.tensors import orthogonal, randn, same, with_spectrum

CASES = {
    "wide": with_spectrum(40, 90, [i**-0.5 for i in range(1, 41)]),
    "tall": with_spectrum(90, 40, [i**-0.5 for i in range(1, 41)]),
    "low rank plus noise": with_spectrum(60, 60, [1.0] * 5 + [1e-3] * 55),
    "repeated values": with_spectrum(50, 50, [2.0] * 10 + [1.0] * 10 + [0.1] * 30),
    "flat": orthogonal(48, 48),
    "one row": randn(1, 30).double(),
    "convolution": with_spectrum(32, 288, [i**-1.0 for i in range(1, 33)]),
}


@pytest.mark.parametrize("weight", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_leading_triplets_agree_with_torch_svd(weight, dtype):
    weight = weight.to(dtype)
    exact = torch.linalg.svd(weight.double(), full_matrices=False)
    for rank in (1, min(weight.shape) // 2 + 1, min(weight.shape)):
        space = decompose(weight, rank)
        assert space.U.dtype == torch.float32
        same(space.S, exact.S[: space.rank])
        for basis in (space.U.T, space.Vh):
            same(basis @ basis.T, torch.eye(space.rank))
        # The triplets belong together: W v_i = s_i u_i, also where singular values repeat and vectors are not unique.
        same(weight.float() @ space.Vh.T, space.U * space.S)


def test_projector_agrees_with_torch_svd_where_there_is_a_gap():
    weight = with_spectrum(80, 120, [1.0] * 20 + [0.5] * 60)
    U = torch.linalg.svd(weight, full_matrices=False).U[:, :20]
    ours = decompose(weight.float(), 20).U
    same(ours @ ours.T, U @ U.T)


def test_a_weight_of_lower_rank_gives_fewer_triplets():
    assert decompose(with_spectrum(40, 60, [3, 2, 1]).float(), 3).rank == 3
    dead = torch.zeros(8, 8)
    dead[0, 0] = 1
    assert decompose(dead, 5).rank == 1
    assert decompose(torch.zeros(4, 6), 4).rank == 0


def test_sign_rule():
    for seed in range(10):
        U = decompose(randn(20, 30, seed=seed), 20).U
        assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


def test_deterministic_and_input_unchanged():
    weight = randn(64, 96)
    before = weight.clone()
    first, second = decompose(weight, 32), decompose(weight, 32)
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.Vh, second.Vh)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("rank", [0, -3])
def test_rank_below_one_is_refused(rank):
    with pytest.raises(OptionError, match="at least 1"):
        decompose(torch.eye(3), rank)


def test_norm_of_factors():
    B, A = randn(30, 4).double(), randn(4, 50).double()
    assert norm(B, A) == pytest.approx(float(np.linalg.norm((B @ A).numpy())), rel=1e-12)
    assert norm(torch.zeros(30, 4), A) == 0


def test_recompress_is_the_best_approximation():
    B, A = randn(30, 8).double(), randn(8, 50).double()
    dense = B @ A
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    for rank in (3, 8):
        up, down = recompress(B, A, rank)
        assert up.shape == (30, rank)
        assert down.shape == (rank, 50)
        same(up @ down, (U[:, :rank] * S[:rank]) @ Vh[:rank], torch.float64)


def test_polar_solves_procrustes():
    X, Q = randn(40, 12).double(), orthogonal(12, 12, seed=3)
    same(polar(X.T @ (X @ Q)), Q, torch.float64)


@pytest.mark.parametrize("shape", [(1, 7), (256, 256), (257, 100), (700, 300)])
def test_gram_is_the_product_and_symmetric(shape):
    X = randn(*shape)
    assert torch.equal(gram(X), gram(X).T)
    same(gram(X), X.double() @ X.double().T)


@pytest.mark.parametrize("shape", [(300, 300), (300, 420), (420, 300)], ids=str)
@pytest.mark.parametrize("decay", [0.3, 0.5, 0.8, 1.5, 2.5])
def test_leading_subspaces_project_as_torch_svd_does(shape, decay):
    """Among them spectra that fall too far for float32, from which `decompose` takes over."""
    rank = 100
    weight = with_spectrum(*shape, [i**-decay for i in range(1, 301)]).float().double()
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    space = leading_subspace(weight.float(), rank)
    same(space.S, S[: space.rank])
    for ours, exact in ((space.U, U[:, : space.rank]), (space.Vh.T, Vh[: space.rank].T)):
        outside = ours.double() - exact @ (exact.T @ ours.double())
        assert float(outside.norm()) / space.rank**0.5 < 3e-5
        same(ours.T @ ours, torch.eye(space.rank))
    same(weight.float() @ space.Vh.T, space.U * space.S)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_leading_subspaces_do_not_depend_on_the_size_of_the_weight(size):
    weight = with_spectrum(300, 320, [i**-0.5 for i in range(1, 301)])
    ours, exact = leading_subspace((weight * size).float(), 100), leading_subspace(weight.float(), 100)
    same(ours.U @ (ours.U.T @ exact.U), exact.U)
    same(ours.S.double() / size, exact.S.double())


def test_small_weights_and_high_ranks_are_decomposed_exactly():
    weight = randn(80, 90)
    for rank in (20, 80):
        ours, exact = leading_subspace(weight, rank), decompose(weight, rank)
        assert torch.equal(ours.U, exact.U)
    with pytest.raises(OptionError, match="at least 1"):
        leading_subspace(weight, 0)


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_refactor_is_the_best_approximation(rank):
    update = randn(30, 20)
    B, A = refactor(update, rank)
    U, S, Vh = torch.linalg.svd(update.double(), full_matrices=False)
    same(B @ A, (U[:, :rank] * S[:rank]) @ Vh[:rank])
    B, A = refactor(torch.zeros(4, 6), 3)
    assert (B.shape, A.shape) == ((4, 1), (1, 6))
    assert not bool((B @ A).any())


@given(st.lists(st.floats(width=32), max_size=5), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_all_finite_is_what_numpy_says_of_the_numbers(values, dtype):
    tensor = torch.tensor(values).to(dtype)
    assert all_finite(tensor) == bool(np.isfinite(tensor.float().numpy()).all())


def test_finite_numbers_with_a_sum_beyond_float32_are_finite():
    assert all_finite(torch.full((3,), 3e38))
    assert not all_finite(torch.tensor([3e38, 3e38, float("nan")]))
    assert not all_finite(torch.tensor([float("inf"), float("-inf")]))
    assert not all_finite(torch.tensor([1e300], dtype=torch.float64))
