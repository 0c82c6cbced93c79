"""The training loop: what goes on from a checkpoint is bit for bit what was not interrupted."""

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
from hypothesis import given
from hypothesis import strategies as st

import lorax
from lorax import MismatchError, NumericsError, OptionError
from lorax.show.pictures import ARRIVED_INK, loss_picture
from lorax.train import attach, thinned, train
from tests.trainable import data, loss_of, made


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
    _ = torch.rand(3), np.random.rand(3), random.random()  # other random numbers meanwhile
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
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(1)
    expected = (torch.rand(3), np.random.rand(3).tolist(), random.random())
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(1)
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
