"""The models of ComfyUI as bases: their layers by name, their weights as the sampler would use them."""

from __future__ import annotations

import copy
import re
import weakref

import comfy.lora
import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from ...lorax.errors import FormatError, OptionError
from ...lorax.models.base import Base, check_numbers, loaded_base
from ...lorax.models.basefiles import UNQUANTISED, quantised_name
from ...lorax.models.layers import Layer
from .types import Clip, Model

UNET = "diffusion_model."
# Where the host keeps the text encoders that we know, by kind.
TEXT_ENCODERS = {kind: f"{kind}.transformer." for kind in ("clip_l", "clip_h", "clip_g", "t5xxl")}

# The prefixes that the host's key lists put before a module path.
SPELLED = re.compile(
    r"^(lora_unet_|lora_transformer_|lycoris_|diffusion_model\.|transformer\.|unet\.|base_model\.model\.)"
)

# A parameter of the host's model; with (dimension, start, length) for a part of it.
Key = str | tuple[str, tuple[int, int, int]]


def weight_of(patcher: Model, key: str) -> Tensor:
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
    if _is_quantised(weight):
        weight = weight.detach().to("cpu").dequantize().to(torch.float32)
    elif _is_gguf(weight):
        weight = weight.to("cpu", copy=True)
        weight.patches = []  # those of whichever MODEL was loaded last
        # Its layers read their own weights; in float32, which is what the file says, where they would round to float16.
        layer = copy.copy(comfy.utils.get_attr(patcher.model, key.rpartition(".")[0]))
        layer.dequant_dtype = torch.float32
        weight = layer.get_weight(weight, torch.float32)
    else:
        weight = management.cast_to_device(weight.detach(), torch.device("cpu"), torch.float32, copy=True)
        if convert is not None:
            weight = convert(weight, inplace=True)
    patches = patcher.patches.get(key)
    return comfy.lora.calculate_weight(patches, weight, key, intermediate_dtype=torch.float32) if patches else weight


def open_model(model: Model | Base, clip: Clip | None = None, name: str | None = None) -> Base:
    """Return a MODEL, and a CLIP if there is one, as a base whose weights are read one at a time; a base as it is.

    Its name is `name`; where that is not known, what the host calls models of its kind.

    The layers of a MODEL of no known family have the names that the host's own LoRA loader gives them.

    Raises:
        FormatError: A weight is quantised in a way that is not read.
        OptionError: A CLIP beside a base from a file.
    """
    if isinstance(model, Base):
        if clip is not None:
            message = "a CLIP beside a base from a file, which has the text encoders of its file"
            raise OptionError(message, model.name, "disconnect the CLIP, or load the model")
        return model
    name = name or type(getattr(model.model, "model_config", model.model)).__name__
    encoders = {kind: _text_modules(clip, prefix) for kind, prefix in TEXT_ENCODERS.items()} if clip is not None else {}

    def read(layer: Layer) -> Tensor:
        key = model_key(base, layer)
        patcher = model if clip is None or layer.is_main else clip.patcher
        if isinstance(key, str):
            return weight_of(patcher, key)
        key, (dimension, start, length) = key
        return weight_of(patcher, key).narrow(dimension, start, length)

    base = loaded_base(name, _parameters(model, UNET), encoders, read, lambda: _spellings(model))
    return base


def state_of(model: Model, clip: Clip | None) -> tuple[object, ...]:
    """Return what tells a MODEL and a CLIP with their patches from all others: equal as long as none of it changes."""
    return weakref.ref(model.model), model.patches_uuid, clip.patcher.patches_uuid if clip is not None else None


def model_key(base: Base, layer: Layer) -> Key:
    """Return the name of a layer's weight in the host's MODEL or CLIP; with (dimension, start, length) for a part."""
    if not layer.is_main:
        kind = next(encoder.kind for encoder in base.family.text_encoders if encoder.component == layer.component)
        return f"{TEXT_ENCODERS[kind]}{layer.path}.weight"
    key = f"{UNET}{layer.original}.weight"
    return key if layer.rows is None else (key, (0, layer.rows[0], layer.rows[1] - layer.rows[0]))


def _spellings(model: Model) -> dict[str, tuple[str, tuple[int, int] | None]]:
    """Return what the host's own LoRA loader calls the modules of a model, for families that we do not know."""
    found: dict[str, tuple[str, tuple[int, int] | None]] = {}
    for name, target in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        key, part = (target, None) if isinstance(target, str) else target[:2]
        if key.startswith(UNET) and key.endswith(".weight") and (part is None or part[0] == 0):
            rows = None if part is None else (part[1], part[1] + part[2])
            found[SPELLED.sub("", name)] = (key.removeprefix(UNET).removesuffix(".weight"), rows)
    return found


def _parameters(patcher: Model, prefix: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter; it is one of numbers, or one that tells how many numbers it stands for."""
    held = {name: value for name, value in patcher.model.named_parameters() if name.startswith(prefix)}
    read = {name.rpartition(".")[0] for name, value in held.items() if _is_quantised(value) or _is_gguf(value)}
    for name, value in held.items():
        if name.endswith(".weight") and name.rpartition(".")[0] not in read:
            check_numbers(value, tuple(value.shape), name)
    if odd := quantised_name([name for name in held if name.rpartition(".")[0] not in read]):
        raise FormatError("quantised weights are not read", odd, UNQUANTISED)
    return {name.removeprefix(prefix): tuple(value.shape) for name, value in held.items()}


def _is_quantised(weight: Tensor) -> bool:
    """Return whether a weight is a quantised tensor of the host's own."""
    return hasattr(weight, "layout_cls") or type(weight).__name__ == "QuantizedTensor"


def _is_gguf(weight: Tensor) -> bool:
    """Return whether a weight is a tensor of ComfyUI-GGUF."""
    return hasattr(weight, "tensor_type")


def _text_modules(clip: Clip, prefix: str) -> dict[str, tuple[int, ...]]:
    inner = ("text_model.encoder.layers.", "encoder.block.")
    return {
        name.removesuffix(".weight"): shape
        for name, shape in _parameters(clip.patcher, prefix).items()
        if name.startswith(inner) and name.endswith(".weight")
    }
