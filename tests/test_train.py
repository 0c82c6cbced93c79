"""Training: gradients against a dense weight, the file against what was trained, resuming bit for bit, PEFT."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lorax
from lorax import MismatchError, OptionError
from lorax.adapters import expand
from lorax.train import attach, train
from tests.trainable import data, loss_of, made

LAYERS = st.one_of(
    st.builds(
        lambda m, n, bias: (nn.Linear(n, m, bias=bias), (n,)), st.integers(1, 9), st.integers(1, 9), st.booleans()
    ),
    st.builds(
        lambda m, n, groups, kernel, stride, padding, dilation: (
            nn.Conv2d(n * groups, m * groups, kernel, stride, padding, dilation, groups),
            (n * groups, 7, 8),
        ),
        st.integers(1, 4),
        st.integers(1, 4),
        st.integers(1, 3),
        st.sampled_from([1, 3, (1, 3), (3, 2)]),
        st.integers(1, 2),
        st.integers(0, 2),
        st.integers(1, 2),
    ),
)


@settings(deadline=None, max_examples=60)
@given(LAYERS, st.integers(1, 9), st.lists(st.integers(1, 3), max_size=2), st.integers(0, 2**31))
def test_values_and_gradients_are_those_of_the_dense_weight(case, rank, batch, seed):
    torch.manual_seed(seed)
    layer, shape = case
    model = nn.Sequential(layer).double()
    layer.reset_parameters()
    x = torch.randn(*(batch[:1] or [1] if len(shape) == 3 else batch), *shape, dtype=torch.float64, requires_grad=True)
    weight = layer.weight.detach()
    rank = min(rank, *weight.flatten(1).shape)
    with attach(model, layers=["0"], rank=rank) as layers:
        (delta,) = layers.parameters()
        with torch.no_grad():
            delta.copy_(torch.randn(len(delta)))
        ours = model(x)
        probe = torch.randn_like(ours)
        found = torch.autograd.grad((ours * probe).sum(), [x, delta])
    space = lorax.linalg.decompose(weight.flatten(1).float(), rank)
    dense_delta = delta.detach().double().requires_grad_()
    update = (space.U.double() * dense_delta) @ space.Vh.double()
    expected = torch.func.functional_call(layer, {"weight": weight + update.reshape(weight.shape)}, (x,))
    wanted = torch.autograd.grad((expected * probe).sum(), [x, dense_delta])
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-5, atol=1e-6)  # delta itself is float32


def test_it_is_nothing_at_the_start_and_gone_at_the_end():
    model, (x, text, _) = made(), data()
    before, state = model(x, text), {key: value.clone() for key, value in model.state_dict().items()}
    model.ff.weight.requires_grad_(False)
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with attach(model) as layers:
        assert torch.equal(model(x, text), before)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        sizes = {model.get_submodule(path).weight.numel() for path in ("attn1.to_q", "attn1.to_out", "attn2.to_k")}
        assert [tuple(delta.shape) for delta in layers.parameters()] == [(24,), (24,), (16,)]
        train(layers, loss_of(model), 5, learning_rate=0.1)
        after = model(x, text)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(model(x, text), before)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == learns
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert sizes == {24 * 24, 24 * 16}


def test_no_buffer_is_as_large_as_a_weight():
    model = nn.Sequential(nn.Linear(64, 96), nn.Conv2d(8, 96, 3))
    with attach(model, layers=["0", "1"], rank=4) as layers:
        assert max(buffer.numel() for buffer in layers.buffers()) < 96 * 64
        assert {tuple(buffer.shape) for buffer in layers.buffers()} == {(96, 4), (4, 64), (4, 72)}


@pytest.mark.parametrize("rank", [3, None])
def test_the_file_expanded_on_the_base_is_what_was_trained(tmp_path, rank):
    model, (x, text, _) = made(), data()
    with attach(model, layers=lambda layer: True, rank=rank) as layers:
        train(layers, loss_of(model), 20, learning_rate=0.05)
        trained = model(x, text)
    base = lorax.module_base(model)
    lorax.save_adapter(layers.adapter("style"), tmp_path / "style.safetensors")
    adapter = lorax.load_adapter(tmp_path / "style.safetensors", base)
    assert not adapter.unused
    assert list(adapter.layers) == [
        f"transformer.{name}"
        for name in sorted(dict(model.named_modules()))
        if name in {"conv_in", "attn1.to_q", "attn1.to_out", "attn2.to_k", "ff"}
    ]
    before = model(x, text)
    with torch.no_grad():
        for name, own in adapter.layers.items():
            B, A = expand(own, base)
            weight = model.get_submodule(base.layers[name].path).weight
            weight += (B @ A).reshape(weight.shape)
    assert not torch.allclose(before, trained, atol=1e-2)
    torch.testing.assert_close(model(x, text), trained, rtol=1e-5, atol=2e-6)


def test_a_unet_has_the_names_of_its_file(tmp_path, bases):
    """diffusers' own U-Net, and the file of its weights, are one base."""
    from safetensors.torch import save_file

    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    save_file(model.state_dict(), tmp_path / "unet.safetensors")
    ours, file = lorax.module_base(model), lorax.open_base(tmp_path / "unet.safetensors")
    assert ours.family == file.family == bases[0].family
    assert dict(ours.layers) == dict(file.layers)
    assert dict(ours.vectors) == dict(file.vectors)
    x, time_step, text = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 768)
    with attach(model, rank=8) as layers:
        train(layers, lambda call: model(x, time_step, text).sample.square().mean(), 2)
    lorax.save_adapter(layers.adapter(), tmp_path / "x.safetensors")
    loaded = lorax.load_adapter(tmp_path / "x.safetensors")
    assert set(loaded.layers) == {layer.name for layer in file.layers.values() if layer.is_attention}
    for own in loaded.layers.values():
        own.check_source(file)


