"""A base model: its layers, and their weights one at a time.

torch is imported when a weight is asked for: a header alone is read at once.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import FileError, FormatError, NumericsError
from .families import UNKNOWN, Family, Shapes, families, recognise
from .layers import MAIN, Layer, LayerTable
from .tensorfile import ADVICE, TensorFile

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

# Where the model that denoises lies in a file: in checkpoints, in ComfyUI's own saves, in the original repositories.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "net.", "model.", "")
# Keys that only adapters have, among those that end like a weight of a base.
ADAPTER_KEY = re.compile(r"[._]lora[._]|\.(hada|lokr|oft|foura)_|\.dora_scale$|\.[ab][12]\.weight$|^\w+:\d+:(up|down)$")
# What a tensor-wise scaled fp8 weight has beside it: ComfyUI's two spellings.
SCALES = ("scale_weight", "weight_scale")
SAMPLED_LAYERS = 8
Rows = tuple[int, int]
OPENCLIP = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


@dataclass(frozen=True, slots=True)
class Base:
    """A base model whose weights are read one layer at a time.

    Attributes:
        name: What to call it in messages and reports, such as its file name.
        family: The family that it belongs to.
        layers: Its linear and convolution layers, by name.
        read: Returns the weight of a layer, `layer.shape`, any floating dtype.
        vectors: Its norms and biases, by name with `.weight` or `.bias`.
        files: The files that it reads, which no output may replace.
        state: Names the files in the state in which they were opened: a weight of another state is refused. Nothing for
            a model in memory.
        naming: How its file spells the layers: `original` or `diffusers`.
        dtypes: How many tensors are stored in each dtype.
        parameters: How many numbers they hold.
        digests: What `digest` has computed, by layer name.
    """

    name: str
    family: Family
    layers: LayerTable
    read: Callable[[Layer], Tensor]
    vectors: LayerTable = field(default_factory=lambda: LayerTable([]))
    files: list[Path] = field(default_factory=list[Path])
    state: tuple[object, ...] = ()
    naming: str = ""
    dtypes: Counter[str] = field(default_factory=Counter[str])
    parameters: int = 0
    digests: dict[str, str] = field(default_factory=dict[str, str])
    _last: list[tuple[str, str, Tensor]] = field(
        default_factory=list["tuple[str, str, Tensor]"], init=False, repr=False
    )

    def weight(self, name: str, device: str = "cpu") -> Tensor:
        """Return the weight of a layer as a float32 matrix `[m, n]` on `device`, not to be changed.

        The last one is held: one layer is asked for several times in a row.

        Raises:
            NumericsError: It holds NaN or Inf.
            FileError: It cannot be read.
        """
        import torch

        from .linalg import all_finite

        for known, place, matrix in self._last:
            if (known, place) == (name, device):
                return matrix
        layer = self.layers[name]
        # Moved as it is stored: torch would make it float32 first, and move twice the bytes.
        matrix = self.read(layer).to(device).to(torch.float32).reshape(layer.matrix_shape)
        if not all_finite(matrix):
            raise NumericsError("a weight of a base holds NaN or Inf", f"{name} in {self.name}", "use a sound copy")
        self._last[:] = [(name, device, matrix)]
        return matrix

    def fused_weight(self, layer: Layer, device: str = "cpu") -> Tensor | None:
        """Return the weight that a layer, or a fused weight taken as one layer, has here; None if it is not here."""
        import torch

        parts = [self.layers[layer.name]] if layer.name in self.layers else []
        parts = parts or (self.layers.find(layer.component, layer.original) if layer.original else [])
        return torch.cat([self.weight(part.name, device) for part in parts]) if parts else None

    def digest(self, name: str) -> str:
        """Return the SHA-256 of a layer's shape and its values in float32, in hex; it is computed once.

        Storage in another dtype with the same values gives the same digest.
        """
        if name not in self.digests:
            matrix = self.weight(name).contiguous()
            digest = hashlib.sha256(repr(tuple(matrix.shape)).encode())
            digest.update(matrix.numpy().data)
            self.digests[name] = digest.hexdigest()
        return self.digests[name]

    def fingerprint(self, name: str) -> str:
        """Return 16 hex digits that name the content of a layer: the start of its digest."""
        return self.digest(name)[:16]

    def identity(self) -> str:
        """Return 16 hex digits that name the content of the base, made of the digests of a sample of its layers.

        Two fine-tunes of one base differ in it unless all of the sampled layers are equal.
        """
        main = [layer for layer in self.layers.values() if layer.is_main]
        names = [layer.name for layer in main if layer.is_attention] or [layer.name for layer in main]
        sample = " ".join(self.digest(name) for name in names[:: max(1, len(names) // SAMPLED_LAYERS)])
        return hashlib.sha256(sample.encode()).hexdigest()[:16]

    @property
    def components(self) -> list[str]:
        """The model that denoises (`unet` or `transformer`) and the text encoders that are there."""
        return self.layers.components

    @property
    def label(self) -> str:
        """What people call the model: the member of its family, such as `SSD-1B`, else the family."""
        return self.family.variant(self.layers.values())


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a layer's weight lies: a key of a file, and the rows of it where several layers are fused."""

    file: TensorFile
    key: str
    rows: Rows | None = None

    def read(self) -> Tensor:
        weight = self.file.tensor(self.key, self.rows)
        for scale in SCALES:
            beside = f"{self.key.removesuffix('weight')}{scale}"
            if beside in self.file.entries:
                factor = self.file.tensor(beside).float()
                sizes = zip(reversed(factor.shape), reversed(weight.shape), strict=False)
                if factor.dim() > weight.dim() or any(ours not in (1, its) for ours, its in sizes):
                    got = f"{beside} {list(factor.shape)} beside {list(weight.shape)} in {self.file.path}"
                    raise FileError("a scale that does not fit its weight", got, ADVICE)
                return weight.float() * factor
        return weight


