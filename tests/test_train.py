"""Training: gradients against a dense weight, the file against what was trained, resuming bit for bit, PEFT."""

import math
import random
import signal
import threading
import time
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lorax
from lorax import MismatchError, NumericsError, OptionError
from lorax.adapters import expand
from lorax.show.pictures import ARRIVED_INK, loss_picture
from lorax.train import attach, thinned, train
from tests.trainable import data, made


def loss_of(model, noise=0.1):
    """A loss that draws from all three sources of random numbers."""
    x, text, y = data(next(model.parameters()).dtype)

    def loss(call):
        x_now = x + noise * torch.randn_like(x) + noise * float(np.random.rand()) + noise * random.random()
        return (model(x_now, text) - y).square().mean()

    return loss


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


# Training


def run(steps, path=None, *, layers=None, stop_at=None, **options):
    """Train a fresh model; return the deltas and the losses."""
    model = made()
    attached = attach(model, rank=8)
    inner = loss_of(model)

    def loss(call):
        if call == stop_at:
            raise KeyboardInterrupt
        return inner(call)

    result = train(attached, loss, steps, learning_rate=0.03, checkpoint=path, **options)
    return [delta.detach().clone() for delta in attached.parameters()], result


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "SGD with momentum", "RMSprop", "Adafactor"])
@pytest.mark.parametrize("parts", [1, 3])
def test_resuming_is_bit_for_bit(tmp_path, optimizer, parts):
    name, _, momentum = optimizer.partition(" with ")
    if not hasattr(torch.optim, name):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    chosen = partial(getattr(torch.optim, name), **({"momentum": 0.9} if momentum else {}))
    options = {"optimizer": chosen, "grad_accumulation_steps": parts, "seed": 4}
    whole, result = run(12, **options)
    path = tmp_path / "training.safetensors"
    run(5, path, **options)
    torch.rand(3), np.random.rand(3), random.random()  # other random numbers meanwhile
    deltas, resumed = run(12, path, resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole, deltas, strict=True))
    assert resumed.losses == result.losses
    assert len(result.losses) == 12


def test_ctrl_c_keeps_what_was_learnt(tmp_path):
    whole, result = run(9)
    path = tmp_path / "training.safetensors"
    deltas, stopped = run(9, path, stop_at=6)
    assert stopped.interrupted
    assert stopped.losses == result.losses[:6]
    assert all(torch.equal(a, b) for a, b in zip(run(6)[0], deltas, strict=True))
    deltas, resumed = run(9, path, resume=True)
    assert not resumed.interrupted
    assert resumed.losses == result.losses
    assert all(torch.equal(a, b) for a, b in zip(whole, deltas, strict=True))


