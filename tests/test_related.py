"""On weights that others trained: two releases of one diffusion U-Net, of no family that has a table here.

The second was trained on from the first, and its file calls the whole `network` where the first says `model`.
"""

import subprocess

import pytest
import torch
from safetensors.torch import save_file

from lab.related import download, namesakes, pruned
from lorax import TransferOptions, compare_bases, load_adapter, open_base, save_adapter, transfer_adapter
from lorax.compare.matching import match_bases
from tests.tensors import same

pytestmark = pytest.mark.slow  # two models are downloaded

pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    try:
        return download(tmp_path_factory.mktemp("releases"))
    except subprocess.CalledProcessError:
        pytest.skip("the two releases of adaptive-terrain-diffusion cannot be downloaded")


def attention(base):
    return [layer for layer in base.layers.values() if layer.is_attention]


def test_the_modules_around_a_whole_model_are_no_part_of_its_names(releases, tmp_path):
    source, target = releases
    assert list(source.layers) == list(target.layers)
    assert source.layers["transformer.input_blocks.4.0.in_layers.2"].shape == (32, 32, 3, 3)
    block = {f"blocks.{i}.attn.qkv.weight": torch.eye(4) for i in range(2)}
    for around in ("", "model.", "model.network."):
        save_file({around + key: weight for key, weight in block.items()}, tmp_path / "base.safetensors")
        assert list(open_base(tmp_path / "base.safetensors").layers) == [
            "transformer.blocks.0.attn.qkv", "transformer.blocks.1.attn.qkv",
        ]  # fmt: skip


def test_every_layer_is_most_similar_to_its_namesake(releases):
    similarity = compare_bases(*releases, attention_only=False)
    assert namesakes(similarity) == (255, 255)


def test_similarity_is_the_published_formula_in_float64(releases):
    source, target = releases
    rank = 24
    kind = next(kind for kind in compare_bases(source, target, rank=rank).kinds if len(kind.sources) == 12)
    for i, j in ((0, 0), (3, 3), (3, 0), (11, 11)):
        bases = (source, kind.sources[i]), (target, kind.targets[j])
        (U_s, S_s, V_s), (U_t, S_t, V_t) = (
            torch.linalg.svd(base.weight(layer.name).double(), full_matrices=False) for base, layer in bases
        )
        S_s, S_t = S_s[:rank], S_t[:rank]
        scale = S_s.square().norm() * S_t.square().norm()
        for found, a, b in ((kind.left, U_s, U_t), (kind.right, V_s.T, V_t.T)):
            cosines = a[:, :rank].T @ b[:, :rank]
            phi = (S_s[:, None] * cosines * S_t).square().sum() / scale
            assert found[i, j].phi == pytest.approx(float(phi), rel=1e-5)


def test_blocks_with_and_without_attention_are_found_again_where_every_second_is_gone(releases, tmp_path):
    source, target = releases
    smaller, truth = pruned(target, tmp_path)
    assert 0 < len({layer.block for layer in attention(smaller)}) < len(truth)
    assert match_bases(source, smaller, "auto").pairs == truth


@pytest.mark.parametrize("spelling", ["network.{}.lora_A.weight", "base_model.model.network.{}.lora_A.weight"])
@pytest.mark.parametrize("method", ["project", "orthogonal"])
def test_a_lora_named_as_in_its_base_arrives_as_the_formula_says(releases, tmp_path, method, spelling):
    target, source = releases  # from the newer to the older
    torch.manual_seed(0)
    tensors = {}
    for layer in attention(source):
        key, (m, n) = spelling.format(layer.path), layer.matrix_shape
        tensors[key.replace("lora_A", "lora_B")] = torch.randn(m, 4, *[1] * (len(layer.shape) - 2))
        tensors[key] = torch.randn(4, n, *layer.shape[2:])
    save_file(tensors, tmp_path / "lora.safetensors")
    adapter = load_adapter(tmp_path / "lora.safetensors", source)
    moved, _ = transfer_adapter(adapter, source, target, TransferOptions(method=method, rank=32))
    save_adapter(moved, tmp_path / "moved.safetensors")
    moved = load_adapter(tmp_path / "moved.safetensors", target)
    assert len(moved.layers) == len(attention(source)) == 28
    for name, own in moved.layers.items():
        B, A = (
            tensors[spelling.format(name.partition(".")[2]).replace("lora_A", part)] for part in ("lora_B", "lora_A")
        )
        B, A = B.flatten(1).double(), A.flatten(1).double()
        W_s, W_t = source.weight(name).double(), target.weight(name).double()
        if method == "project":
            U, _, Vh = torch.linalg.svd(W_t, full_matrices=False)
            expected = U[:, :32] @ U[:, :32].T @ B @ A @ Vh[:32].T @ Vh[:32]
        else:
            F = (W_t - W_s) @ torch.linalg.pinv(A) @ A
            expected = B @ A - max(0.0, float((B @ A * F).sum() / F.square().sum())) * F
        same(own.delta_weight(), expected)