def open_base(path: str | os.PathLike[str]) -> Base:
    """Open a base model without reading its weights.

    Args:
        path: A single-file checkpoint, the file of a U-Net or a diffusion transformer in its original or in diffusers'
            naming, or the folder of a diffusers pipeline.

    Returns:
        The base, with the text encoders that the file or folder holds. A model of no known family has its layers by
        their own names.

    Raises:
        FileError: A file is missing or damaged.
        FormatError: There is no model in it.
    """
    path = Path(path)
    parts = (
        _folder(path)
        if os.path.isdir(path)
        else {"": {key: file for file in [TensorFile(path)] for key in file.entries}}
    )
    main = next((parts[part] for part in (*MAIN, "") if part in parts), None)
    if main is None:
        fix = "give a diffusers folder with unet/ or transformer/ in it, or a file"
        raise FormatError("the folder holds no U-Net and no transformer", str(path), fix)
    family, prefix, shapes = _recognise(main, str(path))
    found = family.layers(shapes)
    naming = "original" if any(layer.original in shapes for layer in found) else "diffusers"
    spellings = family.spellings(found)
    if family is UNKNOWN:
        spellings |= {prefix + layer.path: [layer.name] for layer in found}
    places: dict[str, _Place] = {}
    for layer in found:
        key = prefix + (layer.original if naming == "original" and layer.original else layer.path) + ".weight"
        places[layer.name] = _Place(main[key], key, layer.rows if naming == "original" else None)
    layers = [*found]
    for encoder in family.text_encoders:
        files, starts = (main, encoder.checkpoint) if "" in parts else (parts.get(encoder.component, {}), ("",))
        for layer, place in _text_layers(encoder.component, files, starts):
            layers.append(layer)
            places[layer.name] = place
    opened = list({id(file): file for part in parts.values() for file in part.values()}.values())
    entries = [file.entries[key] for files in parts.values() for key, file in files.items()]
    return Base(
        name=path.name,
        family=family,
        layers=LayerTable(layers, spellings),
        read=lambda layer: places[layer.name].read(),
        vectors=LayerTable(family.vectors(_sizes(main, prefix), found)),
        files=[file.path for file in opened],
        state=tuple((os.path.realpath(file.path), *file.state) for file in opened),
        naming=naming,
        dtypes=Counter(entry.dtype for entry in entries),
        parameters=sum(math.prod(entry.shape) for entry in entries),
    )


