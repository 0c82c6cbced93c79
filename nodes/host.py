"""The only file that knows ComfyUI: its models, devices, folders, progress and cancel button."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import comfy.lora
import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from ..lorax.adapters import Adapter, AdapterLayer, FouraLayer, LoraLayer, LoraXLayer, VectorLayer
from ..lorax.base import Base, loaded_base
from ..lorax.cache import open_cache
from ..lorax.engine import Engine
from ..lorax.errors import FormatError, MismatchError, OutputError
from ..lorax.layers import Layer
from ..lorax.progress import Progress

UNET = "diffusion_model."
# Where the host keeps the text encoders that we know, by kind.
TEXT_ENCODERS = {kind: f"{kind}.transformer." for kind in ("clip_l", "clip_h", "clip_g", "t5xxl")}
# Room to make on the GPU for one layer: the largest weight of SDXL, 10240 x 1280, in float64, six times.
WORKSPACE_BYTES = 640 * 2**20

# The prefixes that the host's key lists put before a module path.
SPELLED = re.compile(
    r"^(lora_unet_|lora_transformer_|lycoris_|diffusion_model\.|transformer\.|unet\.|base_model\.model\.)"
)

# A parameter of the host's model; with (dimension, start, length) for a part of it.
Key = str | tuple[str, tuple[int, int, int]]
REPORT = "report this with the ComfyUI version"
Result = TypeVar("Result")


def __getattr__(name: str) -> Any:
    """Give the node API (`io`, `ui`, `ComfyExtension`) on demand: hosts of before 2025 have none."""
    if name in ("io", "ui", "ComfyExtension"):
        from comfy_api import latest

        return getattr(latest, name)
    raise AttributeError(name)


def weight_of(patcher: Any, key: str) -> Tensor:
    """Return the weight that the sampler would use: dequantised, with its patches, a float32 copy on the CPU.

    Args:
        patcher: A MODEL, or the patcher of a CLIP.
        key: Name of a parameter of `patcher.model`.
    """
    weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    # While a model is loaded with patches, its own weights wait in a backup.
    if (backup := patcher.backup.get(key)) is not None:
        weight = backup.weight
    if (backup := getattr(patcher, "hook_backup", {}).get(key)) is not None:
        weight = backup[0]
    if hasattr(weight, "layout_cls") or type(weight).__name__ == "QuantizedTensor":
        weight = weight.detach().to("cpu").dequantize().to(torch.float32)
    else:
        weight = management.cast_to_device(weight.detach(), torch.device("cpu"), torch.float32, copy=True)
        if convert is not None:
            weight = convert(weight, inplace=True)
    patches = patcher.patches.get(key)
    return comfy.lora.calculate_weight(patches, weight, key, intermediate_dtype=torch.float32) if patches else weight


def open_model(model: Any, clip: Any = None) -> Base:
    """Return a MODEL, and a CLIP if there is one, as a base whose weights are read one at a time.

    Raises:
        FormatError: The MODEL has no U-Net of a known family; the kinds of layer that were seen are named.
    """
    name = type(getattr(model.model, "model_config", model.model)).__name__
    parameters = _parameters(model, UNET)
    encoders = {kind: _text_modules(clip, prefix) for kind, prefix in TEXT_ENCODERS.items()} if clip is not None else {}
    base = loaded_base(name, parameters, encoders, lambda layer: read(layer), lambda: _spellings(model))
    kinds = {encoder.component: TEXT_ENCODERS[encoder.kind] for encoder in base.family.text_encoders}

    def read(layer: Layer) -> Tensor:
        if not layer.is_main:
            return weight_of(clip.patcher, f"{kinds[layer.component]}{layer.path}.weight")
        weight = weight_of(model, f"{UNET}{layer.original}.weight")
        return weight if layer.rows is None else weight[slice(*layer.rows)]

    return base


def model_key(base: Base, layer: Layer) -> Key:
    """Return the name of a layer's weight in the host's MODEL or CLIP; with (dimension, start, length) for a part."""
    if not layer.is_main:
        kind = next(encoder.kind for encoder in base.family.text_encoders if encoder.component == layer.component)
        return f"{TEXT_ENCODERS[kind]}{layer.path}.weight"
    key = f"{UNET}{layer.original}.weight"
    return key if layer.rows is None else (key, (0, layer.rows[0], layer.rows[1] - layer.rows[0]))


def _spellings(model: Any) -> dict[str, tuple[str, tuple[int, int] | None]]:
    """Return what the host's own LoRA loader calls the modules of a model, for families that we do not know."""
    found: dict[str, tuple[str, tuple[int, int] | None]] = {}
    for name, target in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        key, part = (target, None) if isinstance(target, str) else target[:2]
        if key.startswith(UNET) and key.endswith(".weight") and (part is None or part[0] == 0):
            rows = None if part is None else (part[1], part[1] + part[2])
            found[SPELLED.sub("", name)] = (key.removeprefix(UNET).removesuffix(".weight"), rows)
    return found


def _parameters(patcher: Any, prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        name.removeprefix(prefix): tuple(value.shape)
        for name, value in patcher.model.named_parameters()
        if name.startswith(prefix)
    }


def _text_modules(clip: Any, prefix: str) -> dict[str, tuple[int, ...]]:
    inner = ("text_model.encoder.layers.", "encoder.block.")
    return {
        name.removesuffix(".weight"): shape
        for name, shape in _parameters(clip.patcher, prefix).items()
        if name.startswith(inner) and name.endswith(".weight")
    }


