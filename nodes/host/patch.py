"""Applies an adapter to a MODEL and a CLIP as patches of ComfyUI's own."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.lora
from torch import Tensor

from ...lorax.adapters import Adapter, AdapterLayer, FouraLayer, LoraLayer, LoraXLayer, VectorLayer
from ...lorax.errors import MismatchError
from ...lorax.models.base import Base
from ...lorax.transfer.widened import fitted
from .models import UNET, Key, model_key, open_model
from .types import Clip, Model

REPORT = "report this with the ComfyUI version"


def apply_adapter(
    model: Model, clip: Clip | None, adapter: Adapter, strength: float
) -> tuple[Model, Clip | None, list[str]]:
    """Return copies of MODEL and CLIP with the adapter as patches of the host's own kind.

    Strengths add up with other LoRA nodes, saving bakes the patches, unloading takes them off. Of an input layer that
    reads more channels than that of the adapter, or fewer, those that both read take the update.

    Args:
        model: MODEL.
        clip: CLIP or None.
        adapter: Layers of any kind but LoRA-X, which must become LoRA layers before.
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
    for name, update in adapter.resolved(base).layers.items():
        key = _patched_key(base, update)
        if key is None and not isinstance(update, LoraXLayer) and (part := fitted(update, base)):
            update, key = part, _patched_key(base, part)
        if key is None:
            missing.append(name)
            continue
        keys[update.layer.is_main][name] = key
        parts = _as_the_host_knows(update).tensors()
        tensors[update.layer.is_main] |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
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


def _patched_key(base: Base, update: AdapterLayer) -> Key | None:
    """Return the weight that a layer updates, or the weight beside the norm or bias; None if it has no place."""
    name, shape = update.layer.name, update.layer.shape
    if isinstance(update, LoraXLayer):
        return None
    if isinstance(update, VectorLayer):
        vector = base.vectors.get(name)
        return f"{UNET}{vector.original.rpartition('.')[0]}.weight" if vector and vector.shape == shape else None
    layer = base.layers.get(name)
    if layer is not None:
        return model_key(base, layer) if layer.matrix_shape == update.layer.matrix_shape else None
    parts = base.layers.parts_of(update.layer)
    return f"{UNET}{update.layer.original}.weight" if sum(part.shape[0] for part in parts) == shape[0] else None


def _as_the_host_knows(update: AdapterLayer) -> AdapterLayer:
    """Return an update as one of a kind that the host knows: FouRA as the LoRA that it is."""
    return LoraLayer(update.layer, *update.factors()) if isinstance(update, FouraLayer) else update


def _patch(target: Model | Clip, tensors: Mapping[str, Tensor], keys: Mapping[str, Key], strength: float) -> int:
    if not keys:
        return 0
    patches = comfy.lora.load_lora(dict(tensors), dict(keys))
    applied = set(target.add_patches(patches, strength))
    if lost := set(patches) - applied:
        raise MismatchError("the host did not take a patch", str(sorted(map(str, lost))[0]), REPORT)
    if len(patches) < len(keys):
        raise MismatchError("the host did not read an update", f"{len(keys) - len(patches)} of {len(keys)}", REPORT)
    return len(applied)
