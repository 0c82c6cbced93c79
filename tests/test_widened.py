"""Updates of input layers on models that read more channels, or fewer."""

from dataclasses import replace

import pytest
import torch

from lorax import Base, Layer, LayerTable, Outcome, TransferOptions, transfer_adapter
from lorax.adapters import Adapter, DiffLayer, LoraXLayer, expand
from lorax.models.families import families
from lorax.transfer.widened import fitted
from tests.naive import moved_naively, updates
from tests.tensors import dense, randn, same

# family, name, outputs, channels of the model and of those made of it, kernel
MADE = [
    ("sd1", "unet.conv_in", 32, 4, 9, (3, 3)),
    ("sdxl", "unet.conv_in", 32, 4, 8, (3, 3)),
    ("wan", "transformer.patch_embedding", 24, 16, 36, (1, 2, 2)),
    ("hunyuan_video", "transformer.x_embedder.proj", 24, 16, 33, (1, 2, 2)),
    ("flux", "transformer.x_embedder", 24, 64, 384, ()),
    ("flux", "transformer.x_embedder", 24, 64, 128, ()),
]
IDS = [f"{family} {less} to {more}" for family, _, _, less, more, _ in MADE]


def base_of(family, name, weight):
    other = Layer(f"{name.partition('.')[0]}.other", (3, 3))
    layers = LayerTable([Layer(name, tuple(weight.shape)), other])
    return Base("b", families()[family], layers, lambda layer: torch.eye(3) if layer.path == "other" else weight)


def pair(case, seed=0):
    family, name, out, less, more, kernel = case
    narrow = randn(out, less, *kernel, seed=seed)
    wide = randn(out, more, *kernel, seed=seed + 1)
    wide[:, :less] = narrow + 0.1 * randn(out, less, *kernel, seed=seed + 2)
    return base_of(family, name, narrow), base_of(family, name, wide)


def of_kinds(base, name, seed=0):
    weight = base.read(base.layers[name])
    found = updates(tuple(weight.shape), 3, 2.0, seed, weight)
    fingerprint = base.fingerprint(name)
    return {
        kind: replace(own, layer=base.layers[name], **({"fingerprint": fingerprint} if kind == "lora-x" else {}))
        for kind, own in found.items()
    }


def of_other(base):
    """An update of the layer beside it, which goes through in any case."""
    name = next(name for name in base.layers if name.endswith("other"))
    return DiffLayer(base.layers[name], torch.ones(3, 3))


@pytest.mark.parametrize("case", MADE, ids=IDS)
@pytest.mark.parametrize("method", ["copy", "auto", "orthogonal", "project", "subspace-null", "align"])
def test_the_known_channels_take_the_update_and_the_others_none(case, method):
    source, target = pair(case)
    name = case[1]
    columns = source.layers[name].matrix_shape[1]
    for kind, own in of_kinds(source, name).items():
        dW = dense(own, source)
        options = TransferOptions(method=method, rank=3, lora_rank=1000, threshold=-9, dtype="float32")
        result, report = transfer_adapter(Adapter("a", source.family, "kohya", {name: own}), source, target, options)
        (row,) = report.rows
        assert row.outcome is Outcome.TRANSFERRED
        assert f"the first {case[3]} input channels" in row.note
        moved = result.layers[name]
        assert moved.layer.shape == target.layers[name].shape
        arrived = dense(moved, target)
        assert not arrived[:, columns:].any()
        shared = target.weight(name)[:, :columns]
        thin = kind in ("lora", "lora cp", "foura", "lora-x")
        formula = ("orthogonal" if thin else "copy") if method == "auto" else method
        if not thin and formula in ("orthogonal", "subspace-null"):  # by the factors that they are made of
            continue
        A = expand(own, source)[1].double() if thin else None
        expected = moved_naively(formula, dW, A, source.weight(name), shared, 3)
        if formula == "subspace-null":
            U, S, Vh = torch.linalg.svd(expected, full_matrices=False)
            expected = (U[:, :3] * S[:3]) @ Vh[:3]
        same(arrived[:, :columns], expected)
        assert row.target_norm == pytest.approx(float(arrived.norm()), rel=1e-4)
        assert row.source_norm == pytest.approx(float(dW.norm()), rel=1e-4)


@pytest.mark.parametrize("method", ["copy", "project"])
@pytest.mark.parametrize("kind", ["lora", "diff"])
def test_the_result_has_the_dtype_of_the_input(kind, method):
    source, target = pair(MADE[0])
    own = of_kinds(source, "unet.conv_in")[kind]
    adapter = Adapter("a", source.family, "kohya", {"unet.conv_in": own.moved(own.layer, torch.float16)})
    result, _ = transfer_adapter(adapter, source, target, TransferOptions(method=method, rank=3, threshold=-9))
    assert result.layers["unet.conv_in"].dtype == torch.float16


@pytest.mark.parametrize("case", MADE, ids=IDS)
def test_the_other_way_the_channels_that_the_target_lacks_are_cut_and_count_as_lost(case):
    target, source = pair(case)
    name = case[1]
    columns = target.layers[name].matrix_shape[1]
    for own in of_kinds(source, name).values():
        dW = dense(own, source)
        adapter = Adapter("a", source.family, "kohya", {name: own})
        result, report = transfer_adapter(
            adapter, source, target, TransferOptions(method="copy", threshold=-9, dtype="float32")
        )
        arrived = dense(result.layers[name], target)
        same(arrived, dW[:, :columns])
        assert report.retained_norm == pytest.approx(float(arrived.norm() / dW.norm()), rel=1e-3)


