"""Adapter files of every family in every naming: what each layer gets, with the base at hand and without it.

Names and sizes of the layers are those of diffusers' own models; which rows of which original weight a layer is, says
diffusers' own converter of checkpoints where it has one (else the table, which tests/host compares with ComfyUI). What
must arrive are the very tensors of the file.
"""

import zlib
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from safetensors.torch import save_file

from demo.synthetic import SSD_1B
from lorax import load_adapter, open_base, save_adapter
from lorax.models.base import loaded_base
from lorax.models.families import families
from lorax.models.family import Family
from lorax.models.layers import flatten
from lorax.models.unet import diffusers_to_ldm
from tests.models import MODELS, SWAPPED, Checkpoint, original_shapes, shapes_of

RANK, ALPHA = 2, 1.0
NARROW = {"num_attention_heads": 1}
SMALL_LUMINA = {"hidden_size": 288, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 32}
# model -> the entry of MODELS, its true number of blocks, and a smaller width of the same proportions
TRANSFORMERS = {
    "SD 3 Medium": ("sd3", {"num_layers": 24, "dual_attention_layers": ()}, {}),
    "SD 3.5 Medium": ("sd3", {"num_layers": 24, "dual_attention_layers": tuple(range(13))}, {}),
    "SD 3.5 Large": ("sd3", {"num_layers": 38, "dual_attention_layers": ()}, {}),
    "FLUX.1": ("flux", {"num_layers": 19, "num_single_layers": 38}, NARROW),
    "FLUX.2": ("flux2", {"num_layers": 8, "num_single_layers": 48}, {}),
    "FLUX.2 Klein": ("flux2", {"num_layers": 5, "num_single_layers": 20}, {}),
    "Chroma": ("chroma", {"num_layers": 19, "num_single_layers": 38}, NARROW),
    "Anima": ("anima", {"num_layers": 28, "text_embed_dim": 1024}, NARROW | {"text_embed_dim": 64}),
    "Krea 2": ("krea2", {"num_layers": 28, "num_attention_heads": 4}, {}),
    "LTX-Video": ("ltx", {"num_layers": 28}, {}),
    "LTX-2": ("ltx LTX-2", {}, {}),
    "Lumina 2": ("lumina2", {"num_layers": 26}, SMALL_LUMINA),
    "Z-Image": ("z_image", {"n_layers": 30}, {}),
    "Qwen-Image": ("qwen_image", {"num_layers": 60}, NARROW),
    "Wan": ("wan", {"num_layers": 30}, {}),
    "Wan of images": ("wan of images", {"num_layers": 40}, {}),
    "Wan VACE": ("wan VACE", {"num_layers": 30}, {}),
    "HunyuanVideo": ("hunyuan_video", {"num_layers": 20, "num_single_layers": 40}, NARROW),
    "HunyuanVideo 1.5": ("hunyuan_video_15", {"num_layers": 54}, NARROW),
}
UNETS = {"SD 1": ("sd1", {}), "SD 2": ("sd2", {}), "SDXL": ("sdxl", {}), "SSD-1B": ("sdxl", SSD_1B)}
# naming -> what stands before the path of a module; whether that is the original one, and flattened; up and down
NAMINGS = {
    "kohya": ("lora_unet_", True, True, "lora_up", "lora_down"),
    "kohya of diffusers paths": ("lora_unet_", False, True, "lora_up", "lora_down"),
    "PEFT": ("base_model.model.", False, False, "lora_B", "lora_A"),
    "PEFT with a name": ("base_model.model.", False, False, "lora_B.style", "lora_A.style"),
    "diffusers": ("transformer.", False, False, "lora_B", "lora_A"),
    "diffusers bare": ("", False, False, "lora_B", "lora_A"),
    "lora.down": ("transformer.", False, False, "lora.up", "lora.down"),
    "ComfyUI": ("diffusion_model.", True, False, "lora_B", "lora_A"),
    "original bare": ("", True, False, "lora_up", "lora_down"),
    "OneTrainer": ("lora_transformer_", False, True, "lora_up", "lora_down"),
    "SimpleTuner": ("lycoris_", False, True, "lora_up", "lora_down"),
    "XLabs": ("", True, False, "up", "down"),
}
XLABS = {"img_attn.qkv": "qkv_lora1", "txt_attn.qkv": "qkv_lora2"}
XLABS |= {"img_attn.proj": "proj_lora1", "txt_attn.proj": "proj_lora2"}
SETS = ("attention", "linear layers", "others")


@dataclass
class Model:
    """A model of diffusers.

    Attributes:
        family: Its family.
        shapes: Shape of each module's weight, by its path in diffusers.
        originals: The same by the original path.
        rows: What each original module is: diffusers' paths and their rows.
        blocks: The numbers of the first and the last block.
    """

    family: Family
    shapes: dict[str, tuple[int, ...]]
    originals: dict[str, tuple[int, ...]]
    rows: dict[str, list[tuple[str, slice]]]
    blocks: tuple[str, ...] = ()


