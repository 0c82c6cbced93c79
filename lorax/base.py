"""A base model: its layers, and their weights one at a time."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .errors import FormatError, NumericsError
from .families import Family, family_of, unet_layers
from .layers import Layer, LayerTable
from .tensorfile import TensorFile

UNET_PREFIXES = ("model.diffusion_model.", "")
SAMPLED_LAYERS = 8
OPENCLIP = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


@dataclass(frozen=True, slots=True)
class Base:
    """A base model whose weights are read one layer at a time.

    Attributes:
        name: What to call it in messages and reports, such as its file name.
        family: The family that it belongs to.
        layers: Its linear and convolution layers, by name.
        read: Returns the weight of a layer, `layer.shape`, any floating dtype.
        files: The files that it reads, which no output may replace.
        naming: How its file spells the U-Net: `ldm` or `diffusers`.
        dtypes: How many tensors are stored in each dtype.
        parameters: How many numbers they hold.
    """

    name: str
    family: Family
    layers: LayerTable
    read: Callable[[Layer], Tensor]
    files: list[Path] = field(default_factory=list[Path])
    naming: str = ""
    dtypes: Counter[str] = field(default_factory=Counter[str])
    parameters: int = 0

    def weight(self, name: str, device: str = "cpu") -> Tensor:
        """Return the weight of a layer as a float32 matrix `[m, n]` on `device`.

        Raises:
            NumericsError: It holds NaN or Inf.
            FileError: It cannot be read.
        """
        layer = self.layers[name]
        matrix = self.read(layer).to(device, torch.float32).reshape(layer.matrix_shape)
        if not bool(torch.isfinite(matrix).all()):
            raise NumericsError("a weight of a base holds NaN or Inf", f"{name} in {self.name}", "use a sound copy")
        return matrix

    def fingerprint(self, name: str) -> str:
        """Return 16 hex digits that name the content of a layer.

        They are the start of the SHA-256 of its shape and its values in float32. Storage in another dtype with the same
        values gives the same fingerprint.
        """
        matrix = self.weight(name).contiguous()
        digest = hashlib.sha256(repr(tuple(matrix.shape)).encode())
        digest.update(matrix.numpy().data)
        return digest.hexdigest()[:16]

    def identity(self) -> str:
        """Return a text that names the content of the base: the fingerprints of a sample of its layers.

        Two fine-tunes of one base differ in it unless all of the sampled layers are equal.
        """
        attention = [layer.name for layer in self.layers.values() if layer.is_attention and layer.component == "unet"]
        return " ".join(self.fingerprint(name) for name in attention[:: max(1, len(attention) // SAMPLED_LAYERS)])

    @property
    def components(self) -> list[str]:
        """`unet` and the text encoders that are there."""
        return self.layers.components


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a layer's weight lies: a key of a file, and the rows of it where several layers are fused."""

    file: TensorFile
    key: str
    rows: tuple[int, int] | None = None


