"""The laboratory's own parts, against what is known without them."""

import json
import math

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
matplotlib = pytest.importorskip("matplotlib")
stats = pytest.importorskip("scipy.stats")

from lab import RESULTS, ideas
from lab.applied import changed, dense
from lab.experiments import PAIRS, ways
from lab.model import SIZES, generate, held_out_loss, unet
from lab.report import Results, spearman, told
from lorax import Adapter, LoraLayer
from lorax.compare.matching import match_bases
from lorax.models.base import module_base
from tests.tensors import same


@pytest.fixture(scope="module")
def models():
    """A U-Net, and the same one with the basis of every residual stream and every head space changed."""
    torch.manual_seed(0)
    return unet("pruned"), unet("pruned")


def orthogonal(d):
    return torch.linalg.qr(torch.randn(d, d))[0]


def test_streams_find_a_change_of_basis(models):
    source, target = models
    target.load_state_dict(source.state_dict())
    bases = [module_base(model) for model in models]
    streams, inner = {}, {}
    modules = dict(target.named_modules())
    for layer in bases[1].layers.values():
        if not layer.is_attention:
            continue
        place, part = layer.path.rsplit(".to_", 1)
        weight = modules[layer.path].weight.data
        Q = streams.setdefault(place.partition(".transformer_blocks")[0], orthogonal(weight.shape[0]))
        # Queries and keys of one attention share a basis; values and outputs another.
        R = inner.setdefault((place, part[0] in "qk"), orthogonal(weight.shape[0]))
        text = "attn2" in place and part[0] in "kv"
        left, right = (Q, R) if part.startswith("out") else (R, None if text else Q)
        weight.copy_(left @ weight if right is None else left @ weight @ right.T)
    maps = ideas.streams(*bases, match_bases(*bases))
    assert len(maps) == sum(layer.is_attention for layer in bases[1].layers.values())
    for name, sides in maps.items():
        moved = ideas.streamed(bases[0].weight(name), sides)
        same(moved, bases[1].weight(name))


def test_each_idea_moves_an_update_onto_its_own_base_unchanged():
    torch.manual_seed(1)
    W, dW = torch.randn(12, 20), torch.randn(12, 20)
    torch.testing.assert_close(ideas.effect_kept(dW, W, W), dW)
    torch.testing.assert_close(ideas.rescaled(3 * dW, dW, W, W), dW)
    same(ideas.weighted(dW, W, W), dW, limit=0.1)  # the ridge takes some of it
    torch.testing.assert_close(ideas.effect_kept(dW, W, 2 * W), 2 * dW)
    kept = ideas.soft(dW, W, W)
    assert 0.1 < float(kept.norm() / dW.norm()) < 1


def test_each_adapter_is_moved_in_the_ways_of_the_published_rounds():
    rows = json.loads((RESULTS / "fluent-0.json").read_text())["rows"]
    measured = {(row["kind"], row["on"]) for row in rows if row["kind"] and row["on"] in PAIRS}
    assert {pair for _, pair in measured} == set(PAIRS)
    for kind, pair in measured:
        moved = [row["way"] for row in rows if (row["kind"], row["on"]) == (kind, pair) and row["way"] != "trained"]
        assert sorted(way.name for way in ways(kind, pair)) == sorted(moved), (kind, pair)


def test_updates_come_off_again(models):
    model = models[0]
    base = module_base(model)
    layer = next(layer for layer in base.layers.values() if layer.is_attention)
    own = LoraLayer(layer, torch.randn(layer.shape[0], 2), torch.randn(2, layer.shape[1]))
    deltas = dense(Adapter("a", base.family, "kohya", {layer.name: own}), base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with changed(model, deltas, base):
        update = base.weight(layer.name) - before[f"{layer.path}.weight"]
        same(update, own.delta_weight())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", SIZES)
def test_models_are_of_the_family_that_they_stand_for(name):
    assert module_base(unet(name)).family.name == "sd1"


def test_pictures_and_losses_repeat(models):
    tokens = torch.randn(2, 12, 768)
    first = generate([models[0]], tokens, seed=3, steps=2)
    assert torch.equal(first, generate(models, tokens, seed=3, steps=2))  # a model beside it changes nothing
    assert held_out_loss(models[0], first, tokens) == held_out_loss(models[0], first, tokens)


def test_rank_correlation():
    torch.manual_seed(2)
    for size in (6, 10, 40):
        a, b = torch.randn(2, size).round(decimals=0).tolist()
        expected = stats.spearmanr(a, b).statistic
        assert spearman(a, b) == pytest.approx(expected)


def test_means_with_their_error():
    values = [1.0, 2.0, 4.0]
    assert told(values, "+.2f") == f"+2.33 ± {stats.sem(values):.2f}"
    assert told([]) == "-"


@pytest.mark.parametrize("folder", [RESULTS, RESULTS / "second"], ids=["first", "second"])
def test_stored_results_are_whole(folder):
    """What docs/results.md stands on: every round measured the same rows, and no measure is missing."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*-[0-9]*.json"))]
    rows = [{(row["on"], row["kind"], row["way"]) for row in one["rows"]} for one in found]
    assert len(found) >= 5
    assert all(one == rows[0] for one in rows)
    results = Results(folder)
    assert all(math.isfinite(row["closed"]) for row in results.rows if "closed" in row)
    assert set(results.of("closed", way="trained", kind="lora-x", on="pruned")) == {1.0}
