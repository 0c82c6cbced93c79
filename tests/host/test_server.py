"""The pack in a real ComfyUI server, in CPU mode, over its HTTP API."""

import html
import json
import re
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from client import STAND_INS, to_prompt
from prompts import node, sampling, save, transfer
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
NODES = [
    "LoraXLoader",
    "LoraXBase",
    "LoraXSimilarity",
    "LoraXTransfer",
    "LoraXApply",
    "LoraXMove",
    "LoraXConvert",
    "LoraXSave",
    "LoraXTrain",
]


def test_every_node_is_there_and_says_what_its_sockets_are(info):
    for name in NODES:
        described = info[name]
        assert described["category"] == "LoRA-X"
        assert described["display_name"]
        assert described["description"]
        inputs = described["input"].get("required", {}) | described["input"].get("optional", {})
        assert all(len(spec) > 1 and spec[1].get("tooltip") for spec in inputs.values()), name
        assert all(described["output_tooltips"]), name


FOLDED = {
    "LoraXSimilarity": {"rank", "cache"},
    "LoraXTransfer": {"rank", "matching", "dora", "cache"},
    "LoraXTrain": {"grad_accumulation_steps", "training_dtype", "gradient_checkpointing"},
}


@pytest.mark.parametrize("name", NODES)
def test_rarely_used_widgets_are_folded(info, name):
    inputs = info[name]["input"].get("required", {}) | info[name]["input"].get("optional", {})
    assert {key for key, spec in inputs.items() if spec[1].get("advanced")} == FOLDED.get(name, set())


@pytest.mark.parametrize("name", NODES)
def test_a_host_that_takes_other_words_for_a_node_gets_them(info, name):
    if "search_aliases" not in info["LoraLoader"]:
        pytest.skip("this host takes none")
    assert info[name]["search_aliases"]


def test_the_pack_loads_at_once(host):
    (seconds,) = re.findall(r"([\d.]+) seconds: \S*comfyui-lora-x", host.log.read_text())
    assert float(seconds) < 0.5  # idle 0.1; printed with one decimal, and this machine may be busy


@pytest.mark.parametrize("name", NODES)
def test_help_pages_are_served(host, name):
    page = host.get(f"/extensions/comfyui-lora-x/docs/{name}.md").decode()
    assert len(page) > 300
    (picture,) = re.findall(r"!\[.+\]\((images/.+\.png)\)", page)
    assert len(host.get(f"/extensions/comfyui-lora-x/docs/{picture}")) < 100_000


def test_templates_are_listed_with_their_thumbnails(host):
    assert sorted(host.json("/workflow_templates")["comfyui-lora-x"]) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        address = f"/api/workflow_templates/comfyui-lora-x/{quote(path.stem)}"
        assert host.get(f"{address}.jpg") == path.with_suffix(".jpg").read_bytes()
        assert host.json(f"{address}.json") == json.loads(path.read_text(encoding="utf-8"))


QUICK = {"EmptyLatentImage": {"width": 64, "height": 64}, "KSampler": {"steps": 2}, "LoraXTrain": {"steps": 2}}


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_example_workflows_run(host, info, path):
    """As they are, but with small models, conditioning instead of a text encoder, and the latent saved."""
    prompt = to_prompt(json.loads(path.read_text(encoding="utf-8")), info)
    for number, entry in list(prompt.items()):
        for name, value in entry["inputs"].items():
            if isinstance(value, str):
                folder, slash, file = value.rpartition("/")
                entry["inputs"][name] = folder + slash + STAND_INS.get(file, file)
        if entry["class_type"] == "CLIPTextEncode":
            prompt[number] = node("LoraXTestConditioning", seed=int(number), width=2048 if "SDXL" in path.stem else 768)
        elif entry["class_type"] == "VAEDecode":
            prompt[number] = node("SaveLatent", samples=entry["inputs"]["samples"], filename_prefix="test/workflow")
        elif entry["class_type"] == "VAEEncode":
            prompt[number] = node("LoraXTestPictures", sizes="8", width=768)
        elif entry["class_type"] in ("SaveImage", "LoadImage"):
            del prompt[number]
        entry["inputs"] |= QUICK.get(entry["class_type"], {})
        for name in ("source_clip", "target_clip", "clip"):
            entry["inputs"].pop(name, None)
    for _ in range(2):
        result = host.run(prompt)
        assert result.ok, result.error
        texts = [text for output in result.outputs.values() for text in output.get("text", [])]
        # SSD-1B has no place for layers of the blocks that it lacks.
        assert "SSD-1B" in path.stem or not [text for text in texts if "warning: " in text]


