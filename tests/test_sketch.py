"""Scores that sketches estimate, against the formula in float64; where an estimate cannot decide, it does not."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax import TransferOptions, match_bases, pair_scores, transfer_adapter
from lorax.compare import sides
from lorax.compare.scores import Score
from lorax.compare.similarity import score_layers
from tests.tensors import falling, randn

SMALL = 4  # columns of a sketch: layers of more than 32 rows are sketched


def weights(m, n, seed):
    return falling(m, n, seed).float(), falling(m, n, seed + 1000).float()


def exact(A, B, side):
    """Phi, chance and corrected similarity of one side, in float64."""
    G, H = (X @ X.T if side == 0 else X.T @ X for X in (A.double(), B.double()))
    norms = G.norm() * H.norm()
    phi, chance = float((G * H).sum() / norms), float(G.trace() * H.trace() / (len(G) * norms))
    return phi, chance, (phi - chance) / (1 - chance)


def pairs(count, m=96, n=64):
    """Pairs of weights from equal to unrelated."""
    for seed in range(count):
        A, B = weights(m, n, seed)
        yield A, B if seed % 4 == 3 else A + (0.1, 0.5, 1.5)[seed % 4] * B


def test_an_estimate_lies_within_its_standard_error_as_often_as_it_says():
    """Of a normal distribution 68 % lie within one; a sketch of few columns has longer tails."""
    errors = []
    for A, B in pairs(60):
        for side, score in enumerate(pair_scores(A, B, sketch=7)):
            errors.append((score.corrected - exact(A, B, side)[2]) / score.error)
    errors = np.abs(errors)
    assert 0.5 < (errors < 1).mean() < 0.85
    assert (errors < 3).mean() > 0.9


def test_more_columns_are_more_exact():
    """The standard error falls with the root of their number, and so does what is off."""
    means = []
    for columns in (2, 7):
        off = [
            abs(score.corrected - exact(A, B, side)[2])
            for A, B in pairs(40)
            for side, score in enumerate(pair_scores(A, B, sketch=columns))
        ]
        means.append(np.mean(off))
    assert means[1] == pytest.approx(means[0] * (2 / 7) ** 0.5, rel=0.4)


@given(st.integers(33, 80), st.integers(33, 80), st.integers(0, 10**6), st.floats(1e-2, 1e2))
@settings(deadline=None)
def test_laws(m, n, seed, scale):
    A, B = weights(m, n, seed)
    here, there, scaled = (pair_scores(*two, sketch=SMALL) for two in ((A, B), (B, A), (A * scale, B)))
    for side in (0, 1):
        assert here[side].corrected == pytest.approx(there[side].corrected, abs=1e-4)
        assert here[side].corrected == pytest.approx(scaled[side].corrected, abs=1e-4)
        assert here[side].error >= 0
    for score in pair_scores(A, A, sketch=SMALL):
        assert score.corrected == pytest.approx(1, abs=1e-5)
        assert score.error == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("shape", [(96, 20), (20, 96), (20, 20)])
def test_a_narrow_side_is_exact(shape):
    A, B = weights(*shape, 1)
    for side, score in enumerate(pair_scores(A, B, sketch=SMALL)):
        is_exact = shape[side] <= SMALL * sides.EXACT_ROWS
        assert (score.error == 0) == is_exact
        if is_exact:
            assert score.corrected == pytest.approx(exact(A, B, side)[2], abs=1e-4)


@pytest.mark.parametrize("weight", [torch.zeros(40, 40), randn(40, 1) @ randn(1, 40)], ids=["zero", "of rank one"])
def test_weights_of_no_room(weight):
    left, right = pair_scores(weight, weight, sketch=SMALL)
    if weight.any():
        assert [left.corrected, right.corrected] == pytest.approx([1, 1], abs=1e-5)
    else:
        assert np.isnan([left.phi, right.phi, left.corrected, left.error]).all()
        assert not left.is_near(0.0)


def test_all_pairs_are_what_each_pair_is(bases, monkeypatch):
    """Whatever fits into memory at a time."""
    layers = [[layer for layer in base.layers.values() if layer.kind == "attn1.to_q"] for base in bases]
    for budget, rows in ((2**30, 256), (1, 256), (2**30, 1)):
        monkeypatch.setattr("lorax.compare.similarity.BUDGET_BYTES", budget)
        monkeypatch.setattr("lorax.compare.sides.ROWS", rows)
        found = score_layers(*bases, *layers, sketch=1)
        for i, source in enumerate(layers[0]):
            for j, target in enumerate(layers[1]):
                one = pair_scores(bases[0].weight(source.name), bases[1].weight(target.name), sketch=1)
                for table, score in zip(found, one, strict=True):
                    assert table[i, j].corrected == pytest.approx(score.corrected, abs=1e-4, nan_ok=True)
                    assert table[i, j].error == pytest.approx(score.error, abs=1e-4, nan_ok=True)


def test_an_estimate_near_the_threshold_is_computed_exactly(bases, lora, monkeypatch):
    """With sketches of two columns, which say little, every outcome is that of the exact comparison."""
    monkeypatch.setattr("lorax.options.SKETCH", 2)
    estimated = transfer_adapter(lora, *bases, TransferOptions(threshold=-9))[1]
    assert any(row.left.error > 0 for row in estimated.rows)
    values = sorted(row.corrected for row in estimated.rows)
    for threshold in (values[len(values) * part // 4] for part in (0, 1, 2, 3)):
        rows = [
            transfer_adapter(lora, *bases, TransferOptions(threshold=threshold, exact=exact))[1].rows
            for exact in (True, False)
        ]
        decided = [row for row in rows[1] if row.left.error == row.right.error == 0]
        assert decided
        outcomes = {row.source: row.outcome for row in rows[0]}
        assert all(row.outcome is outcomes[row.source] for row in decided)
        near = [side for row in rows[1] for side in (row.left, row.right) if side.is_near(threshold)]
        assert not near


def test_what_is_moved_does_not_depend_on_how_layers_are_compared(bases, lora):
    moved = [transfer_adapter(lora, *bases, TransferOptions(exact=exact))[0] for exact in (True, False)]
    for name, update in moved[0].layers.items():
        assert torch.equal(update.delta_weight(), moved[1].layers[name].delta_weight())


def test_blocks_that_a_sketch_cannot_tell_apart_are_compared_exactly(bases):
    """Sketches of two columns, and the pairs of the exact comparison."""
    whole = match_bases(*bases, "order", sketch=None)
    found = match_bases(*bases, "order", sketch=2)
    assert found.pairs == whole.pairs


def test_a_score_that_is_exact_is_never_near():
    assert not Score(0.5, 0.0).is_near(0.5)
    assert Score(0.5, 0.0, 0.01).is_near(0.519)
    assert not Score(0.5, 0.0, 0.01).is_near(0.521)