@pytest.fixture
def interruptible():
    """A shell's background job ignores Ctrl-C, and so would the test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_real_interrupt_ends_after_a_whole_step(tmp_path):
    path, before = tmp_path / "training.safetensors", signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    start = time.monotonic()
    deltas, stopped = run(100_000, path)
    assert stopped.interrupted
    assert time.monotonic() - start < 30
    assert signal.getsignal(signal.SIGINT) is before
    steps = len(stopped.losses)
    assert all(torch.equal(a, b) for a, b in zip(run(steps)[0], deltas, strict=True))
    assert run(steps, path, resume=True)[1].losses == stopped.losses


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_with_the_step_and_keeps_the_state(tmp_path, bad):
    model, path = made(), tmp_path / "training.safetensors"
    inner = loss_of(model)
    seen = []
    with attach(model, rank=8) as layers:
        with pytest.raises(NumericsError, match=r"loss.*step 4 of 10"):
            train(
                layers,
                lambda call: inner(call) * (bad if call == 3 else 1),
                10,
                learning_rate=0.03,
                checkpoint=path,
                on_step=lambda step, loss: seen.append((step, loss)),
            )
        kept = [delta.detach().clone() for delta in layers.parameters()]
    expected, result = run(3)
    assert all(torch.equal(a, b) for a, b in zip(expected, kept, strict=True))
    assert seen == list(enumerate(result.losses, 1))
    whole, _ = run(10)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(10, path, resume=True)[0], strict=True))


def test_a_gradient_that_is_no_number_stops_before_it_does_harm():
    model = made()
    with attach(model, rank=8) as layers:
        (first, *_) = layers.parameters()
        # The derivative of a square root at 0 is infinite.
        with pytest.raises(NumericsError, match=r"gradient.*step 1 of 5"):
            train(layers, lambda call: (first * 0).sum().sqrt() + loss_of(model)(call), 5)
        assert all(bool((delta == 0).all()) for delta in layers.parameters())


def test_the_random_numbers_of_others_are_left_alone():
    model = made()
    layers = attach(model)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = (torch.rand(3), np.random.rand(3).tolist(), random.random())
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    train(layers, loss_of(model), 2)
    found = (torch.rand(3), np.random.rand(3).tolist(), random.random())
    assert torch.equal(expected[0], found[0])
    assert expected[1:] == found[1:]


def test_accumulated_steps_are_one_step_of_the_mean():
    model = made()
    x, text, y = data()

    def curve(parts):
        with attach(model, rank=8) as layers:

            def loss(call):
                error = (model(x, text) - y).square()
                return error.mean() if parts == 1 else error[call % 2].mean()

            options = {"optimizer": torch.optim.SGD, "grad_accumulation_steps": parts}
            result = train(layers, loss, 4, learning_rate=1.0, **options)
            return result.losses, [delta.detach().clone() for delta in layers.parameters()]

    torch.testing.assert_close(curve(2), curve(1), rtol=1e-4, atol=1e-6)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = tmp_path / "training.safetensors"
    run(2, path)
    content = path.read_bytes()
    model = made()
    for layers, options, words in (
        (attach(model, rank=7), {}, "other parameters"),
        (attach(model, rank=8), {"optimizer": torch.optim.SGD}, "another optimizer"),
    ):
        with pytest.raises(MismatchError, match=words):
            train(layers, loss_of(model), 3, checkpoint=path, resume=True, **options)
    assert path.read_bytes() == content
    style = tmp_path / "style.safetensors"
    lorax.save_adapter(layers.adapter(), style)
    with pytest.raises(lorax.FormatError, match="no checkpoint"):
        train(layers, loss_of(model), 3, checkpoint=style, resume=True)
    with pytest.raises(OptionError, match="nothing to resume"):
        train(layers, loss_of(model), 3, resume=True)


def test_a_checkpoint_is_written_every_so_many_steps_and_leaves_nothing_beside_it(tmp_path):
    path, seen = tmp_path / "training.safetensors", []
    run(5, path, checkpoint_every=2, on_step=lambda step, loss: seen.append(path.exists()))
    assert seen == [False, True, True, True, True]
    assert [entry.name for entry in tmp_path.iterdir()] == ["training.safetensors"]


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


def test_nothing_to_learn_is_refused():
    model = made().requires_grad_(False)
    with pytest.raises(OptionError, match="nothing can learn"):
        train(model, loss_of(model), 1)


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_peft_trains_in_the_same_loop(tmp_path, use_dora):
    peft = pytest.importorskip("peft")

    def fresh():
        config = peft.LoraConfig(r=4, target_modules=["to_q", "to_out", "to_k"], use_dora=use_dora)
        torch.manual_seed(2)
        return peft.get_peft_model(made(), config)

    def go(steps, path=None, resume=False):
        model = fresh()
        result = train(model, loss_of(model), steps, learning_rate=0.02, checkpoint=path, resume=resume)
        return result.losses, [p.detach().clone() for p in model.parameters() if p.requires_grad]

    path = tmp_path / "training.safetensors"
    losses, parameters = go(30)
    assert sum(losses[-5:]) < sum(losses[:5])
    go(10, path)
    resumed, again = go(30, path, resume=True)
    assert resumed == losses
    assert all(torch.equal(a, b) for a, b in zip(parameters, again, strict=True))


@given(st.integers(1, 5000), st.integers(1, 600))
def test_a_thinned_curve_is_even_and_ends_with_the_last_step(count, most):
    steps = thinned(count, most)
    assert len(steps) <= most
    assert steps[-1] == count
    assert set(steps) <= set(range(1, count + 1))
    assert len({b - a for a, b in pairwise(steps)}) <= 1
    assert steps == list(range(1, count + 1)) or count > most


def test_the_picture_of_a_falling_loss_falls():
    picture = np.asarray(loss_picture([5.0, 4.0, 3.0, 2.0, 1.0]))
    rows, columns = np.nonzero((picture == ARRIVED_INK).all(-1))
    assert np.corrcoef(columns, rows)[0, 1] > 0.99  # rows count downwards
    assert np.ptp(columns) > 0.8 * picture.shape[1]
    assert (np.asarray(loss_picture([0.5])) == ARRIVED_INK).all(-1).any()


def test_the_command_line_does_not_wait_for_it():
    import subprocess
    import sys

    code = "import sys, lorax.cli; sys.exit('lorax.train' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