def loaded_base(
    name: str,
    parameters: Shapes,
    text_encoders: Mapping[str, Shapes],
    read: Callable[[Layer], Tensor],
    spellings: Callable[[], Mapping[str, tuple[str, Rows | None]]] = dict,
) -> Base:
    """Make a base of a model that another program holds in memory.

    Args:
        name: What to call it.
        parameters: Shape of every parameter of the model that denoises, by its name there (`....weight`, `....bias`).
        text_encoders: For each text encoder, by kind (`clip_l`, `clip_g`, `clip_h`, `t5xxl`), the weight shape of its
            modules by Hugging Face module path.
        read: Returns the weight of a layer, `layer.shape`, any floating dtype.
        spellings: Returns what adapter files call the modules of a model of no known family: any module path -> the
            module that it means, and the rows where it is a part of that.
    """
    shapes = {key.removesuffix(".weight"): shape for key, shape in parameters.items() if key.endswith(".weight")}
    family = recognise(shapes) or UNKNOWN
    found = family.layers(shapes)
    names = family.spellings(found)
    if family is UNKNOWN:
        found, names = _spelled(found, spellings())
    layers = [*found]
    component = {encoder.kind: encoder.component for encoder in family.text_encoders}
    for kind, modules in text_encoders.items():
        if kind in component:
            layers += [Layer(f"{component[kind]}.{path}", shape) for path, shape in modules.items() if len(shape) == 2]
    sizes = {key: shape[0] for key, shape in parameters.items() if len(shape) == 1}
    return Base(name, family, LayerTable(layers, names), read, LayerTable(family.vectors(sizes, found)))


def module_base(model: Module, name: str = "model") -> Base:
    """Make a base of a torch module that denoises: a U-Net or a transformer, in its original or in diffusers' naming.

    The layers have the names that `open_base` gives them in a file of `model.state_dict()`.

    Args:
        model: The module; its weights are read when they are asked for. After they change, make a new base of it.
        name: What to call it.
    """
    modules = dict(model.named_modules())

    def read(layer: Layer) -> Tensor:
        weight = modules[module_path(layer, modules)].get_parameter("weight").detach()
        return weight if layer.rows is None else weight[slice(*layer.rows)]

    return loaded_base(name, {key: tuple(value.shape) for key, value in model.named_parameters()}, {}, read)


def module_path(layer: Layer, modules: Container[str]) -> str:
    """Return the path, in a model with these modules, of the module whose weight a layer is (or is a part of)."""
    return layer.original if layer.original in modules else layer.path


def _recognise(files: Mapping[str, TensorFile], name: str) -> tuple[Family, str, dict[str, tuple[int, ...]]]:
    """Return the family, the prefix of its keys, and the shape of each module's weight."""
    if any(ADAPTER_KEY.search(key) for key in files):
        raise FormatError("an adapter where a base model is wanted", name, "give a checkpoint")
    found = {prefix: shapes for prefix in PREFIXES if (shapes := _module_shapes(files, prefix))}
    for prefix, shapes in found.items():
        if family := recognise(shapes):
            return family, prefix, shapes
    prefix = next((prefix for prefix in found if prefix in (*PREFIXES[:2], "")), "")
    prefix += _wrapper(found.get(prefix, {}))
    shapes = _module_shapes(files, prefix)
    if not any(layer.block for layer in UNKNOWN.layers(shapes)):
        got = f"{name} with keys such as {', '.join(list(files)[:2]) or '(none)'}"
        known = ", ".join(family.label for family in families().values())
        raise FormatError("no diffusion model in the file", got, f"give a checkpoint of one of: {known}")
    return UNKNOWN, prefix, shapes


