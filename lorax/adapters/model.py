"""An adapter in memory: an update for each layer, of any kind."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..base import Base
from ..engine import CPU, Engine
from ..errors import MismatchError
from ..families import Family
from ..layers import reads_text
from ..linalg import refactor
from .diff import VectorLayer
from .layer import AdapterLayer, check_finite
from .lora import LoraLayer as LoraLayer
from .lora_x import LoraXLayer as LoraXLayer
from .resolve import whole_of


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Adapter:
    """An adapter: its layers by name, and what its file held beyond them.

    Attributes:
        name: What to call it, such as its file name.
        family: The family of its base, or None where it is unknown.
        naming: How its file spells the layers: `kohya`, `onetrainer`, `simpletuner`, `diffusers`,
            `original`, `peft`, `indexed` or `lora-x`.
        layers: The update of each layer, by layer name.
        unused: What else was in the file, key -> why it is not used.
        metadata: The file's own metadata.
        spellings: Module path of each layer as the file spells it, by layer name.
        unread: Layers (as the file spells them where they are not known) with an update in the file that is not used
            -> why. What is no update of a layer, such as a textual-inversion vector, is in `unused` only.
    """

    name: str
    family: Family | None
    naming: str
    layers: Mapping[str, AdapterLayer]
    unused: Mapping[str, str] = field(default_factory=dict[str, str])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    spellings: Mapping[str, str] = field(default_factory=dict[str, str])
    unread: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def kind(self) -> str:
        """The kind of its layers (see `AdapterLayer.kind`), or `mixed`; differences of vectors go with any."""
        kinds = {layer.kind for layer in self.layers.values()}
        kinds = kinds - {"vector"} or kinds
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def ranks(self) -> Counter[int]:
        """How many layers have each rank."""
        return Counter(layer.rank for layer in self.layers.values())

    def resolved(self, base: Base) -> "Adapter":
        """Return the adapter with its layers named as its own base names them.

        A file that was read without its base was named by the full-size model of its family, whose blocks may be
        numbered otherwise; what counts is the spelling in the file.

        Raises:
            MismatchError: The adapter is of another family: its cross-attention reads another text width.
        """
        widths = {
            own.layer.matrix_shape[1]
            for own in self.layers.values()
            if not isinstance(own, LoraXLayer) and len(own.layer.shape) > 1 and reads_text(own.layer.path)
        }
        if base.family.unet is not None and widths - {base.family.unet.context_dim}:
            made_for = self.family.label if self.family else f"a family of text width {min(widths)}"
            raise MismatchError(
                "the adapter and the base model are of different families",
                f"{self.name} (made for {made_for}) and {base.name} ({base.family.label})",
                "give the base that it was made for (are source and target swapped?)",
            )
        layers: dict[str, AdapterLayer] = {}
        unused, unread = dict(self.unused), dict(self.unread)
        for name, own in self.layers.items():
            for placed in _placed(own, self.spellings.get(name, own.layer.path), base):
                if placed.layer.name in layers:
                    unused[name] = unread[name] = f"another layer of the adapter means the same, {placed.layer.name}"
                layers.setdefault(placed.layer.name, placed)
        return replace(self, layers=layers, unused=unused, spellings={}, unread=unread)


def _placed(own: AdapterLayer, spelling: str, base: Base) -> list[AdapterLayer]:
    """Return a layer named as a base names it; the parts of a fused weight that was not cut yet, where it can be."""
    table = base.vectors if isinstance(own, VectorLayer) else base.layers
    found = table.find(own.layer.component, spelling)
    if len(found) > 1:
        found = [layer for layer in found if layer.name == own.layer.name] or found
    if len(found) > 1:
        whole = replace(own, layer=whole_of(found, own.layer.shape))
        rows = sum(layer.shape[0] for layer in found)
        return [*((own.cut(found) if whole.layer.shape[:1] == (rows,) else None) or [whole])]
    if not found:
        return [own]
    return [replace(own, layer=replace(found[0], shape=own.layer.shape or found[0].shape))]


def expand(
    layer: AdapterLayer, source: Base | None, engine: Engine = CPU, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the update of any adapter layer as factors `B [m, k]`, `A [k, n]`, float32 on the device.

    Args:
        layer: The adapter layer.
        source: The base that it was made for; needed where the update depends on the weight, as of a LoRA-X or DoRA.
        engine: How and where to compute.
        rank: Of the factors of an update that is not thin, its leading singular triplets; None keeps all of it.

    Raises:
        MismatchError: A layer that needs its own source base without it.
        NumericsError: The update grows beyond what float32 holds.
    """
    name = layer.layer.name
    if layer.is_thin:
        B, A = layer.factors(engine.device)
        check_finite(B, name)
        check_finite(A, name)
        return B, A
    if isinstance(layer, LoraXLayer) and source is not None and name in source.layers:
        layer.check_source(source)
        return layer.expanded(engine.triplets(source, name, layer.rank))
    weight = None
    if layer.needs_weight:
        weight = source.fused_weight(layer.layer, engine.device) if source is not None else None
        if source is None or weight is None:
            got = f"{name} ({layer.kind}) without it"
            raise MismatchError("a layer of this kind needs its source base", got, "give the source base")
    update = layer.delta_weight(weight).to(engine.device)
    check_finite(update, name)
    return refactor(update, rank or min(update.shape))
