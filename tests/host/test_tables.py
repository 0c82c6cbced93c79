"""Our names against the host's: every LoRA key that it knows means the same rows of the same weight to us."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LIBRARY, ROOT
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT))

from lorax import Adapter, LoraLayer, save_adapter
from lorax.models.families import families, recognise
from lorax.models.layers import LayerTable, is_swapped

HOME = "diffusion_model."
PREFIX = re.compile(
    r"lora_unet_|lora_prior_unet_|lora_transformer_|lycoris_|diffusion_model\.|transformer\.|base_model\.model\.|unet\.|"
)
FLUX_2 = r"transformer_blocks.\d.ff(_context)?.linear_(in|out)|single_transformer_blocks.\d.attn.to_(out|qkv_mlp_proj)"
# Names that the host knows but that are those of another model: of SD 2.1 unCLIP, FLUX.1, FLUX.2 and Z-Image.
FOREIGN = {
    "flux": FLUX_2,
    "chroma": FLUX_2,
    "sdxl": r"class_embedding.*",
    # linear1_qkv: diffusers has the whole of linear1 as one layer.
    "flux2": r"single_blocks.\d.linear1_qkv|time_text_embed.*|transformer_blocks.\d.ff(_context)?.net.*"
    r"|single_transformer_blocks.\d.(attn.to_[qkv]|proj_mlp|proj_out)",
    "lumina2": r"(layers|\w+_refiner).\d.attention.to_.*|all_.*",
}


def host_keys(path, python):
    script = Path(__file__).with_name("lora_keys.py")
    done = subprocess.run([python, script], cwd=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="session", params=["library", "real"])
def host(request):
    if request.param == "real":
        return host_keys(*request.getfixturevalue("real_host"))
    if not LIBRARY.is_dir():
        pytest.skip("ComfyUI's library is not installed (make install)")
    return host_keys(LIBRARY, sys.executable)


NAMES = ["sd1", "sd2", "sdxl", "sdxl SSD-1B", "sdxl KOALA-700M", "sd3", "flux", "flux2", "chroma", "anima", "ltx"]
NAMES += ["ltx LTX-2", "lumina2", "z_image", "qwen_image", "krea2", "wan", "wan of images", "wan VACE", "hunyuan_video"]
NAMES += ["hunyuan_video_15"]


@pytest.fixture(params=NAMES)
def model(request, host):
    if host[request.param] is None:
        pytest.skip("a model that this host does not know")
    return request.param, host[request.param]


def shapes_of(found):
    return {
        key.removeprefix(HOME).removesuffix(".weight"): tuple(shape)
        for key, shape in found["shapes"].items()
        if key.startswith(HOME)
    }


def test_the_host_s_models_are_recognised_and_by_one_family_only(model):
    name, found = model
    shapes = shapes_of(found)
    assert [family.name for family in families().values() if family.fits(shapes)] == [name.split()[0]]
    label = recognise(shapes).variant(recognise(shapes).layers(shapes))
    assert name.partition(" ")[2] in (label, "of images", "VACE") or " " not in name


def test_every_lora_key_of_the_host_means_the_same_rows(model):
    _, found = model
    shapes = shapes_of(found)
    family = recognise(shapes)
    layers = family.layers(shapes)
    table = LayerTable(layers, family.spellings(layers))
    agreed, unknown = 0, set()
    for key, target in found["keys"].items():
        target, part, changed = [*([target] if isinstance(target, str) else target), None, None][:3]
        module = target.removeprefix(HOME).removesuffix(".weight")
        # Norms have no layers; the map of a family names weights that this member lacks.
        if not target.endswith(".weight") or len(shapes.get(module, ())) < 2:
            continue
        path = PREFIX.sub("", key, count=1).replace(".processor", "")
        rows = (part[1], part[1] + part[2]) if part else (0, shapes[module][0])
        meant = table.find(family.component, path)
        if not meant:
            unknown.add(path)
            continue
        # The host changes the halves where diffusers has shift and scale in the other order.
        assert (changed is not None) == is_swapped(meant[0], path), key
        assert {layer.original for layer in meant} == {module}, key
        ends = [layer.rows or (0, shapes[module][0]) for layer in meant]
        assert (ends[0][0], ends[-1][1]) == rows, key
        assert sum(layer.shape[0] for layer in meant) == rows[1] - rows[0], key
        agreed += 1
    assert unknown <= {path for path in unknown if re.fullmatch(FOREIGN.get(family.name, "-"), path)}
    assert agreed > len(layers)


@pytest.mark.parametrize("naming", ["kohya", "original"])
@pytest.mark.parametrize("chosen", ["all", "queries and keys", "queries"])
def test_every_key_that_is_written_is_one_of_the_host_s(model, naming, chosen, tmp_path):
    """Of each fused weight all parts, or some: the rest of it is zero."""
    _, found = model
    shapes = shapes_of(found)
    family = recognise(shapes)
    ends = {"all": ("",), "queries and keys": ("to_q", "to_k"), "queries": ("to_q", "add_q_proj")}[chosen]
    layers = {}
    for layer in family.layers(shapes):
        if layer.rows is None or layer.path.endswith(ends):
            up, down = torch.ones(layer.shape[0], 1), torch.ones(1, *layer.shape[1:])
            layers[layer.name] = LoraLayer(layer, up, down)
    save_adapter(Adapter("a", family, "kohya", layers), tmp_path / "a.safetensors", naming=naming)
    written = {re.sub(r"\.(lora_\w+\.weight|alpha)$", "", key) for key in load_file(tmp_path / "a.safetensors")}
    assert not written - found["keys"].keys()


@pytest.mark.parametrize(
    "family", [family for family in families().values() if family.text_encoders], ids=lambda family: family.name
)
def test_text_encoders_have_the_host_s_prefixes_in_lora_files(host, family):
    kinds = " ".join(encoder.kind for encoder in family.text_encoders)
    for encoder in family.text_encoders:
        layer = (
            "encoder.block.0.layer.0.SelfAttention.q"
            if encoder.kind == "t5xxl"
            else "text_model.encoder.layers.0.mlp.fc1"
        )
        key = f"{encoder.kohya}_{layer.replace('.', '_')}"
        assert host["text"][kinds][key] == f"{encoder.kind}.transformer.{layer}.weight"
        assert layer in encoder.shapes()
