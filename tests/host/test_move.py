"""A base from its file, and Move LoRA, in a real ComfyUI server."""

import os
import re

import pytest
import torch
from prompts import node, sampling, save, transfer
from safetensors.torch import load_file, save_file

STYLE = "sd15-style.safetensors"


def base(name="sd15-base"):
    return node("LoraXBase", base_name=f"{name}.safetensors")


def move(model, lora=STYLE, source="sd15-base", strength=1.0, **more):
    name = f"{source}.safetensors"
    return node("LoraXMove", model=model, lora_name=lora, base_name=name, strength=strength, **more)


def compared():
    return node("LoraXSimilarity", source=["1", 0], target=["2", 0], rank=0, layers="attention")


def moved(last, **nodes):
    """A prompt that loads the target and samples with the last of some nodes."""
    return {"2": node("CheckpointLoaderSimple", ckpt_name="sd15-tuned.safetensors"), **nodes, **sampling(last)}


def saved(host, result):
    return load_file(host.base / "models/loras" / result.outputs["6"]["text"][0])


def offered_by(host, kind):
    spec = host.json(f"/object_info/{kind}")[kind]["input"]["required"]["base_name"]
    return spec[1]["options"] if spec[0] == "COMBO" else spec[0]


def test_bases_are_offered_once_and_no_pickles(host):
    folder = host.base / "models/checkpoints"
    names = ("old.ckpt", "old.pt", "big-00001-of-00002.safetensors", "big-00002-of-00002.safetensors", "small.gguf")
    for name in names:
        (folder / name).touch()
    try:
        offered = [offered_by(host, kind) for kind in ("LoraXBase", "LoraXMove")]
    finally:
        for name in names:
            (folder / name).unlink()
    there = [name for name in offered[0] if "/" not in name]
    assert {"big-00001-of-00002.safetensors", "small.gguf", "sd15-base.safetensors"} <= set(there)
    assert not set(there) & {"old.ckpt", "old.pt", "big-00002-of-00002.safetensors"}
    # The tests' folder of diffusion models is a link to that of the checkpoints: each name is there twice.
    both = there + [f"diffusion_models/{name}" for name in there]
    assert offered == [both, both]


