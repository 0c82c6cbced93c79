"""The node Train LoRA-X in a real ComfyUI server, in CPU mode."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from prompts import node, sampling, save
from safetensors.torch import load_file


def training(sizes="8", family="sd15", **options):
    """A prompt that trains on seeded latents, applies what was learnt, samples two steps, and saves both."""
    xl = family == "sdxl"
    settings = {"batch_size": 1, "grad_accumulation_steps": 1, "steps": 4, "learning_rate": 0.05, "rank": 32, "seed": 0}
    settings |= {"training_dtype": "fp32", "gradient_checkpointing": False} | options
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="ssd-1b.safetensors" if xl else "sd15-base.safetensors"),
        "2": node("LoraXTestPictures", sizes=sizes, width=2048 if xl else 768),
        "4": node("LoraXTrain", model=["1", 0], latents=["2", 0], positive=["2", 1], **settings),
        "5": node("LoraXApply", model=["1", 0], adapter=["4", 0], strength=1.0),
        "6": save(adapter=["4", 0], form="LoRA-X", filename_prefix="test/trained"),
        **sampling("5", xl),
    }


def alone(prompt):
    return {key: prompt[key] for key in ("1", "2", "4", "6")}


def learnt(host, result):
    return load_file(host.base / "models/loras" / result.outputs["6"]["text"][0])


def losses(result):
    return result.outputs["4"]["lorax_loss"][0]["losses"]


@pytest.fixture(scope="module")
def plain(host):
    """The latent of the model without an adapter, from before anything was trained."""
    return host.run({"1": training()["1"], **sampling("1")}).latent()


def test_the_loss_falls_and_apply_changes_the_model_as_the_expanded_adapter(host, plain):
    prompt = training(steps=60, learning_rate=0.02, rank=320)
    result = host.run(prompt | {"7": node("PreviewImage", images=["4", 1])})
    assert result.ok, result.error
    curve = losses(result)
    assert sum(curve[-15:]) < 0.8 * sum(curve[:15])
    assert result.outputs["7"]["images"]
    assert not torch.allclose(result.latent(), plain, atol=1e-3)
    written = prompt | {"8": save(adapter=["4", 0], model=["1", 0])}
    name = host.run(written).outputs["8"]["text"][0]
    stock = {"1": prompt["1"], "5": node("LoraLoaderModelOnly", model=["1", 0], lora_name=name, strength_model=1.0)}
    theirs = host.run(stock | sampling("5"))
    assert theirs.ok, theirs.error
    torch.testing.assert_close(result.latent(), theirs.latent(), rtol=1e-3, atol=1e-3)


def test_the_model_is_bit_equal_before_and_after(host, plain):
    loader = {"1": training()["1"]}
    files = []
    for when in ("before", "after"):
        prefix = f"diffusion_models/{when}-training"
        assert host.run(loader | {"9": node("ModelSave", model=["1", 0], filename_prefix=prefix)}).ok
        files.append(load_file(host.base / "output" / f"{prefix}_00001_.safetensors"))
        result = host.run(alone(training(seed=7, training_dtype="bf16", gradient_checkpointing=True)))
        assert result.ok, result.error
    before, after = files
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(host.run(loader | sampling("1")).latent(), plain)


def test_checkpointing_changes_nothing_and_a_seed_tells_all(host):
    curves = {}
    for name, options in {
        "plain": {"seed": 3},
        "again": {"seed": 3, "gradient_checkpointing": True},
        "other": {"seed": 4},
        "half": {"seed": 3, "training_dtype": "bf16"},
    }.items():
        result = host.run(alone(training(**options)))
        assert result.ok, result.error
        curves[name] = torch.tensor(losses(result))
    torch.testing.assert_close(curves["again"], curves["plain"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(curves["half"], curves["plain"], rtol=0.05, atol=0.05)
    assert not torch.allclose(curves["other"], curves["plain"], rtol=0.01)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_pictures_of_several_sizes_with_captions_of_their_own(host, family):
    prompt = training("8 8 12 8", family, batch_size=3, grad_accumulation_steps=2, steps=2)
    result = host.run(alone(prompt))
    assert result.ok, result.error
    deltas = learnt(host, result)
    assert all(key.endswith(".delta") and delta.shape == (32,) for key, delta in deltas.items())
    assert sum(bool(delta.any()) for delta in deltas.values()) == len(deltas)
    one = prompt | {"3": node("LoraXTestConditioning", seed=1, width=2048 if family == "sdxl" else 768)}
    one["4"]["inputs"]["positive"] = ["3", 0]
    assert host.run(alone(one) | {"3": one["3"]}).ok


def test_training_goes_on_from_an_adapter(host):
    first = training(steps=3)
    start = learnt(host, host.run(alone(first)))
    second = node("LoraXTrain", **(first["4"]["inputs"] | {"steps": 1, "learning_rate": 1e-7, "rank": 8}))
    second["inputs"]["existing_adapter"] = ["4", 0]
    result = host.run(
        alone(first) | {"7": second, "6": first["6"] | {"inputs": first["6"]["inputs"] | {"adapter": ["7", 0]}}}
    )
    assert result.ok, result.error
    then = learnt(host, result)
    assert then.keys() == start.keys()
    for key in then:
        torch.testing.assert_close(then[key], start[key], rtol=0, atol=2e-7)


def test_the_loss_comes_as_events(real_host, host, tmp_path):
    prompt = alone(training(steps=30, seed=11))
    result, events = host.events("lorax.loss", prompt, real_host[1], tmp_path / "events.json")
    assert result.ok, result.error
    assert events
    curve = losses(result)
    for event in events:
        assert event["node"] == "4"
        assert event["total"] == 30
        assert event["losses"] == [curve[step - 1] for step in event["steps"]]
    assert [len(event["steps"]) for event in events] == sorted(len(event["steps"]) for event in events)


def test_cancel_ends_it_and_leaves_the_model_as_it_was(host, plain):
    ticket = host.queue(alone(training(steps=10000, seed=5)))
    time.sleep(4)
    assert host.json("/queue")["queue_running"]
    host.post("/interrupt", {})
    result = host.wait(ticket, 5)
    assert "execution_interrupted" in result.messages
    assert torch.equal(host.run({"1": training()["1"], **sampling("1")}).latent(), plain)


BAD = {
    "captions": (
        training("8 8 8") | {"3": node("LoraXTestPictures", sizes="8 8", width=768)},
        "2 captions, 3 pictures",
    ),
    "another model's adapter": (training(), "own source base"),
}


@pytest.mark.parametrize("case", ["captions", "another model's adapter"])
def test_bad_input_is_an_error_of_the_node(host, case):
    prompt, words = BAD[case]
    prompt = json.loads(json.dumps(alone(prompt) | ({"3": prompt["3"]} if "3" in prompt else {})))
    if case == "captions":
        prompt["4"]["inputs"]["positive"] = ["3", 1]
    else:
        prompt["8"] = node("CheckpointLoaderSimple", ckpt_name="sd15-tuned.safetensors")
        prompt["9"] = node("LoraXTrain", **(prompt["4"]["inputs"] | {"model": ["8", 0], "existing_adapter": ["4", 0]}))
    result = host.run(prompt)
    assert not result.ok
    assert words in result.error


def test_the_loss_is_that_of_what_the_model_predicts(real_host):
    """Noise, velocity and flow, each against its formula, with captions of several lengths in one batch."""
    path, python = real_host
    script = Path(__file__).with_name("loss_of_models.py")
    environment = {**os.environ, "PYTHONPATH": str(script.parent)}
    done = subprocess.run([python, script, ROOT], cwd=path, env=environment, check=True, stdout=subprocess.PIPE)
    for ours, theirs, gradient, slope in json.loads(done.stdout.splitlines()[-1]).values():
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert gradient == pytest.approx(slope, rel=0.01)
