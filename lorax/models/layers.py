"""What a layer is, and how its many spellings are found."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

# The rows `[start, stop)` of a weight.
Rows = tuple[int, int]
# What adapter files call the model that denoises, whichever of the two it is.
MAIN = ("unet", "transformer")
CONTAINERS = {
    "down_blocks", "mid_block", "up_blocks", "attentions", "resnets", "transformer_blocks", "blocks",
    "text_model", "encoder", "layers", "block",
}  # fmt: skip
# What some programs put around a module path, once more or more than once; a path is tried as it is first.
NESTED = re.compile(r"(?:(?:base_model|pipe|dit|net|model|diffusion_model|transformer|unet)\.)+")
# The projections that diffusers' models fuse when they are asked to (`fuse_qkv_projections`) -> those of which.
FUSED_PARTS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
FUSED = re.compile(rf"(.+)_({'|'.join(FUSED_PARTS)})")
# torch.compile, data parallel, checkpoints of activations; without its underscore only around a whole model.
WRAPPERS = re.compile(
    r"^(?:module\.|_orig_mod[._]|_fsdp_wrapped_module[._])+"
    r"|(?<![A-Za-z0-9])_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)[._]"
)
UNET_BLOCK = re.compile(r"(?:(?:down|up)_blocks\.\d+|mid_block)\.\w+\.\d+(?:\.transformer_blocks\.\d+)?(?=\.)")
TEXT_PROJECTION = re.compile(r"(?:.*_)?(?:(?:down|up|input|output)_blocks|mid_block|middle_block)_\w+_attn2_to_k")
FIRST_BLOCK = re.compile(r"(?:[A-Za-z_]\w*\.)+?\d+(?=\.)")
ATTENTION = re.compile(r"attn|attention|\bqkv\b", re.IGNORECASE)


def flatten(path: str) -> str:
    """Return a module path as LoRA files in kohya naming spell it: dots become underscores."""
    return path.replace(".", "_")


def unwrapped(path: str) -> str:
    """Return a key or module path without what wraps modules while they are trained; dotted or flattened."""
    return WRAPPERS.sub("", path)


def reads_text(path: str) -> bool:
    """Return whether a path, dotted or flattened, is the module of a U-Net that projects the text embedding."""
    return TEXT_PROJECTION.fullmatch(flatten(path)) is not None


def is_swapped(layer: "Layer", path: str) -> bool:
    """Return whether `path`, dotted or flattened, is a layer's name where its halves are in the other order."""
    return layer.swapped and flatten(path).endswith(flatten(layer.path))


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear or convolution layer of a base model.

    Attributes:
        name: Component and diffusers module path, such as `unet.mid_block.attentions.0.proj_in`; the original path
            where diffusers has no name for it.
        shape: Shape of the weight, `[out, in]` or `[out, in, kh, kw]`.
        original: Module path in the original naming, which ComfyUI keeps, without component; empty where there is none.
        rows: The rows of the original weight that are this layer, where several layers are stacked in one weight.
        swapped: Whether diffusers has the two halves of its rows (shift and scale) in the other order. Ours is the
            original one.
    """

    name: str
    shape: tuple[int, ...]
    original: str = ""
    rows: Rows | None = None
    swapped: bool = False

    @property
    def component(self) -> str:
        """`unet`, `transformer`, `text_encoder`, `text_encoder_2` or `text_encoder_3`."""
        return self.name.partition(".")[0]

    @property
    def is_main(self) -> bool:
        """Whether this is a layer of the model that denoises, and not of a text encoder."""
        return self.component in MAIN

    @property
    def path(self) -> str:
        """The name without the component."""
        return self.name.partition(".")[2]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """`(m, n)`: outputs and inputs, a convolution `[out, in, kh, kw]` counted as `[out, in*kh*kw]`."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def block(self) -> str:
        """The name up to the number of its block, `unet.up_blocks.0.attentions.1.transformer_blocks.3`; empty: none."""
        path = self.path
        found = UNET_BLOCK.match(path) or FIRST_BLOCK.match(path)
        return f"{self.component}.{found.group()}" if found else ""

    @property
    def role(self) -> str:
        """The name within its block, such as `attn1.to_out.0`; layers of one role do the same job."""
        return self.name.removeprefix(self.block + ".") if self.block else self.name

    @property
    def kind(self) -> str:
        """The role without numbers, such as `attn1.to_out` or `ff.net.proj`; same kinds can be compared."""
        return ".".join(part for part in self.path.split(".") if not part.isdigit() and part not in CONTAINERS)

    @property
    def is_attention(self) -> bool:
        """Whether this is a projection of an attention module (where LoRA-X adapters live)."""
        return ATTENTION.search(self.kind) is not None


class LayerTable(Mapping[str, Layer]):
    """Layers by name, also found by any other spelling.

    Args:
        layers: The layers, in the order of the model.
        spellings: More spellings of main layers: any module path -> names of the layers that it means, in row order.
    """

    def __init__(self, layers: Iterable[Layer], spellings: Mapping[str, list[str]] | None = None) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self.components = list(dict.fromkeys(layer.component for layer in self._layers.values()))
        paths: dict[tuple[str, str], list[Layer]] = {}
        originals: dict[tuple[str, str], list[Layer]] = {}
        for layer in sorted(self._layers.values(), key=lambda layer: layer.rows or (0, 0)):
            component = "" if layer.is_main else layer.component
            paths[component, flatten(layer.path)] = [layer]
            if layer.path.endswith("to_out.0"):
                paths[component, flatten(layer.path.removesuffix(".0"))] = [layer]
            if layer.original:
                originals.setdefault((component, flatten(layer.original)), []).append(layer)
        more = {
            ("", flatten(path)): [self._layers[name] for name in names] for path, names in (spellings or {}).items()
        }
        self._spellings = more | originals | paths

    def __getitem__(self, name: str) -> Layer:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def parts_of(self, layer: Layer) -> list[Layer]:
        """Return what a layer is here: itself, the parts of a fused weight in row order, or nothing.

        A layer of another table that stands for a whole fused weight has the original name of it.
        """
        if layer.name in self._layers:
            return [self._layers[layer.name]]
        return self.find(layer.component, layer.original) if layer.original else []

    def find(self, component: str, path: str) -> list[Layer]:
        """Return the layers that `path` (dotted or flattened, diffusers or original) names.

        Args:
            component: A text encoder, or `unet` or `transformer`, which both mean the model that denoises.
            path: The module path without component.

        Returns:
            No layer, one, or the parts of a fused weight in row order.
        """
        component = "" if component in MAIN else component
        found = self._spellings.get((component, flatten(path)), [])
        if not found and (fused := FUSED.fullmatch(flatten(path))):
            parts = [self._spellings.get((component, f"{fused[1]}_{part}")) for part in FUSED_PARTS[fused[2]]]
            found = [layers[0] for layers in parts if layers] if all(parts) else []
        nested = None if found else NESTED.match(path)
        return self.find(component, path[nested.end() :]) if nested else found