@pytest.mark.parametrize("case", MADE, ids=IDS)
def test_applied_as_it_is_the_known_channels_take_the_update(case):
    """Of kinds that need the weight, that of the model it is applied to."""
    narrow, wide = pair(case)
    name, kinds = case[1], set()
    columns = narrow.layers[name].matrix_shape[1]
    same_start = base_of(case[0], name, wide.read(wide.layers[name])[:, : case[3]])
    for kind, own in of_kinds(same_start, name).items():
        if kind == "lora-x":
            continue
        widened = fitted(own, wide)
        assert widened.layer.shape == wide.layers[name].shape
        arrived = dense(widened, wide)
        same(arrived[:, :columns], dense(own, same_start))
        assert not arrived[:, columns:].any()
    for kind, own in of_kinds(wide, name).items():
        if kind != "lora-x" and (less := fitted(own, narrow)):
            same(dense(less, narrow), dense(own, wide)[:, :columns])
            kinds.add(kind)
    assert kinds >= {"lora", "foura", "loha", "lokr", "diff"}
    assert "oft" not in kinds


def test_they_are_compared_by_the_channels_that_they_share():
    source, target = pair(MADE[0])
    own = of_kinds(source, "unet.conv_in")["lora"]
    _, report = transfer_adapter(Adapter("a", source.family, "kohya", {"unet.conv_in": own}), source, target)
    (row,) = report.rows
    assert row.left.phi > 0.95
    assert row.right.phi > 0.95
    stranger = base_of("sd1", "unet.conv_in", randn(32, 9, 3, 3, seed=9))
    adapter = Adapter("a", source.family, "kohya", {"unet.conv_in": own, "unet.other": of_other(source)})
    _, report = transfer_adapter(adapter, source, stranger, TransferOptions(threshold=0.5))
    assert {row.source: row.outcome for row in report.rows} == {
        "unet.conv_in": Outcome.BELOW_THRESHOLD,
        "unet.other": Outcome.TRANSFERRED,
    }


def test_as_a_lora_x_it_is_the_change_of_the_singular_values_of_the_whole_target():
    source, target = pair(MADE[0])
    own = of_kinds(source, "unet.conv_in")["lora"]
    adapter = Adapter("a", source.family, "kohya", {"unet.conv_in": own})
    result, report = transfer_adapter(adapter, source, target, TransferOptions(method="copy", rank=8, format="lora-x"))
    moved = result.layers["unet.conv_in"]
    assert isinstance(moved, LoraXLayer)
    padded = torch.nn.functional.pad(dense(own, source), (0, 45))
    U, _, Vh = torch.linalg.svd(target.weight("unet.conv_in").double(), full_matrices=False)
    expected = (U[:, :8].T @ padded @ Vh[:8].T).diagonal()
    same(moved.delta.double().abs(), expected.abs())
    assert report.rows[0].target_norm == pytest.approx(float(expected.norm()), rel=1e-4)


@pytest.mark.parametrize("other", ["another family", "no input layer", "other outputs", "other kernel", "Lumina 2"])
def test_another_width_is_none_of_them(other):
    name, family, shape = "unet.conv_in", "sd1", (32, 9, 3, 3)
    if other == "no input layer":
        name = "unet.conv_out"
    if other == "Lumina 2":  # its channels stand together for each pixel of a patch
        name, family, shape = "transformer.x_embedder", "lumina2", (32, 128)
    source = base_of(family, name, randn(32, 64, seed=0) if other == "Lumina 2" else randn(32, 4, 3, 3, seed=0))
    shape = {"other outputs": (40, 9, 3, 3), "other kernel": (32, 9, 1, 1)}.get(other, shape)
    target = base_of("sdxl" if other == "another family" else family, name, randn(*shape, seed=1))
    adapter = Adapter("a", None, "kohya", {name: of_kinds(source, name)["lora"], "unet.other": of_other(source)})
    _, report = transfer_adapter(adapter, source, target, TransferOptions(method="copy", threshold=-9))
    row = next(row for row in report.rows if row.source == name)
    assert row.outcome is Outcome.SHAPE_MISMATCH
    assert other == "another family" or fitted(adapter.layers[name], target) is None


def test_the_patches_of_flux_begin_with_the_channels_of_the_latent():
    """By diffusers: what its Fill model reads, 16 channels of latent and then others."""
    pipeline = pytest.importorskip("diffusers").FluxFillPipeline
    numbered = torch.arange(96.0).reshape(1, 96, 1, 1).expand(1, 96, 4, 4)
    apart = [pipeline._pack_latents(part, 1, part.shape[1], 4, 4) for part in (numbered[:, :16], numbered[:, 16:])]
    together = pipeline._pack_latents(numbered, 1, 96, 4, 4)  # as ComfyUI joins them
    for columns in (torch.cat(apart, 2), together):
        assert columns.shape[2] == 384
        assert (columns[0, 0, :64] < 16).all()
        assert (columns[0, 0, 64:] >= 16).all()
        assert torch.equal(columns[0, 0, :64], apart[0][0, 0])