def open_base(path: str | os.PathLike[str]) -> Base:
    """Open a base model without reading its weights.

    Args:
        path: A single-file checkpoint (`model.diffusion_model.*`), a U-Net file in LDM or diffusers naming, or the
            folder of a diffusers pipeline (its `unet`, `text_encoder` and `text_encoder_2`).

    Returns:
        The base, with the text encoders that the file or folder holds.

    Raises:
        FileError: A file is missing or damaged.
        FormatError: There is no U-Net of a known family in it.
    """
    path = Path(path)
    parts = _folder(path) if path.is_dir() else {"": TensorFile(path)}
    places: dict[str, _Place] = {}
    layers: list[Layer] = []
    unet = parts.get("unet") or parts.get("")
    if unet is None:
        raise FormatError("the folder holds no U-Net", str(path), "give a diffusers folder with unet/ in it, or a file")
    prefix = next(
        (p for p in UNET_PREFIXES if {p + "input_blocks.0.0.weight", p + "conv_in.weight"} & set(unet.entries)), None
    )
    if prefix is None:
        raise FormatError(
            "no U-Net of Stable Diffusion 1.x or XL in the file",
            f"{unet.path} with keys such as {', '.join(list(unet.entries)[:2]) or '(none)'}",
            "give a checkpoint or a U-Net file of these families",
        )
    found = unet_layers(_module_shapes(unet, prefix))
    naming = "ldm" if prefix + "input_blocks.0.0.weight" in unet.entries else "diffusers"
    family = family_of(found, str(unet.path))
    for layer in found:
        places[layer.name] = _Place(unet, f"{prefix}{layer.ldm if naming == 'ldm' else layer.path}.weight")
    layers += found
    for encoder in family.text_encoders:
        file, start = (parts[""], encoder.checkpoint) if "" in parts else (parts.get(encoder.component), "")
        if file is not None:
            for layer, place in _text_layers(encoder.component, file, start):
                layers.append(layer)
                places[layer.name] = place

    def read(layer: Layer) -> Tensor:
        place = places[layer.name]
        return place.file.tensor(place.key, place.rows)

    entries = [entry for file in parts.values() for entry in file.entries.values()]
    return Base(
        name=path.name,
        family=family,
        layers=LayerTable(layers),
        read=read,
        files=[file.path for file in parts.values()],
        naming=naming,
        dtypes=Counter(entry.dtype for entry in entries),
        parameters=sum(math.prod(entry.shape) for entry in entries),
    )


def loaded_base(
    name: str,
    unet: Mapping[str, tuple[int, ...]],
    text_encoders: Mapping[str, Mapping[str, tuple[int, ...]]],
    read: Callable[[Layer], Tensor],
) -> Base:
    """Make a base of a model that another program holds in memory.

    Args:
        name: What to call it.
        unet: Weight shape of every module of its U-Net, norms included, by module path (diffusers or LDM).
        text_encoders: For each text encoder (`text_encoder`, `text_encoder_2`) the same, by Hugging Face module path.
        read: Returns the weight of a layer, `layer.shape`, any floating dtype.

    Raises:
        FormatError: The U-Net is of no known family.
    """
    layers = unet_layers(unet)
    family = family_of(layers, name)
    for component, shapes in text_encoders.items():
        layers += [Layer(f"{component}.{path}", shape) for path, shape in shapes.items() if len(shape) == 2]
    return Base(name, family, LayerTable(layers), read)


def _folder(path: Path) -> dict[str, TensorFile]:
    parts: dict[str, TensorFile] = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        files = sorted((path / component).glob("*.safetensors"))
        # A folder often holds the same weights in full and in half precision; the full ones have the shorter name.
        if files:
            parts[component] = TensorFile(min(files, key=lambda file: len(file.name)))
    return parts


def _module_shapes(file: TensorFile, prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        key.removeprefix(prefix).removesuffix(".weight"): entry.shape
        for key, entry in file.entries.items()
        if key.startswith(prefix) and key.endswith(".weight")
    }


def _text_layers(component: str, file: TensorFile, prefix: str) -> Iterable[tuple[Layer, _Place]]:
    for key, entry in file.entries.items():
        module = key.removeprefix(prefix)
        if (module == key and prefix) or len(entry.shape) != 2:
            continue
        if module.startswith("text_model.encoder.layers.") and module.endswith(".weight"):
            yield Layer(f"{component}.{module.removesuffix('.weight')}", entry.shape), _Place(file, key)
        elif module.startswith("transformer.resblocks."):
            number, _, part = module.removeprefix("transformer.resblocks.").partition(".")
            layer = f"{component}.text_model.encoder.layers.{number}"
            if part == "attn.in_proj_weight":
                width = entry.shape[1]
                for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
                    rows = (i * width, (i + 1) * width)
                    yield Layer(f"{layer}.self_attn.{name}", (width, width)), _Place(file, key, rows)
            elif part.removesuffix(".weight") in OPENCLIP:
                yield Layer(f"{layer}.{OPENCLIP[part.removesuffix('.weight')]}", entry.shape), _Place(file, key)