@pytest.mark.parametrize("method", ["auto", "orthogonal", "project", "subspace-null", "align"])
def test_the_latent_changes_with_the_adapter_and_returns_at_strength_0(host, plain, method):
    result = host.run(transfer(method=method))
    assert result.ok, result.error
    assert not torch.allclose(result.latent(), plain["sd15-tuned"], atol=1e-3)
    assert torch.equal(host.run(transfer(method=method, strength=0.0)).latent(), plain["sd15-tuned"])


def test_sdxl_to_ssd_1b_pairs_what_is_left(host, plain):
    prompt = transfer(family="sdxl") | {"6": save(adapter=["4", 0])}
    result = host.run(prompt | {"7": node("PreviewAny", source=["4", 1])})
    assert result.ok, result.error
    assert not torch.allclose(result.latent(), plain["ssd-1b"], atol=1e-3)
    text = result.outputs["7"]["text"][0]
    assert "not in target" in text
    assert "no strength is suggested" in text


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    ("form", "loader"),
    # The host's own loader knows diffusers' attention layers by their older names only, so ours reads that file.
    [("LoRA, kohya names", "stock"), ("LoRA, kohya names", "ours"), ("LoRA, diffusers names", "ours")],
)
def test_the_saved_file_gives_the_same_latent(host, form, loader, family):
    prompt = transfer(family=family, method="project" if family == "sd15" else "auto", rank=200)
    ours = host.run(prompt | {"6": save(adapter=["4", 0], form=form)})
    assert ours.ok, ours.messages
    name = ours.outputs["6"]["text"][0]
    assert (host.base / "models/loras" / name).is_file()
    again = {"2": prompt["2"], **sampling("5", family == "sdxl")}
    if loader == "stock":
        again["5"] = node("LoraLoaderModelOnly", model=["2", 0], lora_name=name, strength_model=1.0)
    else:
        again["4"] = node("LoraXLoader", lora_name=name)
        again["5"] = prompt["5"]
    theirs = host.run(again)
    assert theirs.ok, theirs.messages
    torch.testing.assert_close(ours.latent(), theirs.latent(), rtol=1e-3, atol=1e-3)


def test_saving_twice_makes_two_files(host):
    paths = []
    for strength in (0.1, 0.2):
        moved = transfer(rank=round(100 * strength)) | {"6": save(adapter=["4", 0], filename_prefix="twice/name")}
        paths.append(host.run(moved).outputs["6"]["text"][0])
    assert paths == ["twice/name_00001_.safetensors", "twice/name_00002_.safetensors"]
    assert all((host.base / "models/loras" / path).is_file() for path in paths)


def test_the_report_and_the_file_name_the_files_of_both_models(host):
    """Through nodes that change a model; without folders; a merge of two is none of them."""
    checkpoints = host.base / "models/checkpoints"
    (checkpoints / "deep").mkdir()
    (checkpoints / "deep/copy.safetensors").symlink_to(checkpoints / "sd15-base.safetensors")
    prompt = transfer(source="deep/copy", rank=33)
    prompt["20"] = node("LoraLoaderModelOnly", model=["2", 0], lora_name="sd15-style.safetensors", strength_model=0.1)
    prompt["21"] = node("ModelMergeSimple", model1=["1", 0], model2=["2", 0], ratio=0.5)
    prompt["4"]["inputs"]["target"] = ["20", 0]
    prompt["22"] = node("LoraXSimilarity", source=["1", 0], target=["21", 0], rank=0, layers="attention")
    result = host.run(prompt | {"6": save(adapter=["4", 0])})
    assert result.ok, result.messages
    (report,), (view,) = result.outputs["4"]["lorax_report"], result.outputs["22"]["lorax_similarity"]
    assert (report["source"], report["target"]) == ("copy.safetensors", "sd15-tuned.safetensors")
    assert (view["source"], view["target"]) == ("copy.safetensors", "SD15")
    with safe_open(host.base / "models/loras" / result.outputs["6"]["text"][0], "pt") as file:
        assert file.metadata()["lorax_source"] == "copy.safetensors"
        assert "deep" not in str(file.metadata())