def rows_of(entry, family, shapes):
    """Which share of the rows of each original weight the modules of diffusers are, by its converter."""
    originals = original_shapes(family, shapes)
    converter = MODELS[entry][2]
    if not converter:
        told = shapes.keys() - SWAPPED.get(entry, set())  # as with converters: no halves that change places
        parts = [(layer, originals[layer.original][0]) for layer in family.layers(originals) if layer.path in told]
        return {layer.path: (layer.original, *(x / m for x in layer.rows or (0, m))) for layer, m in parts}
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    spelled = original_shapes(family, shapes, aliases=entry == "hunyuan_video")  # in the same order
    prefix = "net." if family.name == "anima" else ""
    codes = {
        f"{prefix}{path}.weight": torch.arange(m).reshape(-1, *[1] * len(rest)) + 10**6 * i
        for i, (path, (m, *rest)) in enumerate(spelled.items())
    }
    found = {}
    for key, code in getattr(single_file, converter)(Checkpoint(codes)).items():
        is_cut = torch.equal(
            code.flatten(), code.flatten()[0] + torch.arange(len(code))
        )  # and no halves changed places
        if key.removesuffix(".weight") in shapes and code.dim() > 1 and is_cut:
            first, last = (int(x) for x in (code.flatten()[0], code.flatten()[-1]))
            original = list(originals)[first // 10**6]
            m = originals[original][0]
            found[key.removesuffix(".weight")] = (original, first % 10**6 / m, (last % 10**6 + 1) / m)
    return found


@cache
def model(name):
    if name in UNETS:
        family, changes = families()[UNETS[name][0]], UNETS[name][1]
        parameters = replace(family.unet, model_channels=32, **changes).parameters()
        ldm = {key.removesuffix(".weight"): shape for key, shape in parameters.items() if len(shape) > 1}
        paths = {layer.path: layer.original for layer in family.layers(ldm)}
        assert diffusers_to_ldm(paths) == paths
        shapes = {path: ldm[original] for path, original in paths.items()}
        return Model(family, shapes, ldm, {original: [(path, slice(None))] for path, original in paths.items()})
    entry, depth, narrow = TRANSFORMERS[name]
    family = families()[entry.partition(" ")[0]]
    shares = rows_of(entry, family, {k: v for k, v in shapes_of(entry, **depth).items() if len(v) > 1})
    shapes = {k: v for k, v in shapes_of(entry, **depth | narrow).items() if len(v) > 1}
    last = depth.get("num_layers", depth.get("n_layers", 2)) - 1
    shapes = {path: shape for path, shape in shapes.items() if path in shares}
    rows, originals = {}, {}
    for path in shapes:
        rows.setdefault(shares[path][0], []).append(path)
    for original, paths in rows.items():
        paths.sort(key=lambda path: shares[path][1])
        m = sum(shapes[path][0] for path in paths)
        originals[original] = (m, *shapes[paths[0]][1:])
        rows[original] = [(path, slice(round(shares[path][1] * m), round(shares[path][2] * m))) for path in paths]
    return Model(family, shapes, originals, rows, ("0", str(last), str(depth.get("num_single_layers", 2) - 1)))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base as the command line opens it, and as a node finds it in memory."""
    folder = tmp_path_factory.mktemp("bases")

    @cache
    def pair(name):
        found = model(name)
        path = folder / f"{len(list(folder.iterdir()))}.safetensors"
        save_file(
            {
                f"{k}.weight": torch.zeros(v, dtype=torch.uint8).view(torch.float8_e4m3fn)
                for k, v in found.originals.items()
            },
            path,
        )
        held = loaded_base(name, {f"{k}.weight": v for k, v in found.originals.items()}, {}, torch.zeros)
        return open_base(path), held

    return pair


def is_chosen(path, shape, chosen, found):
    """Whether a module of diffusers belongs to a set of layers."""
    in_block = (any(part.isdigit() for part in path.split(".")) and "blocks" in path) or path.startswith("layers.")
    if chosen == "attention":
        return "attn" in path or "attention" in path
    if found.family.component == "unet":
        return (len(shape) == 2) == (chosen == "linear layers")
    if chosen == "others":
        return not in_block
    return in_block and path.partition(".")[2].partition(".")[0] in found.blocks and len(shape) == 2


def adapter_file(name, naming, chosen, path):
    """Write an adapter; return what each layer must get: up, down, alpha."""
    found = model(name)
    prefix, is_original, is_flat, up_name, down_name = NAMINGS[naming]
    if found.family.component == "unet":
        prefix = {"transformer.": "unet.", "lora_transformer_": "lora_unet_"}.get(prefix, prefix)
    paths = {p for p, shape in found.shapes.items() if is_chosen(p, shape, chosen, found)}
    spelled = {p: (shape, [(p, slice(None))]) for p, shape in found.shapes.items() if p in paths}
    if is_original:
        spelled = {
            p: (found.originals[p], rows) for p, rows in found.rows.items() if paths & {part for part, _ in rows}
        }
    modules = {prefix + (flatten(p) if is_flat else p): what for p, what in spelled.items()}
    component = found.family.component
    if naming == "XLabs":
        ends = {
            module: next((end for end in XLABS if module.startswith("double") and module.endswith(end)), "")
            for module in modules
        }
        modules = {
            module.replace(end, f"processor.{XLABS[end]}"): modules[module] for module, end in ends.items() if end
        }
    modules = {
        module: (shape, [(f"{component}.{p}", rows) for p, rows in parts]) for module, (shape, parts) in modules.items()
    }
    if chosen == "others" and naming not in ("PEFT", "PEFT with a name", "diffusers bare", "original bare", "XLabs"):
        modules |= dict(text_modules(found.family, naming, is_flat))
    tensors, expected = {}, {}
    g = torch.Generator().manual_seed(zlib.crc32(f"{name} {naming} {chosen}".encode()))
    for module, ((m, n, *kernel), parts) in modules.items():
        up, down = torch.randn(m, RANK, generator=g), torch.randn(RANK, n, *kernel, generator=g)
        tensors[f"{module}.{up_name}.weight"] = up.reshape(m, RANK, *[1] * len(kernel))
        tensors[f"{module}.{down_name}.weight"] = down
        if up_name == "lora_up":
            tensors[f"{module}.alpha"] = torch.tensor(ALPHA)
        for layer, rows in parts:
            expected[layer] = up[rows], down.flatten(1), ALPHA / RANK if up_name == "lora_up" else 1.0
    if tensors:
        save_file(tensors, path)
    return expected


def text_modules(family, naming, is_flat):
    for encoder in family.text_encoders:
        is_t5 = encoder.kind == "t5xxl"
        path = "encoder.block.0.layer.0.SelfAttention.q" if is_t5 else "text_model.encoder.layers.0.self_attn.q_proj"
        module = f"text_encoders.{encoder.kind}.transformer." if naming == "ComfyUI" else f"{encoder.component}."
        module = f"{encoder.kohya}_{flatten(path)}" if is_flat else module + path
        yield module, ((encoder.width, encoder.width), [(f"{encoder.component}.{path}", slice(None))])


def same(own, up, down, scale):
    return (
        torch.equal(own.lora_up.flatten(1), up) and torch.equal(own.lora_down.flatten(1), down) and own.scale == scale
    )


def faults(name, naming, chosen, pair, folder):
    """What is wrong with one file of the matrix, in words."""
    expected = adapter_file(name, naming, chosen, folder / "a.safetensors")
    if not expected:
        return []
    base, held = pair
    ours, told = load_adapter(folder / "a.safetensors", base), load_adapter(folder / "a.safetensors")
    node = told.resolved(held)
    found = []
    if told.families and model(name).family not in told.families:
        found.append(f"taken for {told.family_label}")
    for way, adapter in (("command line", ours), ("node", node)):
        right = {layer for layer, own in adapter.layers.items() if layer in expected and same(own, *expected[layer])}
        if right != expected.keys() or len(adapter.layers) > len(right):
            wrong = next(iter(expected.keys() - right), "too many")
            found.append(
                f"{way}: {len(right)} of {len(expected)} layers right, not {wrong}; {len(adapter.unused)} unused"
            )
    if found:
        return found
    if (ours.family, dict(ours.unused)) != (node.family, dict(node.unused)):
        found.append("the node tells another family or other unused keys")
    for form in ("kohya", "diffusers"):
        written = []
        for adapter in (ours, node):
            save_adapter(adapter, folder / "b.safetensors", naming=form)
            written.append((folder / "b.safetensors").read_bytes())
        if written[0] != written[1]:
            found.append(f"the node writes other bytes as {form}")
    return found


NAMES = (*UNETS, *TRANSFORMERS)
# every naming, and no model that takes long to build
SAMPLE = [
    ("SD 1", "kohya of diffusers paths", "others"),
    ("SSD-1B", "kohya", "linear layers"),
    ("SD 3.5 Medium", "diffusers", "attention"),
    ("FLUX.1", "XLabs", "attention"),
    ("FLUX.2 Klein", "ComfyUI", "linear layers"),
    ("Chroma", "original bare", "others"),
    ("Anima", "PEFT", "attention"),
    ("LTX-Video", "OneTrainer", "attention"),
    ("Lumina 2", "lora.down", "linear layers"),
    ("Z-Image", "kohya", "linear layers"),
    ("Wan", "diffusers bare", "attention"),
    ("Wan", "SimpleTuner", "linear layers"),
    ("LTX-2", "PEFT with a name", "others"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLE, ids=", ".join)
def test_a_sample_of_the_matrix(case, bases, tmp_path):
    assert faults(*case, bases(case[0]), tmp_path) == []


@pytest.mark.whole
@pytest.mark.parametrize("name", NAMES)
def test_every_naming_and_set_of_layers_of_a_model(name, bases, tmp_path):
    found = {}
    for naming in NAMINGS:
        for chosen in SETS:
            found[naming, chosen] = faults(name, naming, chosen, bases(name), tmp_path)
    assert {case: wrong for case, wrong in found.items() if wrong} == {}
