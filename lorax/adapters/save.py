"""Writing adapter files: the spelling of each layer in a naming, folded scales, metadata."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import NumericsError
from ..files.output import check_output, write_bytes
from ..files.tensorfile import serialize
from ..linalg import all_finite
from ..models.family import Family
from ..models.layers import Layer, is_swapped
from ..options import Naming, choice
from .combine import whole, with_halves_swapped
from .config import HEADER_ALPHA
from .diff import VectorLayer
from .keys import FLATTENED, is_fused, module_name
from .layer import AdapterLayer
from .load import LORA_X_VERSION
from .lora import LoraLayer
from .lora_x import LoraXLayer
from .model import Adapter

# Metadata that is false for a changed file: kohya's hashes of the content, the scales of diffusers and in the header
# (folded in here), what the indexed format says of its indices, and the LoRA-X fields, which are written anew.
STALE = re.compile(
    r"sshs_(model|legacy)_hash|lora_adapter_metadata|fingerprints|lorax_format_version|(unet|text_encoder)(:\d+:rank)?|"
    + "|".join(HEADER_ALPHA)
)


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    naming: str = "keep",
    dtype: torch.dtype | None = None,
    inputs: Sequence[Path] = (),
    overwrite: bool = True,
) -> None:
    """Write an adapter as safetensors, whole or not at all; the same adapter always gives the same bytes.

    Layers become what `AdapterLayer.tensors` says, in the spelling of kohya and LyCORIS. In the namings `diffusers` and
    `original` a LoRA becomes `lora_A`, `lora_B` (`diffusers`: with the scale within them, as its default is 1; in
    float32 where half precision would round it, see `LoraLayer.scaled`). Parts of a weight that the naming knows only
    fused are put together, with zero rows for missing ones; where that has no exact form, each has the name that
    diffusers gives it.
    LoRA-X layers become `<layer>.delta`, their fingerprints stand in the metadata.

    Args:
        adapter: The adapter.
        path: The file to write.
        naming: `kohya`, `diffusers`, `original` (`diffusion_model...`), or `keep`: the input's, where it is one of
            these, else kohya.
        dtype: The dtype to store; None keeps each layer's own.
        inputs: Files that must not be replaced.
        overwrite: Whether another file of this name may be replaced.

    Raises:
        OptionError: `naming` is unknown.
        NumericsError: A number does not fit `dtype`.
        OutputError: The file cannot be written.
    """
    naming = choice(Naming, naming)
    out = check_output(path, list(inputs))
    if naming is Naming.keep:
        kept = {"peft": "diffusers"}.get(adapter.naming, adapter.naming)
        naming = kept if kept in (*Naming, *FLATTENED) else "kohya"
    tensors: dict[str, Tensor] = {}
    fingerprints: dict[str, str] = {}
    for module, layer in _modules(adapter, naming):
        if isinstance(layer, LoraXLayer):
            fingerprints[layer.layer.name] = layer.fingerprint
        elif dtype is not None:
            layer = layer.moved(layer.layer, dtype)
        for part, tensor in _parts(layer, module, naming).items():
            key = f"{module}.{part}"
            tensors[key] = tensor if dtype is None or part in ("delta", "alpha") else _cast(tensor, dtype, key)
    for key in [key for key in tensors if key.endswith(".b_norm")]:
        module = key.removesuffix(".b_norm")
        if f"{module}.w_norm" not in tensors:  # ComfyUI reads b_norm beside w_norm only
            tensors[f"{module}.diff_b"] = tensors.pop(key)
    header = {"format": "pt"} | {k: v for k, v in adapter.metadata.items() if not STALE.fullmatch(k) and v != "<embed>"}
    if fingerprints:
        header |= {
            "lorax_format_version": LORA_X_VERSION,
            "fingerprints": json.dumps(fingerprints, separators=(",", ":"), sort_keys=True),
            "base_family": adapter.family.name if adapter.family else "",
            "rank": str(max(adapter.ranks)),
        }
    write_bytes(out, serialize(tensors, header), overwrite=overwrite)


def _modules(adapter: Adapter, naming: str) -> Iterator[tuple[str, AdapterLayer]]:
    """Yield what is written, with the name of its module; parts of one fused weight together where they can be."""
    family = next(iter(adapter.families), None)
    modules: dict[str, list[AdapterLayer]] = {}
    for layer in adapter.layers.values():
        if isinstance(layer, VectorLayer):
            yield module_name(_owner(layer.layer), family, naming), layer
        elif isinstance(layer, LoraXLayer):
            yield layer.layer.name, layer
        else:
            modules.setdefault(module_name(layer.layer, family, naming), []).append(layer)
    for module, parts in modules.items():
        alone = len(parts) == 1 and not is_fused(parts[0].layer, family, naming)
        fused = parts[0] if alone else _fused(parts, family)
        if fused is None:
            yield from ((part.layer.name, part) for part in parts)
        else:
            yield module, fused


def _fused(parts: Sequence[AdapterLayer], family: Family | None) -> AdapterLayer | None:
    """Return the update of a whole fused weight, zero where it has no part; None where there is no exact one."""
    first = parts[0].layer
    rows = family.part_rows(first.original, {part.layer.path: part.layer.shape for part in parts}) if family else {}
    if not rows:
        return None
    parts = sorted(parts, key=lambda part: rows[part.layer.path])
    size = max(stop for _, stop in rows.values())
    layer = Layer(f"{first.component}.{first.original}", (size, *first.shape[1:]), first.original)
    return whole(parts, [rows[part.layer.path] for part in parts], layer)


def _owner(parameter: Layer) -> Layer:
    """Return the module of a one-dimensional parameter as a layer."""
    path, original = (
        text.removesuffix(".weight").removesuffix(".bias") for text in (parameter.name, parameter.original)
    )
    return Layer(path, parameter.shape, original, swapped=parameter.swapped)


def _parts(layer: AdapterLayer, module: str, naming: str) -> dict[str, Tensor]:
    """Return the tensors of a layer by what is written after `<module>.`."""
    if is_swapped(_owner(layer.layer), module):
        layer = with_halves_swapped(layer)
    if naming not in ("diffusers", "original") or not isinstance(layer, LoraLayer) or layer.lora_mid is not None:
        return layer.tensors()
    scaled = naming == "original" and layer.scale != 1
    parts = layer.tensors() if scaled else layer.scaled().tensors()
    up, down, alpha = parts.pop("lora_up.weight"), parts.pop("lora_down.weight"), parts.pop("alpha")
    return parts | ({"alpha": alpha} if scaled else {}) | {"lora_B.weight": up, "lora_A.weight": down}


def _cast(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    stored = tensor.to(dtype)
    if not all_finite(stored):
        raise NumericsError("a number does not fit the output's dtype", f"{key} as {dtype}", "store float32")
    return stored
