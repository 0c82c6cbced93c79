"""The families of base models that are known, from `families.toml`, and their layers."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import FormatError
from .layers import Layer, LayerTable, reads_text
from .unet import UNetConfig, diffusers_to_ldm, ldm_to_diffusers


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A CLIP text encoder of a family: where it lies in a checkpoint, and how LoRA files call it."""

    component: str
    checkpoint: str
    naming: str
    kohya: str
    width: int
    depth: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the weight shape of each linear layer by its Hugging Face module path."""
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(self.depth):
            layer = f"text_model.encoder.layers.{i}"
            # k, v, q, out is the order in which transformers registers them; the indexed format counts by it.
            for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
                shapes[f"{layer}.self_attn.{part}"] = (self.width, self.width)
            shapes[f"{layer}.mlp.fc1"] = (4 * self.width, self.width)
            shapes[f"{layer}.mlp.fc2"] = (self.width, 4 * self.width)
        return shapes


@dataclass(frozen=True, slots=True)
class Family:
    """A family of base models that share their layer names, such as `sd1` or `sdxl`."""

    name: str
    label: str
    kohya_unet: str
    unet: UNetConfig
    text_encoders: tuple[TextEncoder, ...]

    def table(self) -> LayerTable:
        """Return the layers of the family's full-size model."""
        return _table(self)


@cache
def families() -> Mapping[str, Family]:
    """Return the known families by name, in the order of preference."""
    text = Path(__file__).with_name("families.toml").read_text(encoding="utf-8")
    found: dict[str, Family] = {}
    for name, entry in tomllib.loads(text).items():
        unet: dict[str, Any] = dict(entry["unet"])
        unet |= {key: tuple(unet[key]) for key in ("channel_mult", "transformer_depth")}
        encoders = tuple(TextEncoder(**encoder) for encoder in entry["text_encoders"])
        found[name] = Family(name, entry["label"], entry["kohya_unet"], UNetConfig(**unet), encoders)
    return found


def family_of(layers: Iterable[Layer], name: str) -> Family:
    """Return the family that a U-Net belongs to, told by the width of its text embedding.

    Args:
        layers: The layers of the U-Net.
        name: What to call it in the error.

    Raises:
        FormatError: No known family has this width; the kinds of layer that were seen are named.
    """
    layers = list(layers)
    widths = {layer.shape[1] for layer in layers if reads_text(layer.path)}
    for family in families().values():
        if widths == {family.unet.context_dim}:
            return family
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    raise FormatError(
        "no U-Net of a known family",
        f"{name} with text width {', '.join(map(str, sorted(widths))) or 'none'} and layers such as "
        + (", ".join(kinds[:4]) or "none"),
        f"known are {', '.join(f'{f.label} (width {f.unet.context_dim})' for f in families().values())}",
    )


@cache
def _table(family: Family) -> LayerTable:
    shapes = {
        key.removesuffix(".weight"): shape for key, shape in family.unet.parameters().items() if key.endswith(".weight")
    }
    layers = unet_layers(shapes)
    for encoder in family.text_encoders:
        layers += [Layer(f"{encoder.component}.{path}", shape) for path, shape in encoder.shapes().items()]
    return LayerTable(layers)


def unet_layers(shapes: Mapping[str, tuple[int, ...]]) -> list[Layer]:
    """Return the linear and convolution layers of a U-Net in either naming.

    Args:
        shapes: Weight shape of every module of the U-Net, norms included, by module path (diffusers or LDM).

    Returns:
        The layers, in the order of `shapes`. A module that fits no naming rule keeps its own path.
    """
    is_ldm = "input_blocks.0.0" in shapes
    other = ldm_to_diffusers(shapes) if is_ldm else diffusers_to_ldm(shapes)
    layers: list[Layer] = []
    for path, shape in shapes.items():
        if len(shape) in (2, 4):
            name, ldm = (other.get(path, path), path) if is_ldm else (path, other.get(path, ""))
            layers.append(Layer(f"unet.{name}", shape, ldm))
    return layers
