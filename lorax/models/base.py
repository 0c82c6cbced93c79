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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FormatError, NumericsError
from .basefiles import ADAPTER_KEY, UNQUANTISED, Stored, Tensors, open_components
from .families import UNKNOWN, families, recognise
from .family import Family, Shapes
from .layers import MAIN, Layer, LayerTable, Rows, is_swapped

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

# Where the model that denoises lies in a file: in checkpoints, in ComfyUI's own saves, in the original repositories.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "net.", "model.", "")
SAMPLED_LAYERS = 8
# A linear layer of a text encoder as transformers spells it (5 leaves `text_model.` out of a CLIP), or OpenCLIP.
TEXT_LAYER = re.compile(
    r"(?:text_model\.)?(encoder\.layers\..+)\.weight|(encoder\.block\..+)\.weight|transformer\.resblocks\.(\d+)\.(.+)"
)
OPENCLIP = {
    "attn.out_proj.weight": "self_attn.out_proj",
    "mlp.c_fc.weight": "mlp.fc1",
    "mlp.c_proj.weight": "mlp.fc2",
}


@dataclass(eq=False, slots=True)
class Base:
    """A base model whose weights are read one layer at a time.

    It keeps the digests that it has computed and the last weight that it has read. `dataclasses.replace` makes a base
    that keeps nothing yet; one with another `read` of the same files needs another `state` too.

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
        digests: What `digest` has computed, or an `Engine` has remembered of files in this state, by layer name.
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
    digests: dict[str, str] = field(default_factory=dict[str, str], init=False, repr=False)
    # name, device and matrix of the last weight
    _last: tuple[str, str, Tensor] | None = field(default=None, init=False, repr=False)

    def weight(self, name: str, device: str = "cpu") -> Tensor:
        """Return the weight of a layer as a float32 matrix `[m, n]` on `device`, not to be changed.

        The last one is held: one layer is asked for several times in a row.

        Raises:
            NumericsError: It holds NaN or Inf.
            FormatError: It is quantised in a way that is not read.
            FileError: It cannot be read.
        """
        from ..linalg import all_finite, single

        last = self._last  # other threads read too
        if last is not None and last[:2] == (name, device):
            return last[2]
        layer = self.layers[name]
        weight = self.read(layer)
        check_numbers(weight, layer.shape, f"{name} in {self.name}")
        matrix = single(weight, device).reshape(layer.matrix_shape)
        if not all_finite(matrix):
            raise NumericsError("a weight of a base holds NaN or Inf", f"{name} in {self.name}", "use a sound copy")
        self._last = (name, device, matrix)
        return matrix

    def fused_weight(self, layer: Layer, device: str = "cpu") -> Tensor | None:
        """Return the weight that a layer, or a fused weight taken as one layer, has here; None if it is not here."""
        import torch

        parts = self.layers.parts_of(layer)
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


def open_base(path: str | os.PathLike[str]) -> Base:
    """Open a base model without reading its weights.

    Args:
        path: A single-file checkpoint; the file, a shard or the folder of a U-Net or a diffusion transformer in its
            original or in diffusers' naming; or the folder of a diffusers pipeline.

    Returns:
        The base, with the text encoders that the file or folder holds. A model of no known family has its layers by
        their own names.

    Raises:
        FileError: A file or a shard is missing or damaged, or is of a kind that is never read.
        FormatError: There is no model in it, or several.
    """
    path = Path(path)
    parts = open_components(path)
    main = next(parts[part] for part in (*MAIN, "") if part in parts)
    family, prefix, shapes = _recognise(main, str(path))
    found = family.layers(shapes)
    spellings = family.spellings(found)
    if family is UNKNOWN:
        spellings |= {prefix + layer.path: [layer.name] for layer in found}
    weights: dict[str, Stored] = {}
    for layer in found:
        module, rows = module_place(layer, shapes)
        weights[layer.name] = replace(main[f"{prefix}{module}.weight"], rows=rows)
    layers = [*found]
    for encoder in family.text_encoders:
        tensors, starts = (main, encoder.checkpoint) if "" in parts else (parts.get(encoder.component, {}), ("",))
        for layer, weight in _text_layers(encoder.component, tensors, starts):
            layers.append(layer)
            weights[layer.name] = weight
    stored = [tensor for tensors in parts.values() for tensor in tensors.values()]
    opened = [
        file for part in parts.values() for _, file in sorted({t.file.path: t.file for t in part.values()}.items())
    ]
    is_original = all(module_place(layer, shapes)[0] == layer.original for layer in found)
    return Base(
        name=Path(os.path.abspath(path)).name,
        family=family,
        layers=LayerTable(layers, spellings),
        read=lambda layer: in_our_order(weights[layer.name].read(), layer, module_place(layer, shapes)[0]),
        vectors=LayerTable(family.vectors(_sizes(main, prefix), found)),
        files=[file.path for file in opened],
        state=tuple((os.path.realpath(file.path), *file.state) for file in opened),
        naming="original" if is_original else "diffusers",
        dtypes=Counter(tensor.entry.dtype for tensor in stored),
        parameters=sum(math.prod(tensor.entry.shape) for tensor in stored),
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


def check_numbers(weight: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Check that a weight is numbers, and as many as the layer has; what is packed in a way of its own is not.

    Args:
        weight: The weight, or what a program keeps in its place.
        shape: Shape of the layer's weight.
        name: Names the weight in a message.

    Raises:
        FormatError: It is of another shape, or not of a floating dtype.
    """
    if tuple(weight.shape) != shape or not weight.is_floating_point():
        got = f"{name} is {str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
        got += "" if tuple(weight.shape) == shape else f", not {list(shape)}"
        raise FormatError("a weight that cannot be read as numbers", got, UNQUANTISED)


