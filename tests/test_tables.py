"""The tables of the families against diffusers: its models, built on no device, and its converters of checkpoints."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lorax
from lorax import load_adapter
from lorax.files import toml
from lorax.models.families import families, recognise
from tests.models import BLOCKS, HEADS, MODELS, SWAPPED, Checkpoint, original_shapes, shapes_of

TABLES = sorted((Path(lorax.__file__).parent / "models/tables").glob("*.toml"))


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_diffusers_is_in_the_table(name):
    family = families()[name.split()[0]]
    shapes = shapes_of(name)
    assert [other for other in families().values() if other.fits(shapes)] == [family]
    named = {path for paths in family.modules.values() for path in paths}
    layers = family.layers(shapes)
    star = re.compile(r"(?<=\.)\d+(?=\.)")
    assert not {layer.path for layer in layers if not {layer.path, star.sub("*", layer.path, count=1)} & named}
    assert {layer.path for layer in layers if layer.swapped} == SWAPPED.get(family.name, set())
    assert {layer.path: layer.shape for layer in layers}.items() <= shapes.items()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_the_original_naming_has_the_same_layers(name):
    family = families()[name.split()[0]]
    shapes = shapes_of(name)
    originals = original_shapes(family, shapes)
    assert recognise(originals) is family
    layers = {layer.name: layer for layer in family.layers(shapes)}
    assert {layer.name: layer for layer in family.layers(originals)} == layers
    assert len(layers) == sum(len(shape) > 1 for shape in shapes.values())


@pytest.mark.parametrize("name", [name for name, (_, _, converter) in MODELS.items() if converter])
def test_the_rows_are_those_that_diffusers_own_converter_takes(name):
    """Weights of one column whose entries number their rows."""
    family = families()[name.split()[0]]
    shapes = shapes_of(name)
    originals = original_shapes(family, shapes, aliases=name == "hunyuan_video")
    rows = {path: torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) for path, shape in originals.items()}
    prefix = "net." if name == "anima" else ""
    file = {f"{prefix}{path}.weight": value + 10**6 * i for i, (path, value) in enumerate(rows.items())}
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    converted = getattr(single_file, MODELS[name][2])(Checkpoint(file))
    checked = set()
    for layer in family.layers(originals):
        expected = file[f"{prefix}{layer.original}.weight"]
        expected = expected if layer.rows is None else expected[slice(*layer.rows)]
        expected = torch.cat(expected.chunk(2)[::-1]) if layer.swapped else expected
        assert torch.equal(converted[f"{layer.path}.weight"], expected), layer
        checked.add(layer.path)
    assert checked == {path for path, shape in shapes.items() if len(shape) > 1}


def unet_blocks(down, up, middle, resnets_down=2):
    """The numbered blocks of a U-Net, as layers: the depth of each attention on the way down and up."""
    found = []
    for part, levels, extra in (("down_blocks", down, 0), ("up_blocks", up, 1)):
        for i, depth in enumerate(levels):
            found += [f"{part}.{i}.resnets.{j}.conv1" for j in range(resnets_down + extra)]
            depths = depth if isinstance(depth, list) else [depth] * (resnets_down + extra)
            for j, n in enumerate(depths):
                found += [f"{part}.{i}.attentions.{j}.transformer_blocks.{k}.attn1.to_q" for k in range(n)]
    found += [f"mid_block.resnets.{j}.conv1" for j in range(2) if middle is not None]
    found += [f"mid_block.attentions.0.transformer_blocks.{k}.attn1.to_q" for k in range(middle or 0)]
    return found


@pytest.mark.parametrize(
    ("family", "blocks", "label"),
    [
        ("sdxl", unet_blocks([0, 2, 10], [10, 2, 0], 10), "Stable Diffusion XL"),
        ("sdxl", unet_blocks([0, 2, 4], [[4, 4, 10], [2, 1, 1], 0], 0), "SSD-1B"),
        ("sdxl", unet_blocks([0, 1, 2], [2, 1, 0], 0), "Segmind Vega"),
        ("sdxl", unet_blocks([0, 2, 6], [6, 2, 0], 6, 1), "KOALA-1B"),
        ("sdxl", unet_blocks([0, 2, 5], [5, 2, 0], None, 1), "KOALA-700M"),
        ("sd1", unet_blocks([1, 1, 1, 0], [0, 1, 1, 1], 1), "Stable Diffusion 1.x"),
        ("sd1", unet_blocks([1, 1, 1, 0], [0, 1, 1, 1], 1, 1), "BK-SDM-Base"),
        ("sd1", unet_blocks([1, 1, 1, 0], [0, 1, 1, 1], None, 1), "BK-SDM-Small"),
        ("sd1", unet_blocks([1, 1, 1], [1, 1, 1], None, 1), "BK-SDM-Tiny"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_pruned_unet_has_its_label(family, blocks, label):
    assert families()[family].variant(lorax.models.layers.Layer(f"unet.{path}", (8, 8)) for path in blocks) == label


@pytest.mark.parametrize(
    ("name", "blocks", "label"),
    [
        ("sd3", {"joint_blocks": 38}, "Stable Diffusion 3.5 Large"),
        ("sd3", {"joint_blocks": 24}, "Stable Diffusion 3 Medium"),
        ("flux", {"double_blocks": 19, "single_blocks": 38}, "FLUX.1"),
        ("flux", {"double_blocks": 8, "single_blocks": 38}, "Flux-lite 8B"),
        ("flux2", {"double_blocks": 8, "single_blocks": 48}, "FLUX.2 dev"),
        ("flux2", {"double_blocks": 8, "single_blocks": 24}, "FLUX.2 Klein 9B"),
        ("flux2", {"double_blocks": 5, "single_blocks": 20}, "FLUX.2 Klein 4B"),
        ("anima", {"blocks": 28}, "Anima, 28 blocks"),
        ("anima", {"blocks": 40}, "Anima, 40 blocks"),
        ("anima", {"blocks": 52}, "Anima, 52 blocks"),
        ("ltx", {"transformer_blocks": 28}, "LTX-Video 2B"),
        ("ltx", {"transformer_blocks": 48}, "LTX-Video 13B"),
        ("ltx LTX-2", {"transformer_blocks": 48}, "LTX-2"),
        ("ltx LTX-2.3", {"transformer_blocks": 48}, "LTX-2.3"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_member_has_its_label(name, blocks, label):
    family = families()[name.split()[0]]
    small = original_shapes(family, shapes_of(name))
    small = {path: shape for path, shape in small.items() if "attn2.qkv" not in path}
    shapes = {path: shape for path, shape in small.items() if not path.startswith(tuple(blocks))}
    for container, number in blocks.items():
        block = {
            p.removeprefix(f"{container}.0"): shape for p, shape in small.items() if p.startswith(f"{container}.0.")
        }
        shapes |= {f"{container}.{i}{path}": shape for i in range(number) for path, shape in block.items()}
    assert family.variant(family.layers(shapes)) == label


def test_sd35_medium_is_told_by_its_second_attention():
    shapes = {f"joint_blocks.{i}.x_block.attn.qkv": (576, 192) for i in range(24)}
    shapes["joint_blocks.0.x_block.attn2.qkv"] = (576, 192)
    family = families()["sd3"]
    assert family.variant(family.layers(shapes)) == "Stable Diffusion 3.5 Medium"


@pytest.mark.parametrize(
    ("blocks", "width", "label"),
    [(30, 1536, "Wan 1.3B"), (30, 3072, "Wan 2.2 5B"), (40, 5120, "Wan 14B"), (40, 1536, "Wan")],
)
def test_a_wan_is_told_by_depth_and_width(blocks, width, label):
    family = families()["wan"]
    shapes = {f"blocks.{i}.self_attn.q": (width, width) for i in range(blocks)}
    assert family.variant(family.layers(shapes)) == label


def test_a_video_model_on_stable_diffusion_2_is_not_stable_diffusion_2():
    shapes = {"input_blocks.0.0": (320, 4, 3, 3), "input_blocks.1.1.transformer_blocks.0.attn2.to_k": (320, 1024)}
    assert recognise(shapes) is families()["sd2"]
    assert recognise(shapes | {"input_blocks.1.1.time_stack.0.attn1.to_q": (320, 320)}) is None


UNET = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
CONTROLNETS = {
    "ControlNetModel": UNET
    | {
        "cross_attention_dim": 768,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "attention_head_dim": 8,
    },
    "SparseControlNetModel": {},
    "FluxControlNetModel": HEADS | BLOCKS,
    "SD3ControlNetModel": {"num_layers": 2},
    "QwenImageControlNetModel": HEADS | {"num_layers": 2},
}


@pytest.mark.parametrize("name", CONTROLNETS)
def test_a_controlnet_is_no_base_of_the_family_that_it_was_copied_from(name):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = getattr(diffusers, name)(**CONTROLNETS[name])
    shapes = {key.removesuffix(".weight"): tuple(w.shape) for key, w in model.state_dict().items() if "weight" in key}
    assert recognise(shapes) is None


@pytest.mark.parametrize("name", MODELS)
def test_lora_spellings_are_found_without_a_base(name):
    family, shapes = families()[name.split()[0]], shapes_of(name)
    layers = family.layers(shapes)
    assert {layer.path for layer in layers} == {path for path, shape in shapes.items() if len(shape) > 1}
    for layer in layers:
        for path in (layer.path, layer.path.replace(".", "_")):
            assert [found.name for found in family.find("unet", path)] == [layer.name]
        for path in (layer.original, layer.original.replace(".", "_")):
            assert layer.name in [found.name for found in family.find("transformer", path)]


# Their attention has the same names in diffusers; with only that in a file, the number of blocks tells them apart.
DEPTHS = {
    "FLUX.1": ("FluxTransformer2DModel", 19, "Chroma or FLUX.1"),
    "FLUX.2": ("Flux2Transformer2DModel", 8, "FLUX.1 or FLUX.2"),  # Flux-lite has eight, too
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", 20, "HunyuanVideo"),
    "HunyuanVideo 1.5": ("HunyuanVideo15Transformer3DModel", 54, "HunyuanVideo 1.5"),
    "Krea 2": ("Krea2Transformer2DModel", 28, "Krea 2"),
    "Qwen-Image": ("QwenImageTransformer2DModel", 60, "Qwen-Image"),
    "Stable Diffusion 3.5 Large": ("SD3Transformer2DModel", 38, "Stable Diffusion 3"),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_a_lora_of_all_attention_in_diffusers_naming_is_told_by_its_blocks(name, tmp_path):
    """As train_dreambooth_lora_*.py of diffusers writes it where no layers are named: keys and values, no text."""
    diffusers = pytest.importorskip("diffusers")
    model, depth, label = DEPTHS[name]
    default = inspect.signature(getattr(diffusers, model).__init__).parameters["num_layers"].default
    assert default == depth or name == "Stable Diffusion 3.5 Large"  # the default of its class is none that exists
    rows = {
        part: 2 if name == "Krea 2" and part in ("to_k", "to_v") else 8 for part in ("to_q", "to_k", "to_v", "to_out.0")
    }
    tensors = {}
    for i in range(depth):
        for part, m in rows.items():
            module = f"transformer.transformer_blocks.{i}.attn.{part}"
            tensors |= {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.lora_B.weight": torch.ones(m, 2)}
    save_file(tensors, tmp_path / "lora.safetensors")
    adapter = load_adapter(tmp_path / "lora.safetensors")
    assert adapter.family_label == label
    assert set(adapter.layers) == {key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key}


def test_aliases_mean_the_layers_of_the_original_module():
    flux, hunyuan = families()["flux"], families()["hunyuan_video"]
    parts = flux.find("unet", "single_blocks.7.linear1_qkv", (48, 16))
    assert [(layer.path.rpartition(".")[2], layer.rows) for layer in parts] == [
        ("to_q", (0, 16)),
        ("to_k", (16, 32)),
        ("to_v", (32, 48)),
    ]
    assert {layer.original for layer in parts} == {"single_blocks.7.linear1"}
    assert hunyuan.find("unet", "double_blocks_3_img_mlp_fc1") == hunyuan.find("unet", "double_blocks.3.img_mlp.0")
    spelled = flux.spellings(flux.layers({"single_blocks.7.linear1": (7 * 16, 16)}))
    assert spelled == {"single_blocks.7.linear1_qkv": [layer.name for layer in parts]}


def test_a_checkpoint_that_comfyui_renames_has_the_same_layers():
    family = families()["hunyuan_video"]
    shapes = shapes_of("hunyuan_video")
    renamed = original_shapes(family, shapes, aliases=True)
    assert "double_blocks.0.img_attn_qkv" in renamed
    assert recognise(renamed) is family
    assert {layer.name for layer in family.layers(renamed)} == {layer.name for layer in family.layers(shapes)}


KNOWN = {
    "label",
    "component",
    "kohya",
    "has",
    "lacks",
    "width",
    "same",
    "modules",
    "aliases",
    "rows",
    "swapped",
    "proportions",
    "variants",
}
KNOWN |= {"text_encoders", "unet"}
PATH = re.compile(r"[\w-]+(\.([\w-]+|\*))*")


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.stem)
def test_a_table_is_well_formed(file):
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# ")
    table = toml.loads(text)
    assert set(table) <= KNOWN
    assert table["component"] == ("unet" if "unet" in table else "transformer")
    assert table["kohya"] in ("original", "diffusers")
    assert ("unet" in table) != ("has" in table)
    modules, aliases = table.get("modules", {}), table.get("aliases", {})
    same = table.get("same", [])
    paths = same + [path for parts in modules.values() for path in ([parts] if isinstance(parts, str) else parts)]
    assert len(paths) == len(set(paths))
    assert not set(modules) & (set(aliases) | set(paths))
    for original, parts in [*modules.items(), *aliases.items()]:
        for path in [parts] if isinstance(parts, str) else parts:
            assert PATH.fullmatch(original)
            assert PATH.fullmatch(path)
            assert original.count("*") == path.count("*") <= 1
            assert path in paths
    assert all(PATH.fullmatch(path) and path.count("*") <= 1 for path in same)
    for pattern in [*table.get("rows", {}), *table.get("swapped", [])]:
        assert pattern in modules
    fused = {original for original, parts in modules.items() if isinstance(parts, list)}
    assert set(table.get("proportions", {})) <= fused | set(paths)
    assert all(len(sizes) == 2 and min(sizes) > 0 for sizes in table.get("proportions", {}).values())
    for variant in table.get("variants", []):
        assert set(variant) <= {"label", "blocks", "width", "has"}
        assert len(variant) > 1
    for encoder in table.get("text_encoders", []):
        assert set(encoder) == {"component", "kind", "checkpoint", "kohya"}
