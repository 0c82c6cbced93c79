"""An adapter in memory: an update for each layer, of any kind."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..compute.engine import CPU, Engine
from ..errors import MismatchError
from ..linalg import refactor
from ..models.base import Base
from ..models.family import Family
from .diff import VectorLayer
from .layer import AdapterLayer, check_finite
from .lora_x import LoraXLayer
from .resolve import Update, names_of, place, text_widths


@dataclass(frozen=True, eq=False)
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
        origins: The updates as its file spells them that a layer as it was read is (or is a part of) the sum of. Those
            of a layer that was changed or taken out since do not count.
        unread: Layers (as the file spells them where they are not known) with an update in the file that is not used
            -> why. What is no update of a layer, such as a textual-inversion vector, is in `unused` only.
        alternatives: Where `family` is None because the file fits several: these; else none.
    """

    name: str
    family: Family | None
    naming: str
    layers: Mapping[str, AdapterLayer]
    unused: Mapping[str, str] = field(default_factory=dict[str, str])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    origins: Mapping[AdapterLayer, tuple[Update, ...]] = field(default_factory=dict[AdapterLayer, tuple[Update, ...]])
    unread: Mapping[str, str] = field(default_factory=dict[str, str])
    alternatives: tuple[Family, ...] = ()

    @property
    def families(self) -> tuple[Family, ...]:
        """The family or, where the file fits several, all of them; they call its layers alike."""
        return (self.family,) if self.family is not None else self.alternatives

    @property
    def family_label(self) -> str:
        """What people call its family, `FLUX.1 or Chroma` where the file does not tell; empty: unknown."""
        labels = [family.label for family in self.families]
        return " or ".join(filter(None, (", ".join(labels[:-1]), *labels[-1:])))

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

        A file that was read without its base was named by what the file tells, or by its own spelling; what counts is
        the file, so that this is what reading it with the base gives. A layer that is not as it was read counts as it
        is, and so do the others that are parts of the same update of the file.

        Raises:
            MismatchError: The adapter is of another family: its cross-attention reads another text width.
        """
        updates = self._updates()
        widths = text_widths(updates)
        if base.family.text_width and widths - {base.family.text_width}:
            made_for = self.family_label or f"a family of text width {min(widths)}"
            raise MismatchError(
                "the adapter and the base model are of different families",
                f"{self.name} (made for {made_for}) and {base.name} ({base.family.label})",
                "give the base that it was made for (are source and target swapped?)",
            )
        placed = place(updates, base, self.families)
        unused, unread = dict(self.unused), dict[str, str]()
        for name, why in self.unread.items():
            component, _, path = name.partition(".")
            unread |= dict.fromkeys(names_of(component, path, "", base, placed.families), why)
        for update, error in placed.refused:
            why = f"{error.what}: {error.got}"
            unused |= dict.fromkeys(update.keys or [update.own.layer.name], why)
            unread |= dict.fromkeys(names_of(*update.module, base, placed.families), why)
        return replace(
            self,
            family=placed.family,
            layers=placed.layers,
            unused=unused,
            origins=placed.origins,
            unread=unread,
            alternatives=placed.alternatives,
        )

    def _updates(self) -> list[Update]:
        """Return the updates that the layers are made of: those of the file, as far as all their layers are there."""
        layers = set(self.layers.values())
        changed = {update for own, origin in self.origins.items() if own not in layers for update in origin}
        found: dict[Update, None] = {}
        for own in self.layers.values():
            origin = self.origins.get(own, ())
            is_read = origin and changed.isdisjoint(origin)
            found |= dict.fromkeys(origin if is_read else (_update(own),))
        return list(found)


def _update(own: AdapterLayer) -> Update:
    """Return a layer that was made in memory as an update: its name is its spelling."""
    path, parameter = own.layer.path, ""
    if isinstance(own, VectorLayer):
        path, _, parameter = path.rpartition(".")
    return Update(own.layer.component, path, own, own.layer.shape, parameter=parameter)


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
        return layer.factors_in(engine.triplets(source, name, layer.rank))
    weight = None
    if layer.needs_weight:
        weight = source.fused_weight(layer.layer, engine.device) if source is not None else None
        if source is None or weight is None:
            got = f"{name} ({layer.kind}) without it"
            raise MismatchError("a layer of this kind needs its source base", got, "give the source base")
    update = layer.delta_weight(weight).to(engine.device)
    check_finite(update, name)
    return refactor(update, rank or min(update.shape))