def apply_adapter(model: Any, clip: Any, adapter: Adapter, strength: float) -> tuple[Any, Any, list[str]]:
    """Return copies of MODEL and CLIP with the adapter as patches of the host's own kind.

    Strengths add up with other LoRA nodes, saving bakes the patches, unloading takes them off.

    Args:
        model: MODEL.
        clip: CLIP or None.
        adapter: Layers of any kind but LoRA-X, which must be expanded before.
        strength: Factor of the update.

    Returns:
        Patched MODEL, patched CLIP (or None), and the names of the layers that found no place.

    Raises:
        MismatchError: Not one layer found its place.
    """
    base = open_model(model, clip)
    tensors: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
    keys: dict[bool, dict[str, Key]] = {True: {}, False: {}}
    missing: list[str] = []
    for name, own in adapter.resolved(base).layers.items():
        key = _patched_key(base, own)
        if key is None:
            missing.append(name)
            continue
        keys[own.layer.is_main][name] = key
        parts = _known(own).tensors()
        tensors[own.layer.is_main] |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    patched = model.clone()
    done = _patch(patched, tensors[True], keys[True], strength)
    patched_clip = clip.clone() if clip is not None else None
    if patched_clip is not None:
        done += _patch(patched_clip, tensors[False], keys[False], strength)
    if not done:
        first = next(iter(adapter.layers), "nothing")
        got = f"{adapter.name} with layers such as {first} on {base.name} ({base.family.label})"
        raise MismatchError("no layer of the adapter fits the model", got, "transfer it to this model first")
    return patched, patched_clip, missing


def _patched_key(base: Base, own: AdapterLayer) -> Key | None:
    """Return the weight that a layer updates, or the weight beside the norm or bias; None if it has no place."""
    name, shape = own.layer.name, own.layer.shape
    if isinstance(own, LoraXLayer):
        return None
    if isinstance(own, VectorLayer):
        vector = base.vectors.get(name)
        return f"{UNET}{vector.original.rpartition('.')[0]}.weight" if vector and vector.shape == shape else None
    layer = base.layers.get(name)
    if layer is not None:
        return model_key(base, layer) if layer.matrix_shape == own.layer.matrix_shape else None
    parts = base.layers.find(own.layer.component, own.layer.original) if own.layer.original else []
    return f"{UNET}{own.layer.original}.weight" if sum(part.shape[0] for part in parts) == shape[0] else None


def _known(own: AdapterLayer) -> AdapterLayer:
    """Return an update as one of a kind that the host knows: FouRA as the LoRA that it is."""
    return LoraLayer(own.layer, *own.factors()) if isinstance(own, FouraLayer) else own


def _patch(target: Any, tensors: Mapping[str, Tensor], keys: Mapping[str, Key], strength: float) -> int:
    if not keys:
        return 0
    patches = comfy.lora.load_lora(dict(tensors), dict(keys))
    applied = set(target.add_patches(patches, strength))
    if lost := set(patches) - applied:
        raise MismatchError("the host did not take a patch", str(sorted(map(str, lost))[0]), REPORT)
    if len(patches) < len(keys):
        raise MismatchError("the host did not read an update", f"{len(keys) - len(patches)} of {len(keys)}", REPORT)
    return len(applied)


def compute(work: Callable[[Engine, Progress], Result], steps: int, *, cache: bool = True) -> Result:
    """Run `work(engine, progress)` on the host's device, with its progress bar and its cancel button.

    Out of GPU memory, the work is done again on the CPU.

    Args:
        work: Computes something; calls `progress` often.
        steps: How many steps there will be, about.
        cache: Take subspaces and scores from the user's cache, and keep new ones there.
    """
    bar = comfy.utils.ProgressBar(steps)

    def progress(done: int, total: int, what: str) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    device = management.get_torch_device()
    on_cpu = Engine(cache=open_cache() if cache else None)
    if device.type == "cpu":
        return work(on_cpu, progress)
    try:
        management.free_memory(WORKSPACE_BYTES, device)
        return work(replace(on_cpu, device=str(device)), progress)
    except management.OOM_EXCEPTION:
        management.soft_empty_cache()
        return work(on_cpu, progress)
    finally:
        management.soft_empty_cache()


def adapter_files() -> list[str]:
    """Return the names of the files in the host's `loras` folders."""
    import folder_paths

    return folder_paths.get_filename_list("loras")


def adapter_path(name: str) -> str:
    """Return the path of a file in the host's `loras` folders.

    Raises:
        FormatError: There is no such file.
    """
    import folder_paths

    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise FormatError("no such file in the loras folders", name, "refresh the node list (R) and choose again")
    return path


def free_path(folder: str, prefix: str) -> tuple[str, str]:
    """Return a path that does not exist yet, `<prefix>_00001_.safetensors`, and its name below a folder of the host.

    Args:
        folder: `output` or `loras`.
        prefix: Name, with subfolders if wanted; never outside the folder.

    Raises:
        OutputError: The name leads outside the folder, or the folder cannot be written.
    """
    import folder_paths

    root = folder_paths.get_output_directory() if folder == "output" else folder_paths.get_folder_paths("loras")[0]
    inside, name = os.path.realpath(root), os.path.realpath(os.path.join(root, prefix))
    if os.path.commonpath([inside, name]) != inside or name == inside or not os.path.basename(prefix):
        raise OutputError("a name outside the host's folders", prefix, f"give a name below {folder}")
    try:
        os.makedirs(os.path.dirname(name), exist_ok=True)
    except OSError as error:
        raise OutputError("cannot make the folder", f"{prefix}: {error.strerror}", "choose another name") from error
    count = 1
    while os.path.exists(path := f"{name}_{count:05}_.safetensors"):
        count += 1
    return path, os.path.relpath(path, inside)


def show(text: str, node_id: str | None) -> None:
    """Show text on the face of a node while the graph runs."""
    from server import PromptServer

    if node_id is not None:
        PromptServer.instance.send_progress_text(text, node_id)