def test_text_encoder_layers_move_too(host):
    prompt = transfer(adapter="sd15-style-text", method="project", rank=100)
    prompt["20"] = node("CLIPLoader", clip_name="clip-l.safetensors", type="stable_diffusion")
    prompt["4"]["inputs"] |= {"source_clip": ["20", 0], "target_clip": ["20", 0]}
    prompt["5"]["inputs"]["clip"] = ["20", 0]
    prompt["10"] = node("CLIPTextEncode", clip=["5", 1], text="a house on a hill")
    ours = host.run(prompt | {"6": save(adapter=["4", 0]), "7": node("PreviewAny", source=["4", 1])})
    assert ours.ok, ours.messages
    assert "118 of 118 layers arrived" in ours.outputs["7"]["text"][0]
    name = ours.outputs["6"]["text"][0]
    stock = {key: prompt[key] for key in ("2", "10", "11", "12", "13", "14", "20")}
    both = {"model": ["2", 0], "clip": ["20", 0], "strength_model": 1.0, "strength_clip": 1.0}
    theirs = host.run(stock | {"5": node("LoraLoader", lora_name=name, **both)})
    torch.testing.assert_close(ours.latent(), theirs.latent(), rtol=1e-3, atol=1e-3)
    without = host.run(stock | {"5": node("LoraLoader", lora_name=name, **(both | {"strength_clip": 0.0}))})
    assert not torch.allclose(ours.latent(), without.latent(), atol=1e-3)


def test_other_nodes_chain_before_and_after_and_strengths_add_up(host):
    stock = {"lora_name": "sd15-style.safetensors"}
    prompt = transfer(strength=0.5, method="copy")
    prompt["6"] = node("LoraLoaderModelOnly", model=["5", 0], strength_model=0.25, **stock)
    prompt["13"] = sampling("6")["13"]
    ours = host.run(prompt)
    assert ours.ok, ours.messages
    twice = {
        "2": prompt["2"],
        "5": node("LoraLoaderModelOnly", model=["2", 0], strength_model=0.75, **stock),
        **sampling("5"),
    }
    # The method copy moves the very update, so 0.5 of it and 0.25 of the file are 0.75 of the file.
    torch.testing.assert_close(ours.latent(), host.run(twice).latent(), rtol=1e-3, atol=1e-3)


def test_a_lora_x_on_its_own_source_and_its_transfer(host, plain):
    loaded = {k: transfer()[k] for k in ("1", "2", "3")}
    convert = loaded | {"4": node("LoraXConvert", adapter=["3", 0], source=["1", 0], rank=64)}
    convert["6"] = save(adapter=["4", 0], form="LoRA-X", filename_prefix="test/x")
    applied = convert | {"5": node("LoraXApply", model=["1", 0], adapter=["4", 0], strength=1.0), **sampling("5")}
    result = host.run(applied)
    assert result.ok, result.error
    assert not torch.equal(result.latent(), plain["sd15-base"])
    name = result.outputs["6"]["text"][0]
    moved = {k: loaded[k] for k in ("1", "2")} | {
        "3": node("LoraXLoader", lora_name=name),
        "4": transfer()["4"],
        "5": transfer()["5"],
        **sampling("5"),
    }
    result = host.run(moved)
    assert result.ok, result.error
    assert not torch.equal(result.latent(), plain["sd15-tuned"])
    wrong = moved | {"5": node("LoraXApply", model=["2", 0], adapter=["3", 0], strength=1.0)}
    assert "own source base" in host.run(wrong).error


