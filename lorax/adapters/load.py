"""Reading adapter files."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base import Base
from ..errors import FormatError, NumericsError
from ..families import Family, families
from ..layers import Layer, reads_text
from ..tensorfile import TensorFile
from .keys import indexed_layers, parse
from .model import Adapter, AdapterLayer, LoraLayer, LoraXLayer

LORA_X_VERSION = "1"
# component and module path, as a key spells them
Module = tuple[str, str]
Alpha = Callable[[str, int], float | None]


def load_adapter(path: str | os.PathLike[str], base: Base | None = None) -> Adapter:
    """Read an adapter file: LoRA in kohya, diffusers, PEFT or indexed naming, or LoRA-X.

    Args:
        path: A safetensors file. The scale of a PEFT adapter is taken from the `adapter_config.json` beside it.
        base: The base that it was made for, if at hand: its layers are then known by name even where the base is not
            one of the full-size models.

    Returns:
        The adapter, its factors in the dtype of the file. What the file holds beyond known updates is in `unused`.

    Raises:
        FileError: The file is missing or damaged.
        FormatError: It holds no update that is known.
        NumericsError: It holds NaN or Inf.
    """
    file = TensorFile(path)
    complete, naming, unused = _group(file)
    shapes = {module: _shape(file, keys) for module, keys in complete.items()}
    if naming == "indexed":
        _check_indexed(file)
    family = _family(shapes, naming, base) or families().get(file.metadata.get("base_family", ""))
    alpha_of = _configured_alpha(file)
    fingerprints = _fingerprints(file) if naming == "lora-x" else {}
    layers: dict[str, AdapterLayer] = {}
    spellings: dict[str, str] = {}
    for module, keys in complete.items():
        layer = _resolve(module, shapes[module], base, family, naming)
        problem = _problem(file, keys, layer, layers)
        if problem:
            unused |= {key: problem for key in keys.values()}
            continue
        if naming != "indexed":
            spellings[layer.name] = module[1]
        if "delta" in keys:
            layers[layer.name] = LoraXLayer(layer, _finite(file, keys["delta"]), fingerprints.get(layer.name, ""))
        else:
            up, down = _finite(file, keys["up"]), _finite(file, keys["down"])
            alpha = float(_finite(file, keys["alpha"])) if "alpha" in keys else alpha_of(module[1], down.shape[0])
            layers[layer.name] = LoraLayer(layer, up, down, alpha)
    return Adapter(file.path.name, family, naming, layers, unused, file.metadata, spellings)


def _group(file: TensorFile) -> tuple[dict[Module, dict[str, str]], str, dict[str, str]]:
    """Sort the keys into updates: for each module its keys by role, the file's naming, and the rest with a reason."""
    modules: dict[Module, dict[str, str]] = {}
    namings: Counter[str] = Counter()
    unused: dict[str, str] = {}
    for key in file.entries:
        parsed = parse(key)
        if parsed is None:
            unused[key] = _why_unknown(key, file)
        elif parsed.role in (parts := modules.setdefault((parsed.component, parsed.path), {})):
            unused[key] = f"a second '{parsed.role}' for the same layer as {parts[parsed.role]}"
        else:
            parts[parsed.role] = key
            namings[parsed.naming if parsed.role != "delta" else "lora-x"] += 1
    complete = {module: keys for module, keys in modules.items() if "delta" in keys or {"up", "down"} <= set(keys)}
    for module in modules.keys() - complete.keys():
        unused |= dict.fromkeys(modules[module].values(), "its partner (up or down) is not in the file")
    if not complete:
        got = f"{file.path} with keys such as {', '.join(list(file.entries)[:2]) or '(none)'}"
        raise FormatError("no LoRA and no LoRA-X in the file", got, "give an adapter file")
    return complete, namings.most_common(1)[0][0], unused


def _why_unknown(key: str, file: TensorFile) -> str:
    if file.metadata.get(key) == "<embed>":
        return "a textual-inversion vector: a LoRA file has no place for it, keep the original beside the result"
    if "dora_scale" in key or "magnitude_vector" in key:
        return "the magnitude of a DoRA, which is not transferred yet: the result acts as a plain LoRA"
    return "not a part of any update that is known"


def _shape(file: TensorFile, keys: Mapping[str, str]) -> tuple[int, ...]:
    if "delta" in keys:
        return ()
    return (*file.entries[keys["up"]].shape[:1], *file.entries[keys["down"]].shape[1:])


