"""Writing adapter files."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import NumericsError, OptionError
from ..tensorfile import check_output, serialize, write_bytes
from .keys import kohya_module
from .load import LORA_X_VERSION
from .model import Adapter, LoraLayer

NAMINGS = ("kohya", "diffusers", "keep")
# Metadata that is false for a changed file: kohya's hashes of the content, diffusers' scales (folded in here), what the
# indexed format says of its indices, and the LoRA-X fields, which are written anew.
STALE = re.compile(
    r"sshs_(model|legacy)_hash|lora_adapter_metadata|fingerprints|lorax_format_version|(unet|text_encoder)(:\d+:rank)?"
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

    LoRA layers become `lora_down`, `lora_up`, `alpha` (kohya) or `lora_A`, `lora_B` with the scale folded into
    `lora_B` (diffusers, whose default is a scale of 1). LoRA-X layers become `<layer>.delta`, their fingerprints stand
    in the metadata.

    Args:
        adapter: The adapter.
        path: The file to write.
        naming: `kohya`, `diffusers`, or `keep`: the input's, where it is one of the two, else kohya.
        dtype: The dtype to store; None keeps each layer's own.
        inputs: Files that must not be replaced.
        overwrite: Whether another file of this name may be replaced.

    Raises:
        OptionError: `naming` is unknown.
        NumericsError: A number does not fit `dtype`.
        OutputError: The file cannot be written.
    """
    if naming not in NAMINGS:
        raise OptionError("unknown naming", naming, f"choose one of {', '.join(NAMINGS)}")
    out = check_output(path, list(inputs))
    if naming == "keep":
        naming = "diffusers" if adapter.naming in ("diffusers", "peft") else "kohya"
    tensors: dict[str, Tensor] = {}
    fingerprints: dict[str, str] = {}
    for layer in adapter.layers.values():
        if not isinstance(layer, LoraLayer):
            tensors[f"{layer.layer.name}.delta"] = layer.delta
            fingerprints[layer.layer.name] = layer.fingerprint
            continue
        store = dtype or layer.dtype
        up, down = layer.shaped()
        if naming == "kohya":
            module = kohya_module(layer.layer, adapter.family)
            alpha = layer.rank if layer.alpha is None else layer.alpha
            parts = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(float(alpha))}
        else:
            module = layer.layer.name
            scaled = up if layer.scale == 1 else (up.float() * layer.scale)
            parts = {"lora_B.weight": scaled, "lora_A.weight": down}
        for part, tensor in parts.items():
            tensors[f"{module}.{part}"] = _cast(tensor, store, f"{module}.{part}")
    header = {"format": "pt"} | {k: v for k, v in adapter.metadata.items() if not STALE.fullmatch(k) and v != "<embed>"}
    if fingerprints:
        header |= {
            "lorax_format_version": LORA_X_VERSION,
            "fingerprints": json.dumps(fingerprints, separators=(",", ":"), sort_keys=True),
            "base_family": adapter.family.name if adapter.family else "",
            "rank": str(max(adapter.ranks)),
        }
    write_bytes(out, serialize(tensors, header), overwrite=overwrite)


def _cast(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    stored = tensor.to(dtype)
    if not bool(torch.isfinite(stored.float()).all()):
        raise NumericsError("a number does not fit the output's dtype", f"{key} as {dtype}", "store float32")
    return stored