def module_base(model: Module, name: str = "model") -> Base:
    """Make a base of a torch module that denoises: a U-Net or a transformer, in its original or in diffusers' naming.

    The layers have the names that `open_base` gives them in a file of `model.state_dict()`.

    Args:
        model: The module; its weights are read when they are asked for. After they change, make a new base of it.
        name: What to call it.
    """
    modules = dict(model.named_modules())

    def read(layer: Layer) -> Tensor:
        module, rows = module_place(layer, modules)
        weight = modules[module].get_parameter("weight").detach()
        return in_our_order(weight if rows is None else weight[slice(*rows)], layer, module)

    return loaded_base(name, {key: tuple(value.shape) for key, value in model.named_parameters()}, {}, read)


def module_place(layer: Layer, modules: Container[str]) -> tuple[str, Rows | None]:
    """Return where a layer lies in a model with these modules: the module's path, and the rows where it is a part."""
    return (layer.original, layer.rows) if layer.original in modules else (layer.path, None)


def in_our_order(weight: Tensor, layer: Layer, module: str) -> Tensor:
    """Return the weight of a layer with its rows as the original has them, given the module that it was read from."""
    import torch

    return torch.cat(weight.chunk(2)[::-1]) if is_swapped(layer, module) else weight


def _recognise(tensors: Tensors, name: str) -> tuple[Family, str, dict[str, tuple[int, ...]]]:
    """Return the family, the prefix of its keys, and the shape of each module's weight."""
    if any(ADAPTER_KEY.search(key) for key in tensors):
        raise FormatError("an adapter where a base model is wanted", name, "give a checkpoint")
    prefixes: list[str] = []
    for prefix in PREFIXES:
        if shapes := _module_shapes(tensors, prefix):
            prefixes.append(prefix + _wrapper(shapes))
            shapes = _module_shapes(tensors, prefixes[-1])
            if family := recognise(shapes):
                return family, prefixes[-1], shapes
    prefix = next((prefix for prefix in prefixes if prefix.startswith(PREFIXES[:2])), (prefixes or [""])[-1])
    shapes = _module_shapes(tensors, prefix)
    if not any(layer.block for layer in UNKNOWN.layers(shapes)):
        got = f"{name} with keys such as {', '.join(list(tensors)[:2]) or '(none)'}"
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
    names = {(layer.original, layer.rows): layer.name for layer in cut}
    return cut, {path: [names[target]] for path, target in spellings.items() if target in names}


def _module_shapes(tensors: Tensors, prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        key.removeprefix(prefix).removesuffix(".weight"): tensor.entry.shape
        for key, tensor in tensors.items()
        if key.startswith(prefix) and key.endswith(".weight")
    }


def _sizes(tensors: Tensors, prefix: str) -> dict[str, int]:
    return {
        key.removeprefix(prefix): tensor.entry.shape[0]
        for key, tensor in tensors.items()
        if key.startswith(prefix) and len(tensor.entry.shape) == 1
    }


def _text_layers(component: str, tensors: Tensors, prefixes: Iterable[str]) -> Iterable[tuple[Layer, Stored]]:
    """Yield the linear layers of a text encoder by their Hugging Face names, and where each lies."""
    for key, tensor in tensors.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        shape = tensor.entry.shape
        found = TEXT_LAYER.fullmatch(key.removeprefix(prefix)) if prefix is not None and len(shape) == 2 else None
        if found is None:
            continue
        clip, t5, block, part = found.groups()
        if clip:
            yield Layer(f"{component}.text_model.{clip}", shape), tensor
        elif t5:
            yield Layer(f"{component}.{t5}", shape), tensor
        elif part == "attn.in_proj_weight":
            width = shape[1]
            for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
                rows = (i * width, (i + 1) * width)
                layer = Layer(f"{component}.text_model.encoder.layers.{block}.self_attn.{name}", (width, width))
                yield layer, replace(tensor, rows=rows)
        elif part in OPENCLIP:
            yield Layer(f"{component}.text_model.encoder.layers.{block}.{OPENCLIP[part]}", shape), tensor