def test_saving_the_model_bakes_the_adapter(host):
    prompt = transfer(method="project", rank=100)
    ours = host.run(prompt | {"7": node("ModelSave", model=["5", 0], filename_prefix="diffusion_models/baked")})
    assert ours.ok, ours.messages
    baked = {"5": node("UNETLoader", unet_name="baked_00001_.safetensors", weight_dtype="default"), **sampling("5")}
    result = host.run(baked)
    assert result.ok, result.error
    torch.testing.assert_close(result.latent(), ours.latent(), rtol=1e-2, atol=1e-2)


def test_models_in_float8(host):
    prompt = transfer(method="project", rank=100)
    for number, name in (("1", "sd15-base"), ("2", "sd15-tuned")):
        prompt[number] = node("UNETLoader", unet_name=f"{name}.safetensors", weight_dtype="fp8_e4m3fn")
    result = host.run(prompt | {"7": node("PreviewAny", source=["4", 1])})
    assert result.ok, result.error
    assert "70 of 70 layers arrived" in result.outputs["7"]["text"][0]


def test_layers_that_are_not_converted_or_not_applied_are_said(host):
    """A LoRA-X with text-encoder layers, applied without the text encoder."""
    prompt = {key: transfer(adapter="sd15-style-text")[key] for key in ("1", "3")}
    prompt["20"] = node("CLIPLoader", clip_name="clip-l.safetensors", type="stable_diffusion")
    bare = node("LoraXConvert", adapter=["3", 0], source=["1", 0], rank=16)
    result = host.run(prompt | {"4": bare, "7": node("PreviewAny", source=["4", 1])})
    assert "70 of 118 layers converted" in result.outputs["7"]["text"][0]
    assert "text_encoder" in result.outputs["7"]["text"][0]
    whole = node("LoraXConvert", adapter=["3", 0], source=["1", 0], rank=16, source_clip=["20", 0])
    applied = prompt | {"4": whole, "5": node("LoraXApply", model=["1", 0], adapter=["4", 0], strength=1.0)}
    result = host.run(applied | sampling("5"))
    assert result.ok, result.error


def test_a_new_strength_computes_nothing_again(host):
    host.run(transfer(method="project", strength=0.3))
    result = host.run(transfer(method="project", strength=0.4))
    cached = dict(result.status["messages"])["execution_cached"]["nodes"]
    assert {"1", "2", "3", "4"} <= set(cached)
    assert "5" not in cached


def test_cancel_ends_within_a_second(host):
    prompt = {
        "1": node("CheckpointLoaderSimple", ckpt_name="sdxl-base.safetensors"),
        "2": node("CheckpointLoaderSimple", ckpt_name="ssd-1b.safetensors"),
        "7": node("LoraXSimilarity", source=["1", 0], target=["2", 0], rank=300, layers="all"),
        "8": node("PreviewImage", images=["7", 1]),
    }
    loading = host.run(
        prompt | {"7": node("LoraXSimilarity", source=["1", 0], target=["2", 0], rank=0, layers="attention")}
    )
    assert loading.ok, loading.messages
    ticket = host.queue(prompt)
    time.sleep(1.5)
    assert host.json("/queue")["queue_running"]
    start = time.monotonic()
    host.post("/interrupt", {})
    result = host.wait(ticket)
    assert time.monotonic() - start < 1
    assert "execution_interrupted" in result.messages


