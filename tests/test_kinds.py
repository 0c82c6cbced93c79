"""Every kind of adapter layer against naive formulas in float64; LyCORIS and PEFT are in `test_kinds_oracles.py`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax.adapters import (
    BoftLayer,
    DiffLayer,
    FouraLayer,
    GloraLayer,
    LohaLayer,
    LokrLayer,
    LoraLayer,
    LoraXLayer,
    OftLayer,
    VectorLayer,
    fuse,
)
from lorax.adapters.kinds import KINDS
from lorax.adapters.layer import with_magnitude
from lorax.errors import FormatError, MismatchError
from lorax.models.layers import Layer
from tests.agreement import agree
from tests.tensors import randn, same

# ------------------------------------------------------------------------------------------------------ naive formulas


def test_lora_in_loops():
    up, down = randn(3, 2), randn(2, 4, seed=1)
    naive = [[sum(0.75 * up[i, p] * down[p, j] for p in range(2)) for j in range(4)] for i in range(3)]
    agree("naive lora", LoraLayer(Layer("unet.x", (3, 4)), up, down, 1.5).delta_weight(), torch.tensor(naive))


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8])
def test_foura_against_the_complex_transform(rank):
    up, down, gate = randn(6, rank), randn(rank, 5, seed=1), randn(rank, seed=2)
    frequency = torch.arange(rank, dtype=torch.float64)
    F = torch.exp(-2j * torch.pi * frequency[:, None] * frequency / rank) / rank**0.5
    C = (F.conj().T @ torch.diag(gate.double().to(torch.complex128)) @ F).real
    torch.testing.assert_close(C[1:, 1:], C[:-1, :-1])  # a circulant
    naive = 3 / rank * up.double() @ C @ down.double()
    ours = FouraLayer(Layer("unet.x", (6, 5)), up, down, gate, 3.0)
    agree("naive foura", ours.delta_weight(), naive)
    B, A = ours.factors()
    agree("naive foura", B @ A, naive)
    assert ours.norm() == pytest.approx(float(naive.norm()), rel=1e-5)


def test_a_foura_with_an_open_gate_is_a_lora():
    up, down = randn(6, 4), randn(4, 5)
    layer = Layer("unet.x", (6, 5))
    foura, lora = FouraLayer(layer, up, down, torch.ones(4), 2.0), LoraLayer(layer, up, down, 2.0)
    agree("naive foura", foura.delta_weight(), lora.delta_weight())


def test_early_glora_is_the_other_way_round():
    W = randn(6, 5, seed=9).double()
    a1, a2, b1, b2 = randn(2, 5), randn(5, 2), randn(2, 5, seed=1), randn(6, 2)
    ours = GloraLayer.read(Layer("unet.x", (6, 5)), {"a1": a1, "a2": a2, "b1": b1, "b2": b2}, 1.0)
    naive = (W @ a2.double() @ a1.double() + b2.double() @ b1.double()) / 2
    assert ours.is_early
    assert ours.rank == 2
    agree("naive glora", ours.delta_weight(W), naive)


def test_rotations_are_orthogonal_and_a_rotation_keeps_the_singular_values():
    W = randn(16, 6, seed=3).double()
    for layer in (
        OftLayer(Layer("unet.x", (16, 6)), randn(4, 4, 4)),
        BoftLayer(Layer("unet.x", (16, 6)), randn(3, 4, 4, 4)),
    ):
        turned = W + layer.delta_weight(W)
        torch.testing.assert_close(torch.linalg.svdvals(turned), torch.linalg.svdvals(W))


def test_lora_x_against_a_full_decomposition():
    W, delta = randn(8, 6, seed=4), randn(6)
    U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    agree("naive lora-x", LoraXLayer(Layer("unet.x", (8, 6)), delta).delta_weight(W), U * delta.double() @ Vh)


@pytest.mark.parametrize("per_output", [True, False])
def test_the_magnitude_keeps_its_ratio_on_another_base(per_output):
    layer, shape = Layer("unet.x", (6, 5, 3, 3)), (6, 1, 1, 1) if per_output else (1, 5, 1, 1)
    W_s, W_t, ratio = randn(6, 5, 3, 3, seed=1), randn(6, 5, 3, 3, seed=2), 1 + randn(*shape).abs()

    def norms(weight):
        flat = weight.double().flatten(1) if per_output else weight.double().transpose(0, 1).flatten(1)
        return flat.norm(dim=1).reshape(shape)

    dora = LoraLayer(layer, randn(6, 2), randn(2, 45), None, None, (ratio * norms(W_s)).float())
    moved = with_magnitude(dora, dora.magnitude_on(W_s, W_t))
    same(norms(W_t + moved.delta_weight(W_t).reshape(W_t.shape)) / norms(W_t), ratio.double())
    on_its_own = with_magnitude(dora, dora.magnitude_on(W_s, W_s))
    torch.testing.assert_close(on_its_own.dora_scale, dora.dora_scale)


# ------------------------------------------------------------------------------------------------------------ algebra

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
sizes = st.integers(1, 5)


@st.composite
def layers(draw):  # noqa: C901
    """Any kind, of any small size, linear or convolution, in any dtype, with and without its optional parts."""
    kind = draw(st.sampled_from([*KINDS, VectorLayer]))
    k, a, b, c, d = (draw(sizes) for _ in range(5))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3)]))
    one = tuple(1 for _ in kernel)
    m, n = a * b, c * d
    area = torch.Size(kernel).numel()
    tucker = bool(kernel) and draw(st.booleans())
    shape = (m, n, *kernel)
    if kind is LoraLayer:
        shapes = {"lora_up": (m, k, *one), "lora_down": (k, n, *(one if tucker else kernel))}
        shapes |= {"lora_mid": (k, k, *kernel)} if tucker else {}
    elif kind is LohaLayer and tucker:
        shapes = {f"hada_w{i}_{x}": (k, size) for i in "12" for x, size in (("a", m), ("b", n))}
        shapes |= {f"hada_t{i}": (k, k, *kernel) for i in "12"}
    elif kind is LohaLayer:
        shapes = {f"hada_w{i}_{x}": s for i in "12" for x, s in (("a", (m, k)), ("b", (k, n * area)))}
    elif kind is LokrLayer:
        shapes = draw(st.sampled_from([{"lokr_w1": (a, c)}, {"lokr_w1_a": (a, k), "lokr_w1_b": (k, c)}]))
        w2 = [{"lokr_w2": (b, d, *kernel)}, {"lokr_w2_a": (b, k), "lokr_w2_b": (k, d * area)}]
        w2 += [{"lokr_w2_a": (k, b), "lokr_w2_b": (k, d), "lokr_t2": (k, k, *kernel)}] if kernel else []
        shapes = shapes | draw(st.sampled_from(w2))
    elif kind is GloraLayer:
        shapes = {"a1": (n, k, *one), "a2": (k, n, *one), "b1": (m, k, *one), "b2": (k, n, *kernel)}
    elif kind is OftLayer:
        shapes = {"oft_blocks": (a, b, b)} | draw(st.sampled_from([{}, {"rescale": (m, 1, *one)}]))
    elif kind is BoftLayer:
        shape = (16, n, *kernel)
        shapes = {"oft_blocks": (draw(st.integers(1, 3)), 4, 4, 4)}
    elif kind is FouraLayer:
        shapes = {"foura_up": (m, k), "foura_down": (k, n * area), "foura_gate": (k,)}
    elif kind is LoraXLayer:
        shapes = {"delta": (1,)}
    else:
        shapes = {"diff": shape if kind is DiffLayer else (m,)}
        shape = shapes["diff"]
    if "dora_scale" in kind.OPTIONAL and draw(st.booleans()):
        shapes = shapes | {"dora_scale": draw(st.sampled_from([(m, 1, *one), (1, n, *one)]))}
    seed, dtype = draw(st.integers(0, 99)), draw(st.sampled_from(DTYPES))
    parts = {name: (0.5 * randn(*s, seed=seed + i)).to(dtype) for i, (name, s) in enumerate(shapes.items())}
    return kind, Layer("unet.x", shape), parts, draw(st.sampled_from([None, 0.0, 1.0, 2.5]))


def weight_of(layer):
    return randn(*layer.shape, seed=77).double()


@given(layers())
@settings(deadline=None, max_examples=300)
def test_what_is_read_is_what_is_written_and_nothing_changes(drawn):
    kind, layer, parts, alpha = drawn
    copies = {name: part.clone() for name, part in parts.items()}
    own = kind.read(layer, parts, alpha)
    weight = weight_of(layer)
    update = own.delta_weight(weight)
    assert update.shape == layer.matrix_shape
    assert update.dtype == torch.float64
    assert own.dtype == next(iter(parts.values())).dtype
    assert own.rank >= 1
    assert own.norm(weight) == pytest.approx(float(update.norm()), rel=1e-4, abs=1e-4)
    written = own.tensors()
    spelled = {kind.KEYS.get(name, name): name for name in kind.REQUIRED | kind.OPTIONAL}
    again = kind.read(
        layer,
        {spelled[key]: tensor for key, tensor in written.items() if key != "alpha"},
        float(written["alpha"]) if "alpha" in written else None,
    )
    assert torch.equal(again.delta_weight(weight), update)
    for name, part in parts.items():
        stored = again.parts()[name]
        assert stored.dtype == part.dtype
        assert torch.equal(stored.double().flatten(), part.double().flatten())
        assert torch.equal(copies[name].double(), part.double())
    assert torch.equal(weight, weight_of(layer))
    half = own.moved(Layer("unet.y", layer.shape), torch.bfloat16)
    assert {part.dtype for part in half.parts().values()} == {torch.bfloat16}
    assert half.kind == own.kind
    if own.is_thin:
        B, A = own.factors()
        torch.testing.assert_close((B @ A).double(), update, rtol=1e-3, atol=1e-3)  # the sums may cancel
    if own.needs_weight:
        with pytest.raises(MismatchError, match="weight"):
            own.delta_weight()
    else:
        torch.testing.assert_close(own.delta_weight().double(), update, rtol=1e-4, atol=1e-4)  # the same


@given(layers(), st.data())
@settings(deadline=None, max_examples=200)
def test_the_cuts_of_an_update_stacked_are_the_update(drawn, data):
    kind, layer, parts, alpha = drawn
    own = kind.read(layer, parts, alpha)
    place = data.draw(st.integers(0, layer.shape[0]))
    heights = [height for height in (place, layer.shape[0] - place) if height]
    rows = [Layer(f"unet.x{i}", (height, *layer.shape[1:])) for i, height in enumerate(heights)]
    cuts = own.cut(rows)
    scale = parts.get("dora_scale")
    cuttable = kind in (LoraLayer, LohaLayer, DiffLayer, FouraLayer, VectorLayer)
    assert (cuts is None) == (not cuttable or (scale is not None and scale.shape[0] != layer.shape[0]))
    if cuts is None:
        return
    assert [cut.layer for cut in cuts] == rows
    weight = weight_of(layer)
    pieces = weight.split(heights)
    stacked = torch.cat([cut.delta_weight(piece) for cut, piece in zip(cuts, pieces, strict=True)])
    if len(layer.shape) == 1 or scale is None or scale.shape[0] == layer.shape[0]:
        torch.testing.assert_close(stacked, own.delta_weight(weight))
    if kind is LoraLayer:
        whole = fuse(cuts, layer)
        assert whole.parts().keys() == own.parts().keys()
        assert all(torch.equal(part.double(), own.parts()[name].double()) for name, part in whole.parts().items())
        assert whole.alpha == own.alpha


@given(st.lists(st.tuples(sizes, sizes, st.sampled_from([None, 1.0, 3.0])), min_size=1, max_size=3), sizes)
@settings(deadline=None)
def test_fused_parts_are_their_stack(drawn, n):
    parts = [
        LoraLayer(Layer(f"unet.{i}", (m, n)), randn(m, k, seed=i), randn(k, n, seed=i + 9), alpha)
        for i, (m, k, alpha) in enumerate(drawn)
    ]
    whole = fuse(parts, Layer("unet.x", (sum(m for m, _, _ in drawn), n)))
    torch.testing.assert_close(whole.delta_weight(), torch.cat([part.delta_weight() for part in parts]))


# ----------------------------------------------------------------------------------------------------------- bad parts

LORA, GATE = {"lora_up": (6, 2), "lora_down": (2, 5)}, {"foura_up": (6, 4), "foura_down": (4, 5)}
BAD = {
    "half": (LoraLayer, {"lora_up": (6, 2)}, "without lora_down"),
    "ranks": (LoraLayer, LORA | {"lora_down": (3, 5)}, "not two factors"),
    "size": (LoraLayer, LORA | {"lora_down": (2, 4)}, "of a weight"),
    "empty": (LoraLayer, LORA | {"lora_down": (2, 0)}, "empty"),
    "stranger": (LoraLayer, LORA | {"hada_w1_a": (2, 5)}, "which it cannot have"),
    "mid": (LoraLayer, LORA | {"lora_mid": (3, 2, 1, 1)}, "lora_mid"),
    "magnitude": (LoraLayer, LORA | {"dora_scale": (4, 1)}, "magnitude"),
    "gate": (FouraLayer, GATE | {"foura_gate": (3,)}, "gate"),
    "blocks": (OftLayer, {"oft_blocks": (2, 3, 2)}, "square"),
    "butterfly": (BoftLayer, {"oft_blocks": (4, 3, 2, 2)}, "butterfly"),
    "rescale": (OftLayer, {"oft_blocks": (2, 3, 3), "rescale": (5, 1)}, "rescale"),
    "kronecker": (LokrLayer, {"lokr_w1": (2, 5)}, "Kronecker"),
    "both forms": (LokrLayer, {"lokr_w1": (2, 5), "lokr_w2": (3, 1), "lokr_w2_a": (3, 1)}, "Kronecker"),
    "hadamard": (LohaLayer, {f"hada_w{i}_{x}": (6, 5) for i in "12" for x in "ab"}, "two matrices"),
    "glora": (GloraLayer, {name: (6, 5) for name in ("a1", "a2", "b1", "b2")}, "four factors"),
    "vector": (VectorLayer, {"diff": (6, 5)}, "vector"),
    "delta": (LoraXLayer, {"delta": (6, 5)}, "vector"),
}


@pytest.mark.parametrize(("kind", "shapes", "words"), BAD.values(), ids=BAD)
def test_parts_that_do_not_fit_are_named(kind, shapes, words):
    with pytest.raises(FormatError, match=words) as caught:
        kind.read(Layer("unet.x", (6, 5)), {name: torch.ones(shape) for name, shape in shapes.items()}, 1.0)
    assert next(iter(shapes)) in str(caught.value)
