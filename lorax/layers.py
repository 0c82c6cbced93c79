"""What a layer is, and how its many spellings are found."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

CONTAINERS = {
    "down_blocks", "mid_block", "up_blocks", "attentions", "resnets", "transformer_blocks",
    "text_model", "encoder", "layers",
}  # fmt: skip


def flatten(path: str) -> str:
    """Return a module path as LoRA files in kohya naming spell it: dots become underscores."""
    return path.replace(".", "_")


def reads_text(path: str) -> bool:
    """Return whether a U-Net module, dotted or flattened, projects the text embedding; its width tells the family."""
    return flatten(path).endswith("attn2_to_k")


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear or convolution layer of a base model.

    Attributes:
        name: Component and diffusers module path, such as `unet.mid_block.attentions.0.proj_in`.
        shape: Shape of the weight, `[out, in]` or `[out, in, kh, kw]`.
        ldm: Module path in the original (LDM) naming, without component; empty where there is none.
    """

    name: str
    shape: tuple[int, ...]
    ldm: str = ""

    @property
    def component(self) -> str:
        """`unet`, `text_encoder` or `text_encoder_2`."""
        return self.name.partition(".")[0]

    @property
    def path(self) -> str:
        """The name without the component."""
        return self.name.partition(".")[2]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """`(m, n)`: outputs and inputs, a convolution `[out, in, kh, kw]` counted as `[out, in*kh*kw]`."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def kind(self) -> str:
        """The role within a block, such as `attn1.to_q`, `ff.net.proj` or `conv1`; same roles can be compared."""
        return ".".join(part for part in self.path.split(".") if not part.isdigit() and part not in CONTAINERS)

    @property
    def is_attention(self) -> bool:
        """Whether this is a projection of an attention module (where LoRA-X adapters live)."""
        return self.kind.startswith(("attn1.", "attn2.", "self_attn."))


class LayerTable(Mapping[str, Layer]):
    """Layers by name, also found by any other spelling.

    Args:
        layers: The layers, in the order of the model.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self.components = list(dict.fromkeys(layer.component for layer in self._layers.values()))
        self._spellings: dict[tuple[str, str], Layer] = {}
        for layer in self._layers.values():
            for path in filter(None, (layer.path, layer.ldm)):
                self._spellings[layer.component, flatten(path)] = layer
                if path.endswith("to_out.0"):
                    self._spellings[layer.component, flatten(path.removesuffix(".0"))] = layer

    def __getitem__(self, name: str) -> Layer:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def find(self, component: str, path: str) -> Layer | None:
        """Return the layer that `path` (dotted or flattened, diffusers or LDM) names, or None."""
        return self._spellings.get((component, flatten(path)))
