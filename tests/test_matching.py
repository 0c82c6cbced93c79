import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from demo.pruned import accuracy, noisy, pruned_pair
from demo.synthetic import falling
from lorax import FormatError, MismatchError, OptionError, TransferOptions, load_adapter, open_base, transfer_adapter
from lorax.compare.matching import best_in_order, load_assignment, match_bases, spread
from lorax.compare.scores import ScoreTable
from lorax.compare.similarity import compare_bases

from .conftest import small_base

# Where Anima 40 blocks has blocks that Anima 28 blocks has not, as published with it.
ANIMA_NEW = {2, 5, 8, 11, 14, 17, 21, 24, 27, 30, 33, 36}


def naive_best(values):
    """The best total of all rising pairings, by trying every one."""
    rows, columns = len(values), len(values[0])
    best = 0.0
    for k in range(1, min(rows, columns) + 1):
        for chosen in itertools.combinations(range(rows), k):
            for places in itertools.combinations(range(columns), k):
                best = max(best, sum(values[i][j] for i, j in zip(chosen, places, strict=True)))
    return best


@given(st.integers(1, 5), st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_best_rising_pairing_is_found(rows, columns, random):
    values = [[random.uniform(-1, 1) for _ in range(columns)] for _ in range(rows)]
    pairs = best_in_order(values)
    assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(pairs))
    assert sum(values[i][j] for i, j in pairs) == pytest.approx(naive_best(values))


def test_nan_is_never_paired():
    assert best_in_order([[math.nan, 0.5], [math.nan, math.nan]]) == [(0, 1)]
    assert best_in_order([[math.nan]]) == best_in_order([]) == []


@given(st.integers(1, 60), st.integers(1, 60))
def test_spread_is_rising_and_keeps_the_ends(sources, targets):
    pairs = spread(sources, targets)
    assert len(pairs) == min(sources, targets)
    assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(pairs))
    assert pairs[0] == (0, 0)
    if min(sources, targets) > 1:
        assert pairs[-1] == (sources - 1, targets - 1)


