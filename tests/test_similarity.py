"""Phi against the published formula, its laws, and its chance level."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorax
from lorax import LayerTable, MismatchError, NumericsError, OptionError
from lorax.compare.matching import match_bases
from lorax.compare.scores import Score, Scores, mean_corrected
from lorax.compare.similarity import compare_bases, pair_scores
from lorax.models.families import UNKNOWN
from lorax.transfer.report import similarity_json
from tests.conftest import small_base


def weight(m, n, seed):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def phi_by_singular_vectors(A, B, side, rank=None):
    """`sum_ij l_i l'_j <u_i, u'_j>^2 / (||l|| ||l'||)` with `l = S^2`, in float64: method section 3."""
    spaces = []
    for matrix in (A.double(), B.double()):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        spaces.append(((U if side == 0 else Vh.T)[:, :rank], S[:rank] ** 2))
    (u, lu), (v, lv) = spaces
    return float(lu @ (u.T @ v).square() @ lv / (lu.norm() * lv.norm()))


sizes = st.tuples(st.integers(2, 20), st.integers(2, 20))


@given(sizes, st.integers(0, 10**6), st.sampled_from([None, 1, 2]))
@settings(deadline=None)
def test_equals_the_published_formula(size, seed, rank):
    A, B = weight(*size, seed), weight(*size, seed + 1)
    for side, score in enumerate(pair_scores(A, B, rank)):
        assert score.phi == pytest.approx(phi_by_singular_vectors(A, B, side, rank), abs=1e-5)


@given(sizes, st.integers(0, 10**6), st.floats(1e-2, 1e2))
@settings(deadline=None)
def test_laws(size, seed, scale):
    A, B = weight(*size, seed), weight(*size, seed + 1)
    here, there, scaled = pair_scores(A, B), pair_scores(B, A), pair_scores(A * scale, B)
    Q = torch.linalg.qr(weight(size[1], size[1], seed + 2).double())[0].float()
    turned = pair_scores(A @ Q, B)
    for side in (0, 1):
        assert -1e-6 <= here[side].phi <= 1 + 1e-5
        assert here[side].phi == pytest.approx(there[side].phi, abs=1e-5)
        assert here[side].phi == pytest.approx(scaled[side].phi, abs=1e-5)
    assert here[0].phi == pytest.approx(turned[0].phi, abs=1e-5)  # a rotation of the inputs leaves the outputs alone
    for score in pair_scores(A, A):
        assert score.phi == pytest.approx(1, abs=1e-5)
        assert math.isnan(score.corrected) or score.corrected == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-11, 1e9, 1e20, 1e30, 1e37])
@pytest.mark.parametrize("rank", [None, 3])
def test_the_size_of_a_weight_does_not_count_however_small_or_large(size, rank, monkeypatch):
    A, B = weight(6, 9, 1), weight(6, 9, 2)
    small, large = (A.double() * size).float(), (B.double() / size).float()
    for _ in range(2):
        for side, score in enumerate(pair_scores(small, large, rank)):
            assert score.phi == pytest.approx(phi_by_singular_vectors(small, large, side, rank), abs=1e-4)
            assert score.chance == pytest.approx(pair_scores(A, B, rank)[side].chance, abs=1e-4)
        monkeypatch.setattr("lorax.compare.sides.GRAM_LIMIT", 4)  # products of weights


def test_chance_level_is_what_unrelated_weights_score():
    for shape in ((200, 200), (200, 300)):
        scores = [pair_scores(weight(*shape, 2 * i), weight(*shape, 2 * i + 1)) for i in range(5)]
        for side in (0, 1):
            mean = sum(pair[side].phi for pair in scores) / 5
            assert mean == pytest.approx(scores[0][side].chance, abs=0.01)
            assert abs(sum(pair[side].corrected for pair in scores) / 5) < 0.02
    square = pair_scores(weight(400, 400, 1), weight(400, 400, 2))[0]
    assert square.chance == pytest.approx(0.5, abs=0.01)  # method section 3: square Gaussian weights


def test_no_score_where_there_is_none():
    left, right = pair_scores(weight(4, 6, 1), weight(5, 6, 2))
    assert math.isnan(left.phi)
    assert not math.isnan(right.phi)
    assert math.isnan(pair_scores(torch.zeros(4, 4), weight(4, 4, 1))[0].phi)
    assert math.isnan(Score(1.0, 1.0).corrected)


@pytest.mark.slow
def test_all_pairs_of_two_bases(bases, monkeypatch):
    source, target = bases
    whole = compare_bases(source, target, attention_only=False)
    # Small budgets and Gram limits take the other two paths: sources in several portions, products instead of Grams.
    monkeypatch.setattr("lorax.compare.similarity.BUDGET_BYTES", 1)
    monkeypatch.setattr("lorax.compare.sides.GRAM_LIMIT", 40)
    again = compare_bases(source, target, attention_only=False)
    kinds = {layer.kind for layer in source.layers.values()}
    assert {kind.kind.split(":")[1] for kind in whole.kinds} == kinds
    for kind, other in zip(whole.kinds, again.kinds, strict=True):
        for i, layer_s in enumerate(kind.sources):
            for j, layer_t in enumerate(kind.targets):
                W_s, W_t = source.weight(layer_s.name), target.weight(layer_t.name)
                for side, scores in enumerate((kind.left, kind.right)):
                    score = scores[i, j]
                    if W_s.shape[side] != W_t.shape[side]:
                        assert math.isnan(score.phi)
                        continue
                    assert score.phi == pytest.approx(phi_by_singular_vectors(W_s, W_t, side), rel=1e-4)
                    assert (other.left, other.right)[side][i, j].phi == pytest.approx(score.phi, rel=1e-4)


def test_paired_layers_score_above_all_others(bases):
    for kind in compare_bases(*bases).kinds:
        assert np.nanargmax(kind.right.phi, axis=1).tolist() == list(range(len(kind.sources)))


def test_progress_ends_at_the_total(bases):
    seen = []
    compare_bases(*bases, progress=lambda done, total, what: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_progress_can_stop_the_work(bases):
    class Stop(Exception): ...

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        compare_bases(*bases, progress=stop)


@pytest.mark.parametrize("rank", [0, -1, 10**6])
def test_rank_out_of_range(bases, rank):
    with pytest.raises(OptionError, match="out of range"):
        compare_bases(*bases, rank=rank)


def test_nan_in_a_base_is_named(tmp_path, bases):
    def read(layer):
        found = bases[1].read(layer)
        return found * float("nan") if layer.name.endswith("attn1.to_q") else found

    broken = lorax.Base("broken", bases[1].family, bases[1].layers, read)
    with pytest.raises(NumericsError, match=r"attn1\.to_q in broken"):
        compare_bases(bases[0], broken)


def test_bases_without_a_common_kind(bases, tmp_path):
    none = lorax.Base("none", bases[0].family, lorax.LayerTable([]), bases[0].read)
    with pytest.raises(MismatchError, match="share no kind"):
        compare_bases(bases[0], none)


def test_other_widths_share_the_text_side(tmp_path, bases):
    wide = small_base(tmp_path / "wide.safetensors", model_channels=64)
    kind = next(kind for kind in compare_bases(bases[0], wide).kinds if kind.kind == "unet:attn2.to_k")
    assert not np.isnan(kind.right.phi).any()


def rows_of_numbers(count):
    """A base of as many blocks of one layer of one number."""
    layers = LayerTable(lorax.Layer(f"transformer.blocks.{i}.attn.q", (1, 1)) for i in range(count))
    return lorax.Base("many", UNKNOWN, layers, lambda layer: torch.full((1, 1), 1.0 + len(layer.name)))


def test_a_pair_of_layers_takes_a_few_numbers_of_memory():
    """As Python objects, in a dictionary by name, it was 800 bytes."""
    source, target = rows_of_numbers(500), rows_of_numbers(501)
    match_bases(rows_of_numbers(2), rows_of_numbers(3))  # what is imported and made once
    for work in (compare_bases, match_bases):
        tracemalloc.start()
        work(source, target)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 120 * 500 * 501


def test_more_pairs_than_can_be_held_or_written_are_refused(bases, monkeypatch):
    few, more = rows_of_numbers(3), rows_of_numbers(4)
    monkeypatch.setattr("lorax.compare.scores.MOST_PAIRS", 12)
    assert len(match_bases(few, more).scores) == 12
    similarity = compare_bases(few, more)
    monkeypatch.setattr("lorax.transfer.report.MOST_JSON", 12)
    assert len(similarity_json(similarity)["kinds"][0]["left"]["phi"]) == 3
    monkeypatch.setattr("lorax.transfer.report.MOST_JSON", 11)
    with pytest.raises(OptionError, match="12, at most 11"):
        similarity_json(similarity)
    monkeypatch.setattr("lorax.compare.scores.MOST_PAIRS", 11)
    for work in (compare_bases, match_bases):
        with pytest.raises(MismatchError, match="12, at most 11"):
            work(few, more)


def test_tables_say_of_each_pair_what_it_says_of_itself(bases):
    """And names find the same in tables of all and of some layers."""
    (kind, *_) = compare_bases(*bases).kinds
    sides = kind.left, kind.right
    scores = Scores()
    scores.add(kind.sources, kind.targets, sides)
    assert len(list(scores)) == len(scores) == len(kind.sources) * len(kind.targets)
    means = mean_corrected(sides)
    for i, s in enumerate(kind.sources):
        for j, t in enumerate(kind.targets):
            pair = scores[s.name, t.name]
            assert str(pair) == str((kind.left[i, j], kind.right[i, j]))  # NaN is not itself
            values = [score.corrected for score in pair]
            for value, side in zip(values, sides, strict=True):
                assert value == side.corrected[i, j] or (math.isnan(value) and np.isnan(side.corrected[i, j]))
            finite = [value for value in values if not math.isnan(value)]
            assert means[i, j] == sum(finite) / len(finite) if finite else np.isnan(means[i, j])
    found = scores.sides(kind.sources[::-1], kind.targets[1:])
    assert np.array_equal(found[1].phi, kind.right.phi[::-1, 1:], equal_nan=True)
    assert scores.sides(kind.sources, [lorax.Layer("unet.none", (1, 1))]) is None
    assert ("unet.none", kind.targets[0].name) not in scores
    both = Scores(scores)
    both.add([], [], sides)
    assert len(both) == len(scores)