BAD = {
    "adapter of another family": (transfer(adapter="sdxl-style"), "different families"),
    "source of another family": (transfer(source="sdxl-base"), "different families"),
    "pickle in the list": (transfer(adapter="broken"), "pickle"),
    "file that is gone": (transfer(adapter="gone"), "gone.safetensors"),
    "apply without transfer": (
        transfer(adapter="sdxl-style") | {"5": node("LoraXApply", model=["2", 0], adapter=["3", 0], strength=1.0)},
        "different families",
    ),
    "save outside": (transfer() | {"6": save(adapter=["4", 0], filename_prefix="../../escape")}, "outside"),
    "save where a file stands": (
        transfer() | {"6": save(adapter=["4", 0], filename_prefix="sd15-style.safetensors/name")},
        "cannot make a folder",
    ),
    "save as LoRA-X what is none": (transfer() | {"6": save(adapter=["4", 0], form="LoRA-X")}, "Convert to LoRA-X"),
    "rank of nothing": (transfer(rank=0), "rank"),
}


@pytest.mark.parametrize(("prompt", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_an_error_of_the_node(host, prompt, words):
    answer = host.post("/prompt", {"prompt": prompt})
    if "prompt_id" not in answer or answer.get("node_errors"):
        assert words in json.dumps(answer)  # refused before it runs
        return
    result = host.wait(answer["prompt_id"])
    assert not result.ok
    assert words in result.error
    assert not list(host.base.rglob("escape*"))


PREFIXES = {
    "NUL": ("lorax/a\0b", "refuses"),
    "a lone surrogate": ("lorax/\ud800", "refuses"),
    "a new line": ("a\nb", "refuses"),
    "2,000 levels": ("a/" * 2000 + "x", "too long"),
    "a long name": ("\xe9" * 101, "too long"),
    "upwards": ("../x", "outside"),
    "upwards in the middle": ("a/../../x", "outside"),
    "upwards, as Windows writes it": ("a\\..\\..\\x", "outside"),
    "nothing": ("", "no file"),
    "a folder": ("lorax/", "no file"),
    "this folder": (".", "no file"),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_a_name_that_cannot_be_saved_is_refused_before_the_graph_runs(host, name):
    prefix, words = PREFIXES[name]
    before = sorted(host.base.rglob("*.safetensors"))
    prompt = {"3": transfer()["3"], "6": save(adapter=["3", 0], filename_prefix=prefix)}
    answer = host.post("/prompt", {"prompt": prompt})
    assert "prompt_id" not in answer
    assert words in json.dumps(answer["node_errors"]["6"])
    assert sorted(host.base.rglob("*.safetensors")) == before


def test_names_of_many_kinds_are_saved(host):
    for prefix in (
        "lorax/\U0001f469\u200d\U0001f680 \xe9t\xe9",
        "a/b/../c",
        "\xe9" * 100,
        ".hidden",
        "con.x",
        "x" * 200,
    ):
        saved = host.run({"3": transfer()["3"], "6": save(adapter=["3", 0], filename_prefix=prefix)})
        assert saved.ok, saved.error
        assert (host.base / "models/loras" / saved.outputs["6"]["text"][0]).is_file()


def test_a_name_that_a_link_gives_is_checked_when_it_comes(host):
    text = node("PrimitiveString", value="../../escape")
    result = host.run({"3": transfer()["3"], "5": text, "6": save(adapter=["3", 0], filename_prefix=["5", 0])})
    assert not result.ok
    assert "outside" in result.error


def test_no_markup_reaches_the_page(host, real_host):
    """What a node shows of a file's names: the front end takes the text of a running node for HTML or Markdown."""
    evil = "<img src=x onerror=alert(1)>[[click|https://example.org]]![x](http://example.org/x.png) `_*\x1b[31m"
    lora = {f"lora_unet_x.lora_{side}.weight": torch.ones(2, 2) for side in ("up", "down")}
    save_file({evil: torch.ones(1)} | lora, host.base / "models/loras/evil.safetensors")
    prompt = {"1": node("LoraXLoader", lora_name="evil.safetensors"), "2": node("PreviewAny", source=["1", 1])}
    script = Path(__file__).with_name("progress_texts.py")
    shown = subprocess.check_output([real_host[1], script, host.url], input=json.dumps(prompt), text=True)
    (text,) = json.loads(shown)
    assert evil.replace("\x1b", "\\x1b") in html.unescape(text)
    assert re.fullmatch(r"(?:[^\W_]|  \n| |&#\d+;)+", text)