@pytest.mark.parametrize("method", ["auto", "project"])
def test_a_base_from_a_file_gives_what_the_loaded_model_gives(host, method):
    prompt = {key: transfer(method=method)[key] for key in "1234"} | {"6": save(adapter=["4", 0])}
    loaded, read = host.run(prompt), host.run(prompt | {"1": base(), "2": base("sd15-tuned")})
    assert loaded.ok, loaded.messages
    assert read.ok, read.messages
    ours, theirs = saved(host, read), saved(host, loaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_every_node_that_reads_a_base_takes_a_file(host):
    adapter = {"3": node("LoraXLoader", lora_name=STYLE), "1": base(), "2": base("sd15-tuned")}
    converted = node("LoraXConvert", adapter=["3", 0], source=["1", 0], rank=16)
    written = save(adapter=["5", 0], model=["1", 0])
    shown = {"7": node("PreviewAny", source=["4", 2])}
    result = host.run(adapter | {"4": compared(), "5": converted, "6": written} | shown)
    assert result.ok, result.messages
    assert re.search(r"attn1.to_q: 0\.\d{3}", result.outputs["7"]["text"][0])


def test_a_name_that_two_folders_have_is_told_by_its_folder(host):
    prompt = {"1": node("LoraXBase", base_name="diffusion_models/sd15-base.safetensors")}
    result = host.run(prompt | {"2": base("sd15-tuned"), "4": compared(), "7": node("PreviewAny", source=["4", 2])})
    assert result.ok, result.messages


def test_a_clip_beside_a_base_from_a_file_is_an_error_that_says_what_to_do(host):
    prompt = {key: transfer()[key] for key in "234"} | {"1": base(), "6": save(adapter=["4", 0])}
    prompt["20"] = node("CLIPLoader", clip_name="clip-l.safetensors", type="stable_diffusion")
    prompt["4"]["inputs"]["source_clip"] = ["20", 0]
    result = host.run(prompt)
    assert not result.ok
    assert "sd15-base.safetensors" in result.error
    assert "disconnect the CLIP" in result.error


def test_a_base_whose_file_changed_is_read_again(host):
    checkpoints = host.base / "models/checkpoints"
    copy = checkpoints / "changing.safetensors"
    tensors = load_file(checkpoints / "sd15-base.safetensors")
    try:
        found = []
        for sign in (1, -1):
            save_file({key: value * sign for key, value in tensors.items()}, copy)
            os.utime(copy, ns=(sign * 10**18, 10**18 + sign * 10**15))
            prompt = {key: transfer(method="project")[key] for key in "234"} | {"1": base("changing")}
            shown = node("LoraXConvert", adapter=["3", 0], source=["1", 0], rank=4)
            result = host.run(prompt | {"5": shown, "6": save(adapter=["5", 0], form="LoRA-X")})
            assert result.ok, result.messages
            cached = result.messages["execution_cached"]["nodes"]
            found.append("1" in cached)
    finally:
        copy.unlink()
    assert found == [False, False]


def test_move_is_load_transfer_and_apply_in_one(host, plain):
    ours, theirs = host.run(moved("5", **{"5": move(["2", 0], strength=0.7)})), host.run(transfer(strength=0.7))
    assert ours.ok, ours.messages
    assert torch.equal(ours.latent(), theirs.latent())
    off = host.run(moved("5", **{"5": move(["2", 0], strength=0.0)}))
    assert torch.equal(off.latent(), plain["sd15-tuned"])
    (report,) = ours.outputs["5"]["lorax_report"]
    assert report["layers"] == report["arrived"] == 70


def test_several_in_a_row_do_not_see_each_other(host):
    """Each is moved to the model as it was, whatever another one did to it before."""
    chain = {"5": move(["2", 0], strength=0.7), "6": move(["5", 0], strength=-0.4)}
    ours = host.run(moved("6", **chain))
    at_once = host.run(moved("5", **{"5": move(["2", 0], strength=0.3)}))
    assert ours.ok, ours.messages
    torch.testing.assert_close(ours.latent(), at_once.latent(), rtol=1e-3, atol=1e-3)
    reports = [ours.outputs[number]["lorax_report"][0] for number in "56"]
    assert reports[0]["rows"] == reports[1]["rows"]


def test_what_other_nodes_added_is_of_the_model(host):
    """A stock LoRA before Move changes the model that it is moved to, as it does for Transfer."""
    stock = node("LoraLoaderModelOnly", model=["2", 0], lora_name=STYLE, strength_model=2.0)
    ours = host.run(moved("5", **{"8": stock, "5": move(["8", 0])}))
    theirs = transfer() | {"8": stock, **sampling("5")}
    theirs["4"]["inputs"]["target"] = theirs["5"]["inputs"]["model"] = ["8", 0]
    theirs = host.run(theirs)
    assert theirs.ok, theirs.messages
    assert ours.ok, ours.messages
    assert torch.equal(ours.latent(), theirs.latent())


def test_a_new_strength_moves_nothing_again(real_host, host, tmp_path):
    """The second of two, too, though the model that it gets is another one."""
    found = []
    for first, second in ((0.5, 0.5), (0.6, 0.5), (0.6, 0.7)):
        chain = {
            "5": move(["2", 0], strength=first),
            "6": move(["5", 0], lora="sd15-style-text.safetensors", strength=second),
        }
        result, events = host.events("progress", moved("6", **chain), real_host[1], tmp_path / "events.json")
        assert result.ok, result.messages
        found.append({event["node"] for event in events} & {"5", "6"})
    assert found == [{"5", "6"}, set(), set()]


def test_a_lora_whose_file_changed_is_moved_again(host, plain):
    folder = host.base / "models/loras"
    copy = folder / "changing.safetensors"
    tensors, latents = load_file(folder / STYLE), []
    try:
        for sign in (1, -1):
            changed = {key: value * sign if "lora_up" in key else value for key, value in tensors.items()}
            save_file(changed, copy)
            os.utime(copy, ns=(10**18, 10**18 + sign * 10**15))
            result = host.run(moved("5", **{"5": move(["2", 0], lora="changing.safetensors", strength=sign)}))
            assert result.ok, result.messages
            latents.append(result.latent())
    finally:
        copy.unlink()
    # With both signs turned nothing is left but rounding, which a model of random weights makes larger.
    first, second = latents
    assert (first - second).norm() < 0.05 * (first - plain["sd15-tuned"]).norm()


def test_text_encoder_layers_say_why_they_do_not_move(host):
    """A file of a model that denoises alone has no text encoder to take them from."""
    chain = {
        "20": node("CLIPLoader", clip_name="clip-l.safetensors", type="stable_diffusion"),
        "5": move(["2", 0], lora="sd15-style-text.safetensors", clip=["20", 0]),
    }
    result = host.run(moved("5", **chain))
    assert result.ok, result.messages
    (report,) = result.outputs["5"]["lorax_report"]
    text = [row for row in report["rows"] if row["source"].startswith("text_encoder")]
    assert {(row["outcome"], row["notes"][0]["code"]) for row in text} == {("kept unchanged", "not_in_both")}
    assert len(text) == 48
    without = host.run(moved("5", **{"5": move(["2", 0])}))
    assert report["summary"].startswith("118 of 118")
    assert without.outputs["5"]["lorax_report"][0]["summary"].startswith("70 of 70")