def test_parts_of_a_fused_weight_learn_each_its_own_singular_values():
    """A fused qkv: three layers in one module."""
    from lorax.models.base import Base
    from lorax.models.families import UNKNOWN
    from lorax.models.layers import Layer, LayerTable

    torch.manual_seed(0)
    model = nn.ModuleDict({"attn_qkv": nn.Linear(8, 24)}).double()
    weight = model["attn_qkv"].weight.detach()
    parts = [Layer(f"transformer.attn.to_{k}", (8, 8), "attn_qkv", (8 * i, 8 * i + 8)) for i, k in enumerate("qkv")]
    base = Base("fused", UNKNOWN, LayerTable(parts), lambda layer: weight[slice(*layer.rows)])
    x, update = torch.randn(3, 8, dtype=torch.float64), torch.zeros_like(weight)
    with attach(model, base=base, rank=2) as layers, torch.no_grad():
        for i, delta in enumerate(layers.parameters()):
            delta.copy_(torch.tensor([1.0, -2.0]))
            space = lorax.linalg.decompose(weight[8 * i : 8 * i + 8].float(), 2)
            update[8 * i : 8 * i + 8] = (space.U.double() * delta.double()) @ space.Vh.double()
        torch.testing.assert_close(
            model["attn_qkv"](x), x @ (weight + update).T + model["attn_qkv"].bias, rtol=1e-10, atol=1e-10
        )


def test_the_layers_of_a_diffusers_transformer_learn_where_its_original_has_one_weight():
    """What are rows of one weight in the original are whole modules here."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    name, x = "transformer_blocks.0.attn.to_v", torch.randn(3, 32)
    module = model.get_submodule(name)
    before, space = module(x).detach(), lorax.linalg.decompose(module.weight.detach(), 4)
    with attach(model, layers=[f"transformer.{name}"], rank=4) as layers, torch.no_grad():
        (delta,) = layers.parameters()
        delta.copy_(torch.tensor([1.0, -2.0, 3.0, 0.5]))
        torch.testing.assert_close(module(x), before + x @ ((space.U * delta) @ space.Vh).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_its_dtype_and_delta_float32(dtype):
    model, (x, text, _) = made(dtype=dtype), data(dtype)
    with attach(model) as layers:
        train(layers, loss_of(model), 3, learning_rate=0.05)
        assert model(x, text).dtype == dtype
        assert {parameter.dtype for parameter in layers.parameters()} == {torch.float32}
        assert {buffer.dtype for buffer in layers.buffers()} == {dtype}


def test_training_goes_on_from_an_adapter():
    model = made()
    with attach(model, layers=["attn1.to_q"], rank=5) as layers:
        train(layers, loss_of(model), 3, learning_rate=0.05)
    adapter = layers.adapter()
    with attach(model, start=adapter) as again:
        ((name, own),) = again.adapter().layers.items()
        assert torch.equal(own.delta, adapter.layers[name].delta)
        train(again, loss_of(model), 1)
    assert not torch.equal(again.adapter().layers[name].delta, own.delta)
    with pytest.raises(MismatchError, match="own source base"):
        attach(made(seed=5), start=adapter)
    with pytest.raises(OptionError, match="leave them out"):
        attach(model, start=adapter, rank=5)


BAD = {
    "unknown name": ({"layers": ["attn3.to_q"]}, MismatchError, "no such layer"),
    "nothing chosen": ({"layers": lambda layer: False}, MismatchError, "no layer is chosen"),
    "rank 0": ({"rank": 0}, OptionError, "rank"),
    "rank beyond every layer": ({"rank": 999}, OptionError, "rank"),
    "an embedding": ({"layers": ["words"]}, OptionError, "Embedding"),
    "a convolution that wraps around": ({"layers": ["wrapped"]}, OptionError, "Conv2d"),
    "torch's own attention": ({"layers": ["own.out_proj"]}, OptionError, "NonDynamically"),
}


@pytest.mark.parametrize(("options", "kind", "words"), BAD.values(), ids=BAD)
def test_bad_choices_are_refused(options, kind, words):
    model = made()
    model.words = nn.Embedding(10, 24)
    model.wrapped = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
    model.own = nn.MultiheadAttention(8, 2)
    with pytest.raises(kind, match=words):
        attach(model, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_without_singular_directions_is_named():
    model = made()
    nn.init.zeros_(model.attn1["to_out"].weight)
    with attach(model) as layers:
        pass
    assert list(layers.adapter().unused) == ["transformer.attn1.to_out"]


def test_the_command_line_does_not_wait_for_it():
    import subprocess
    import sys

    code = "import sys, lorax.cli; sys.exit('lorax.train' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
