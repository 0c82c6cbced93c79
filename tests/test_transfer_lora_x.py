"""Transfers of LoRA-X files, and what becomes one."""

import pytest
import torch

from lorax import Adapter, LoraXLayer, MismatchError, TransferOptions, transfer_adapter
from lorax.adapters.convert import convert_to_lora, convert_to_lora_x
from tests.conftest import small_base
from tests.tensors import same


@pytest.fixture(scope="session")
def lora_x(bases):
    source = bases[0]
    generator = torch.Generator().manual_seed(3)
    attention = [layer for layer in source.layers.values() if layer.is_attention]
    layers = {
        a.name: LoraXLayer(a, torch.randn(16, generator=generator), source.fingerprint(a.name)) for a in attention
    }
    return Adapter("x", source.family, "lora-x", layers)


def test_lora_x_is_projected_and_can_stay_lora_x(bases, lora_x):
    source, target = bases
    result, report = transfer_adapter(lora_x, source, target, TransferOptions(method="project", rank=16))
    kept, kept_report = transfer_adapter(
        lora_x, source, target, TransferOptions(method="project", rank=16, format="lora-x")
    )
    assert {row.method for row in report.rows} == {"project"}
    dense = convert_to_lora(kept, target)
    for name, own in lora_x.layers.items():
        (U_s, _, Vh_s), (U_t, _, Vh_t) = (
            (u[:, :16], s[:16], v[:16])
            for u, s, v in (torch.linalg.svd(b.weight(name).double(), full_matrices=False) for b in bases)
        )
        dW = (U_s * own.delta.double()) @ Vh_s
        M = U_t.T @ dW @ Vh_t.T
        same(result.layers[name].delta_weight(), U_t @ M @ Vh_t)
        diagonal = (U_t * M.diagonal()) @ Vh_t
        same(dense.layers[name].delta_weight(), diagonal)
        assert kept.layers[name].fingerprint == target.fingerprint(name)
    assert kept_report.retained_norm < report.retained_norm <= 1


def test_lora_x_on_its_own_base_is_itself(bases, lora_x):
    result, report = transfer_adapter(lora_x, bases[0], bases[0], TransferOptions(rank=16, format="lora-x"))
    assert {row.method for row in report.rows} == {"orthogonal"}
    assert report.retained_norm == pytest.approx(1, abs=1e-4)
    for name, own in lora_x.layers.items():
        same(result.layers[name].delta, own.delta)


def test_lora_x_of_another_base_is_refused_and_a_swap_is_named(bases, lora_x, tmp_path):
    with pytest.raises(MismatchError, match="swap source and target"):
        transfer_adapter(lora_x, bases[1], bases[0], TransferOptions(rank=16))
    stranger = small_base(tmp_path / "stranger.safetensors", seed=99)
    with pytest.raises(MismatchError, match="own source base"):
        transfer_adapter(lora_x, stranger, bases[1], TransferOptions(rank=16))
    with pytest.raises(MismatchError, match="needs its source base"):
        convert_to_lora(lora_x)


def test_convert_to_lora_x_is_the_closest_one(bases, lora):
    source = bases[0]
    converted, shares = convert_to_lora_x(lora, source, rank=20)
    assert converted.layers.keys() == lora.layers.keys()
    for name, own in converted.layers.items():
        U, _, Vh = torch.linalg.svd(source.weight(name).double(), full_matrices=False)
        dW = lora.layers[name].delta_weight().double()
        r = own.rank
        basis = torch.stack([torch.outer(U[:, i], Vh[i]).flatten() for i in range(r)], dim=1)
        best = torch.linalg.lstsq(basis, dW.flatten()[:, None]).solution.flatten()
        same(basis @ own.delta.double(), basis @ best)
        assert shares[name] == pytest.approx(float(best.norm() / dW.norm()), abs=1e-4)


def test_copy_does_what_a_lora_x_does_on_its_source(bases, lora_x):
    source, target = bases
    result, report = transfer_adapter(lora_x, source, target, TransferOptions(method="copy"))
    assert {row.method for row in report.rows} == {"copy"}
    for name, own in lora_x.layers.items():
        U, _, Vh = torch.linalg.svd(source.weight(name).double().flatten(1), full_matrices=False)
        expected = (U[:, : own.rank] * own.delta.double()) @ Vh[: own.rank]
        same(result.layers[name].delta_weight(), expected)