def _family(shapes: Mapping[Module, tuple[int, ...]], naming: str, base: Base | None) -> Family | None:
    """Return the family whose layers fit best by name and size; that of `base` where none fits better."""

    def fitting(find: Callable[[Module], list[Layer]]) -> int:
        found = ((find(module), shape) for module, shape in shapes.items())
        return sum(
            len(layers) == 1 and (not shape or layers[0].matrix_shape == Layer("", shape).matrix_shape)
            for layers, shape in found
        )

    widths = {shape[1] for (_, path), shape in shapes.items() if len(shape) > 1 and reads_text(path)}
    if widths:
        return next((f for f in families().values() if f.unet is not None and widths == {f.unet.context_dim}), None)
    fits = {family: fitting(lambda module, f=family: _find(module, f, naming)) for family in families().values()}
    best = max(fits, key=lambda family: fits[family])
    if base is not None and naming != "indexed" and fitting(lambda module: base.layers.find(*module)) >= fits[best]:
        return base.family
    return best if fits[best] else None


def _check_indexed(file: TensorFile) -> None:
    """Refuse indices that count other layers than those whose order is known."""
    known = {"unet": {"CrossAttention", "Attention", "GEGLU"}, "text_encoder": {"CLIPAttention"}}
    for component, classes in known.items():
        named = set(re.findall(r"\w+", file.metadata.get(component, "")))
        if named - classes:
            got = f"{file.path} counts {', '.join(sorted(named))}"
            fix = f"convert it with the program that made it; known are {', '.join(sorted(classes))}"
            raise FormatError("an indexed LoRA over layers of unknown order", got, fix)


def _find(module: Module, family: Family, naming: str) -> list[Layer]:
    component, path = module
    if naming != "indexed":
        return family.find(component, path)
    order = indexed_layers(family, component)
    return order[int(path) : int(path) + 1]


def _resolve(module: Module, shape: tuple[int, ...], base: Base | None, family: Family | None, naming: str) -> Layer:
    found = base.layers.find(*module) if base is not None and naming != "indexed" else []
    if not found and family is not None:
        found = _find(module, family, naming)
    if len(found) != 1:
        return Layer(".".join(module), shape)
    layer = found[0]
    if shape and layer.matrix_shape != Layer("", shape).matrix_shape:
        return Layer(layer.name, shape, layer.original)
    return layer


def _problem(file: TensorFile, keys: Mapping[str, str], layer: Layer, seen: Mapping[str, AdapterLayer]) -> str | None:
    if layer.name in seen:
        return f"another key of the file means the same layer, {layer.name}"
    if "delta" in keys:
        shape = file.entries[keys["delta"]].shape
        return None if len(shape) == 1 and shape[0] else "delta is not a vector of numbers"
    up, down = file.entries[keys["up"]].shape, file.entries[keys["down"]].shape
    if len(up) < 2 or len(down) < 2 or up[1] != down[0] or 0 in up + down or any(size != 1 for size in up[2:]):
        return f"up {list(up)} and down {list(down)} are not two factors of one update"
    if "alpha" in keys and file.entries[keys["alpha"]].shape not in ((), (1,)):
        return "alpha is not a number"
    return None


def _finite(file: TensorFile, key: str) -> Tensor:
    tensor = file.tensor(key)
    if not bool(torch.isfinite(tensor.float()).all()):
        raise NumericsError("an adapter holds NaN or Inf", f"{key} in {file.path}", "use a sound copy")
    return tensor


def _fingerprints(file: TensorFile) -> dict[str, str]:
    version = file.metadata.get("lorax_format_version")
    if version != LORA_X_VERSION:
        fix = f"this version reads {LORA_X_VERSION}: update the package"
        raise FormatError("a LoRA-X file of an unknown format version", f"{file.path}: {version}", fix)
    try:
        return {str(name): str(value) for name, value in json.loads(file.metadata["fingerprints"]).items()}
    except (KeyError, ValueError, AttributeError) as error:
        raise FormatError("a LoRA-X file without fingerprints", str(file.path), "make it again") from error


def _configured_alpha(file: TensorFile) -> Alpha:
    """Find alpha where PEFT and diffusers keep it: in `adapter_config.json`, or in the metadata of the file."""
    config: dict[str, Any] = {}
    beside = Path(file.path).with_name("adapter_config.json")
    text = file.metadata.get("lora_adapter_metadata") or (
        beside.read_text(encoding="utf-8") if beside.is_file() else ""
    )
    try:
        loaded: dict[str, Any] = json.loads(text) if text else {}
        config = {key.removeprefix("unet."): value for key, value in loaded.items()}
        pattern: dict[str, Any] = config.get("alpha_pattern") or {}
        patterns = {key: float(value) for key, value in pattern.items()}
        default = None if config.get("lora_alpha") is None else float(config["lora_alpha"])
    except (ValueError, AttributeError, TypeError) as error:
        raise FormatError(
            "the adapter's configuration is not readable", f"{beside}", "mend it or take it away"
        ) from error

    def alpha(path: str, rank: int) -> float | None:
        value = next((v for key, v in patterns.items() if re.fullmatch(rf"(.*\.)?({re.escape(key)})", path)), default)
        return value if value is None or not config.get("use_rslora") else value * rank**0.5

    return alpha
