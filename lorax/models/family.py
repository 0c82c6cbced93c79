"""What is known of a family of base models, and what its layers are called: what all families have in common."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .layers import Layer, LayerTable

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A text encoder of a family: where it lies in a checkpoint, and how LoRA files call it.

    Attributes:
        component: Its folder in a diffusers pipeline, such as `text_encoder_2`.
        kind: `clip_l`, `clip_g`, `clip_h` or `t5xxl`, as ComfyUI calls them.
        checkpoint: The prefixes that its keys have in single-file checkpoints.
        kohya: The prefix that its modules have in LoRA files in kohya naming.
        depth: Layers of the full-size model.
        width: Its width.
        inner: Inner width of its feed-forward.
    """

    component: str
    kind: str
    checkpoint: tuple[str, ...]
    kohya: str
    depth: int
    width: int
    inner: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the weight shape of each linear layer by its Hugging Face module path."""
        wide, up, down = (self.width, self.width), (self.inner, self.width), (self.width, self.inner)
        if self.kind == "t5xxl":
            parts = {f"0.SelfAttention.{part}": wide for part in "qkvo"}
            parts |= {"1.DenseReluDense.wi_0": up, "1.DenseReluDense.wi_1": up, "1.DenseReluDense.wo": down}
            layer = "encoder.block.{}.layer."
        else:
            # k, v, q, out is the order in which transformers registers them; the indexed format counts by it.
            parts = {f"self_attn.{part}_proj": wide for part in ("k", "v", "q", "out")}
            parts |= {"mlp.fc1": up, "mlp.fc2": down}
            layer = "text_model.encoder.layers.{}."
        return {layer.format(i) + part: shape for i in range(self.depth) for part, shape in parts.items()}


@dataclass(frozen=True, slots=True)
class Variant:
    """A named member of a family, told by its numbers of blocks, its width and modules that it has."""

    label: str
    blocks: Mapping[str, int] = field(default_factory=dict[str, int])
    width: int = 0
    has: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Family(ABC):
    """A family of base models that share their layer names, such as `sd1` or `flux`.

    Where a method is not abstract, it holds for families without fused weights, aliases and numbers of blocks.

    Attributes:
        name: The name of its table.
        label: What people call it.
        component: `unet` or `transformer`.
        kohya: The naming that kohya's scripts flatten in LoRA files: `original` or `diffusers`.
        has: Modules, in the original naming, that its models have.
        lacks: Modules that they do not have.
        variants: Named members.
        text_encoders: Its text encoders.
    """

    name: str
    label: str
    component: str
    kohya: str
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    text_encoders: tuple[TextEncoder, ...] = ()

    @property
    def text_width(self) -> int:
        """The width of the text that the cross-attention of every member reads; 0 where that tells no family."""
        return 0

    @cached_property
    def table(self) -> LayerTable:
        """The layers of the full-size model: those of the text encoders and, for a U-Net, all."""
        layers = self._full_size()
        for encoder in self.text_encoders:
            layers += [Layer(f"{encoder.component}.{path}", shape) for path, shape in encoder.shapes().items()]
        return LayerTable(layers)

    @abstractmethod
    def layers(self, shapes: Shapes) -> list[Layer]:
        """Return the linear and convolution layers of a model that denoises, fused weights cut into their parts.

        Args:
            shapes: Weight shape of every module, norms included, by module path, original or diffusers.

        Returns:
            The layers, in the order of `shapes`. A module that fits no rule keeps its own path.
        """

    @abstractmethod
    def fits(self, shapes: Shapes) -> bool:
        """Return whether a model with these modules (in either naming) is of this family.

        Args:
            shapes: Weight shape of every module, norms included, by module path, original or diffusers.
        """

    def vectors(self, sizes: Mapping[str, int], layers: Iterable[Layer]) -> list[Layer]:
        """Return norms and biases as layers of one dimension, `unet.mid_block.resnets.0.norm1.weight`.

        Args:
            sizes: Size of every parameter of one dimension, by its name in the model.
            layers: The layers of the same model, whose blocks the parameters lie in.
        """
        layers = list(layers)
        originals, paths = self._namings(layers, {key.rpartition(".")[0] for key in sizes})
        halves = {layer.path for layer in layers if layer.swapped}
        blocks = {_block(layer.original): layer.block for layer in layers if layer.block and layer.original}
        found: list[Layer] = []
        for key, size in sizes.items():
            module, _, parameter = key.rpartition(".")
            block = blocks.get(_block(module))
            path = originals.get(module) or (block and block.partition(".")[2] + module.removeprefix(_block(module)))
            original = module if path else paths.get(module, "")
            name, swapped = f"{self.component}.{path or module}.{parameter}", (path or module) in halves
            found.append(Layer(name, (size,), f"{original or module}.{parameter}", swapped=swapped))
        return found

    def find(self, component: str, path: str, shape: tuple[int, ...] = ()) -> list[Layer]:
        """Return the layers that a module path of an adapter file means, as far as the names tell without a base.

        Args:
            component: A text encoder, or `unet` or `transformer`, which both mean the model that denoises.
            path: Dotted or flattened, original or diffusers.
            shape: Shape of the update, by which a fused one is cut.

        Returns:
            No layer, one, or the parts of a fused weight in row order.
        """
        return self.table.find(component, path)

    def as_deep(self, layers: Iterable[Layer]) -> int:
        """Return how well the numbers of the blocks of some layers go with the members of the family.

        Returns:
            2 where a member ends with the last of these blocks, 1 where one has them all or nothing tells, 0 where none
            has.
        """
        return 1

    def is_proportional(self, layers: Sequence[Layer], shape: tuple[int, ...]) -> bool:
        """Return whether a weight of this shape, that of these layers together, has the proportions of the family's."""
        return True

    def part_rows(self, original: str, parts: Shapes) -> dict[str, tuple[int, int]]:
        """Return the rows of all parts of a fused weight, as far as the shapes of some tell.

        Args:
            original: The original path of the weight.
            parts: Shape of the parts that are known, by diffusers path.

        Returns:
            The rows by diffusers path, in their order; none where a size is not told.
        """
        return {}

    def spellings(self, layers: Iterable[Layer]) -> dict[str, list[str]]:
        """Return for each alias in a model with these layers the names of the layers that it means, in row order."""
        return {}

    def variant(self, layers: Iterable[Layer]) -> str:
        """Return the label of the member that has these layers, else that of the family."""
        layers = [layer for layer in layers if layer.is_main]
        names = [layer.path for layer in layers]
        originals = {layer.original for layer in layers}
        widths = {layer.shape[1] for layer in layers if layer.original == self.has[0]} if self.has else set[int]()
        for variant in self.variants:
            counted = {container: _count(names, container) for container in variant.blocks}
            right = counted == dict(variant.blocks) and originals.issuperset(variant.has)
            if right and (not variant.width or variant.width in widths):
                return variant.label
        return self.label

    def _full_size(self) -> list[Layer]:
        """Return the layers of the full-size model that denoises, where they are known."""
        return []

    def _namings(self, layers: Sequence[Layer], modules: set[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Return the diffusers paths by original path, and the original paths by diffusers path, of a model's modules.

        Args:
            layers: The layers of the model.
            modules: Its modules with a parameter of one dimension.
        """
        return {layer.original: layer.path for layer in layers}, {layer.path: layer.original for layer in layers}


def _count(names: Iterable[str], container: str) -> int:
    """Return how many numbered blocks there are of a container."""
    numbered = re.compile(rf"(.*\.)?{container}\.\d+(?=\.)")
    return len({found.group() for name in names if (found := numbered.match(name))})


def _block(path: str) -> str:
    """Return the block of an original path, without a component."""
    return Layer(f"x.{path}", ()).block.partition(".")[2]