def anima(depth, width=48):
    """Names and proportions of Anima's blocks, reduced in width."""
    shapes = {"x_embedder.proj.1": (width, 68), "final_layer.linear": (64, width)}
    for i in range(depth):
        for attention, context in (("self_attn", width), ("cross_attn", width // 2)):
            shapes |= {f"blocks.{i}.{attention}.{part}_proj": (width, width) for part in ("q", "output")}
            shapes |= {f"blocks.{i}.{attention}.{part}_proj": (width, context) for part in ("k", "v")}
        shapes |= {f"blocks.{i}.mlp.layer1": (4 * width, width), f"blocks.{i}.mlp.layer2": (width, 4 * width)}
        for norm in ("self_attn", "cross_attn", "mlp"):
            shapes[f"blocks.{i}.adaln_modulation_{norm}.1"] = (16, width)
            shapes[f"blocks.{i}.adaln_modulation_{norm}.2"] = (3 * width, 16)
    return shapes


def number(name):
    return int(re.search(r"\.(\d+)\.?", name).group(1))


@pytest.fixture(scope="module")
def anima_bases(tmp_path_factory):
    """28 blocks, and 40 made of them as block expansion does: copies of the neighbour before, trained away a little."""
    generator = torch.Generator().manual_seed(3)
    source = {f"net.{path}.weight": falling(shape, generator) for path, shape in anima(28).items()}
    old = iter(range(28))
    parent, target = -1, {}
    for j in range(40):
        new = j in ANIMA_NEW
        parent = parent if new else next(old)
        for key in [key for key in source if key.startswith(f"net.blocks.{parent}.")]:
            place = key.replace(f"blocks.{parent}.", f"blocks.{j}.")
            target[place] = noisy(source[key], 0.6 if new else 0.1, generator)
    target |= {key: value for key, value in source.items() if ".blocks." not in key}
    folder = tmp_path_factory.mktemp("anima")
    save_file(source, folder / "28.safetensors")
    save_file(target, folder / "40.safetensors")
    return open_base(folder / "28.safetensors"), open_base(folder / "40.safetensors")


def anima_place(i):
    """Where block `i` of the 28 went, from the published list."""
    return [j for j in range(40) if j not in ANIMA_NEW][i]


def test_the_published_table_of_anima_is_found_from_the_weights(anima_bases):
    source, target = anima_bases
    assert (source.label, target.label) == ("Anima, 28 blocks", "Anima, 40 blocks")
    assignment = match_bases(source, target)
    for j in range(40):
        block = assignment.pairs[f"transformer.transformer_blocks.{j}"]
        assert (block == "") == (j in ANIMA_NEW)
        if block:
            assert anima_place(number(block)) == j
    back = match_bases(target, source)
    expected = {
        f"transformer.transformer_blocks.{i}": f"transformer.transformer_blocks.{anima_place(i)}" for i in range(28)
    }
    assert dict(back.pairs) == expected


def test_known_scores_decide_and_are_not_computed_again(anima_bases):
    """By scores that no comparison gives: block 0 of the source is like block 12 of the target, and so on."""
    source, target = anima_bases
    compared = compare_bases(*anima_bases, attention_only=True)
    made_up = [
        replace(kind, **dict.fromkeys(("left", "right"), ScoreTable(0 * kind.left.phi + like, 0 * kind.left.phi)))
        for kind in compared.kinds
        for like in [[[number(s.name) + 12 == number(t.name) for t in kind.targets] for s in kind.sources]]
    ]
    done = []
    known = replace(compared, kinds=made_up).scores
    assignment = match_bases(source, target, scores=known, progress=lambda *step: done.append(step))
    assert not done
    for block, pair in assignment.pairs.items():
        assert pair == ("" if number(block) < 12 else block.replace(str(number(block)), str(number(block) - 12)))


def anima_lora(tmp_path, base, spelling="lora_unet_blocks_{}_self_attn_q_proj"):
    generator, tensors = torch.Generator().manual_seed(5), {}
    for i in range(28):
        m, n = base.layers[f"transformer.transformer_blocks.{i}.attn1.to_q"].shape
        module = spelling.format(i)
        tensors[f"{module}.lora_up.weight"] = torch.randn(m, 2, generator=generator)
        tensors[f"{module}.lora_down.weight"] = torch.randn(2, n, generator=generator)
    save_file(tensors, tmp_path / "anima.safetensors")
    return load_adapter(tmp_path / "anima.safetensors", base)


def test_an_anima_lora_arrives_at_its_blocks_and_is_not_mapped_twice(anima_bases, tmp_path):
    source, target = anima_bases
    adapter = anima_lora(tmp_path, source)
    result, report = transfer_adapter(adapter, source, target, TransferOptions(method="copy"))
    assert report.arrived == len(report.rows) == 28
    for i in range(28):
        own = adapter.layers[f"transformer.transformer_blocks.{i}.attn1.to_q"]
        moved = result.layers[f"transformer.transformer_blocks.{anima_place(i)}.attn1.to_q"]
        assert torch.equal(own.lora_up, moved.lora_up)
    with pytest.raises(MismatchError, match="made for the target already"):
        transfer_adapter(result, source, target)


def test_progress_tells_of_the_comparing_first_and_stops_it(anima_bases, tmp_path):
    adapter, steps = anima_lora(tmp_path, anima_bases[0]), []
    transfer_adapter(adapter, *anima_bases, TransferOptions(method="copy"), progress=lambda *step: steps.append(step))
    compared = steps[:-28]
    assert [step[:2] for step in steps[-28:]] == [(done, 28) for done in range(1, 29)]
    assert [step[0] for step in compared] == list(range(1, compared[0][1] + 1))
    assert {name for *_, name in compared} >= adapter.layers.keys()

    def stop(*step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        match_bases(*anima_bases, progress=stop)


def test_an_assignment_can_be_saved_edited_and_fed_back(anima_bases, tmp_path):
    source, target = anima_bases
    adapter = anima_lora(tmp_path, source)
    saved = match_bases(source, target).to_json()
    saved["pairs"]["transformer.transformer_blocks.39"] = ""
    saved["pairs"]["transformer.transformer_blocks.38"] = "transformer.transformer_blocks.27"
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(saved))
    result, report = transfer_adapter(
        adapter, source, target, TransferOptions(threshold=-9), assignment=load_assignment(path, source, target)
    )
    assert "transformer.transformer_blocks.38.attn1.to_q" in result.layers
    assert "transformer.transformer_blocks.39.attn1.to_q" not in result.layers
    assert report.assignment.matching == "file"
    path.write_text(json.dumps(report.to_json()))
    again, _ = transfer_adapter(
        adapter, source, target, TransferOptions(threshold=-9), assignment=load_assignment(path, source, target)
    )
    assert again.layers.keys() == result.layers.keys()
    for bad in ("{", "[]", "{}", '{"schema": "lorax-assignment", "schema_version": 9, "pairs": {}}'):
        path.write_text(bad)
        with pytest.raises(FormatError, match="not an assignment"):
            load_assignment(path, source, target)
    saved["pairs"] = {"transformer.transformer_blocks.77": ""}
    path.write_text(json.dumps(saved))
    with pytest.raises(FormatError, match=r"the target does not have.*blocks\.77"):
        load_assignment(path, source, target)


def test_an_assignment_in_a_report_of_version_1_is_still_read(bases, tmp_path):
    """As the releases before version 2 of reports wrote it, but for its rows."""
    block, path = bases[1].layers["unet.mid_block.attentions.0.proj_in"].block, tmp_path / "report.json"
    saved = {"schema": "lorax-assignment", "schema_version": 1, "matching": "auto", "pairs": {block: ""}, "ways": {}}
    report = {"schema": "lorax-transfer", "schema_version": 1, "retained_energy": 1.0, "warnings": ["weak effect"]}
    path.write_text(json.dumps(report | {"rows": [], "assignment": saved}))
    assert load_assignment(path, *bases).pairs == {block: ""}


@pytest.mark.slow
def test_every_surviving_block_is_found_where_argmax_errs(tmp_path):
    source, target, truth = pruned_pair(tmp_path, change=8)
    assert (source.label, target.label) == ("Stable Diffusion XL", "SSD-1B")
    assert accuracy(match_bases(source, target), source, target, truth) == 1
    by_module = match_bases(source, target, "argmax")
    assert 0 < accuracy(by_module, source, target, truth) < 0.9
    fed = [layer for layer in by_module.pairs.values() if layer]
    assert len(set(fed)) < len(fed)  # and it feeds several layers from one


def test_equal_depth_goes_by_name_and_compares_nothing(bases):
    assignment = match_bases(*bases)
    assert set(assignment.ways.values()) == {"name"}
    assert all(block == source for block, source in assignment.pairs.items())
    assert not assignment.scores
    assert all(assignment.source_of(name) == name for name in bases[1].layers)


def test_levels_of_two_families_meet_where_the_resolution_is_the_same(tmp_path):
    """The last up block of both works at full resolution, whatever its number."""
    deep = small_base(tmp_path / "deep.safetensors", channel_mult=(1, 2, 2), transformer_depth=(1, 1, 1), text=False)
    flat = small_base(tmp_path / "flat.safetensors", text=False)
    pairs = match_bases(deep, flat, "name").pairs
    assert (
        pairs["unet.up_blocks.1.attentions.0.transformer_blocks.0"]
        == "unet.up_blocks.2.attentions.0.transformer_blocks.0"
    )
    assert (
        pairs["unet.down_blocks.0.attentions.0.transformer_blocks.0"]
        == "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    )


def test_without_a_shared_side_blocks_go_by_position(anima_bases, tmp_path):
    generator = torch.Generator().manual_seed(4)
    tensors = {f"{path}.weight": falling(shape, generator) for path, shape in anima(40, width=32).items()}
    save_file(tensors, tmp_path / "narrow.safetensors")
    assignment = match_bases(anima_bases[0], open_base(tmp_path / "narrow.safetensors"))
    places = {number(block): number(target) for target, block in assignment.pairs.items() if block}
    assert places == dict(spread(28, 40))
    assert set(assignment.ways.values()) == {"position"}
    assert assignment.summary == ["paired by position: 28 of 40 blocks of the target get an update"]


def test_unknown_matching_is_refused(bases):
    with pytest.raises(OptionError, match="unknown matching"):
        match_bases(*bases, "best")