def _wrapper(shapes: Shapes) -> str:
    """Return the modules around a whole model, such as `network.`, which another release may call otherwise."""
    found = ""
    while len({path.removeprefix(found).partition(".")[0] for path in shapes}) == 1:
        head, _, rest = next(iter(shapes)).removeprefix(found).partition(".")
        if not rest or rest[0].isdigit():
            break
        found += f"{head}."
    return found


def _spelled(
    layers: list[Layer], spellings: Mapping[str, tuple[str, Rows | None]]
) -> tuple[list[Layer], dict[str, list[str]]]:
    """Cut layers into the parts that the spellings know; return also the layers that each spelling means."""
    parts: dict[str, dict[Rows, str]] = {}
    for path, (module, rows) in spellings.items():
        if rows is not None and (rows not in (known := parts.setdefault(module, {})) or "." in path):
            known[rows] = path
    cut: list[Layer] = []
    for layer in layers:
        whole = {None: layer.path} if layer.original not in parts else dict(sorted(parts[layer.original].items()))
        for rows, path in whole.items():
            shape = layer.shape if rows is None else (rows[1] - rows[0], *layer.shape[1:])
            cut.append(Layer(f"{layer.component}.{path}", shape, layer.original, rows))
    place = {(layer.original, layer.rows): layer.name for layer in cut}
    return cut, {path: [place[target]] for path, target in spellings.items() if target in place}


def _folder(path: Path) -> dict[str, dict[str, TensorFile]]:
    """Return for each component of a diffusers pipeline its keys and the file that holds each."""
    parts: dict[str, dict[str, TensorFile]] = {}
    for component in (*MAIN, "text_encoder", "text_encoder_2", "text_encoder_3"):
        shards: dict[str, list[Path]] = {}
        for file in sorted((path / component).glob("*.safetensors")):
            shards.setdefault(re.sub(r"-\d+-of-\d+", "", file.name), []).append(file)
        # A folder often holds the same weights in full and in half precision; the full ones have the shorter name.
        if shards:
            files = map(TensorFile, shards[min(shards, key=len)])
            parts[component] = {key: file for file in files for key in file.entries}
    return parts


def _module_shapes(files: Mapping[str, TensorFile], prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        key.removeprefix(prefix).removesuffix(".weight"): file.entries[key].shape
        for key, file in files.items()
        if key.startswith(prefix) and key.endswith(".weight")
    }


def _sizes(files: Mapping[str, TensorFile], prefix: str) -> dict[str, int]:
    return {
        key.removeprefix(prefix): file.entries[key].shape[0]
        for key, file in files.items()
        if key.startswith(prefix) and len(file.entries[key].shape) == 1
    }


def _text_layers(
    component: str, files: Mapping[str, TensorFile], prefixes: Iterable[str]
) -> Iterable[tuple[Layer, _Place]]:
    for key, file in files.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        shape = file.entries[key].shape
        if prefix is None or len(shape) != 2:
            continue
        module = key.removeprefix(prefix)
        if module.startswith(("text_model.encoder.layers.", "encoder.block.")) and module.endswith(".weight"):
            yield Layer(f"{component}.{module.removesuffix('.weight')}", shape), _Place(file, key)
        elif module.startswith("transformer.resblocks."):
            number, _, part = module.removeprefix("transformer.resblocks.").partition(".")
            layer = f"{component}.text_model.encoder.layers.{number}"
            if part == "attn.in_proj_weight":
                width = shape[1]
                for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
                    rows = (i * width, (i + 1) * width)
                    yield Layer(f"{layer}.self_attn.{name}", (width, width)), _Place(file, key, rows)
            elif part.removesuffix(".weight") in OPENCLIP:
                yield Layer(f"{layer}.{OPENCLIP[part.removesuffix('.weight')]}", shape), _Place(file, key)
