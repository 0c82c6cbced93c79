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
from .resolve import Origins, SpelledUpdate, names_of, resolve, text_widths


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
    origins: Mapping[AdapterLayer, Origins] = field(default_factory=dict[AdapterLayer, Origins])
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
        resolved = resolve(updates, base, self.families)
        unused, unread = dict(self.unused), dict[str, str]()
        for name, why in self.unread.items():
            component, _, path = name.partition(".")
            unread |= dict.fromkeys(names_of(component, path, "", base, resolved.families), why)
        for spelled, error in resolved.refused:
            why = f"{error.what}: {error.got}"
            unused |= dict.fromkeys(spelled.keys or [spelled.update.layer.name], why)
            unread |= dict.fromkeys(names_of(*spelled.module, base, resolved.families), why)
        return replace(
            self,
            family=resolved.family,
            layers=resolved.layers,
            unused=unused,
            origins=resolved.origins,
            unread=unread,
            alternatives=resolved.alternatives,
        )

    def _updates(self) -> list[SpelledUpdate]:
        """Return the updates that the layers are made of: those of the file, as far as all their layers are there."""
        layers = set(self.layers.values())
        changed = {spelled for update, origin in self.origins.items() if update not in layers for spelled in origin}
        found: dict[SpelledUpdate, None] = {}
        for update in self.layers.values():
            origin = self.origins.get(update, ())
            is_read = origin and changed.isdisjoint(origin)
            found |= dict.fromkeys(origin if is_read else (_spelled(update),))
        return list(found)


def _spelled(update: AdapterLayer) -> SpelledUpdate:
    """Return a layer that was made in memory as an update: its name is its spelling."""
    path, parameter = update.layer.path, ""
    if isinstance(update, VectorLayer):
        path, _, parameter = path.rpartition(".")
    return SpelledUpdate(update.layer.component, path, update, update.layer.shape, parameter=parameter)


def expand(
    update: AdapterLayer, source: Base | None, engine: Engine = CPU, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the update of any adapter layer as factors `B [m, k]`, `A [k, n]`, float32 on the device.

    Args:
        update: The adapter layer.
        source: The base that it was made for; needed where the update depends on the weight, as of a LoRA-X or DoRA.
        engine: How and where to compute.
        rank: Of the factors of an update that is not thin, its leading singular triplets; None keeps all of it.

    Raises:
        MismatchError: A layer that needs its own source base without it.
        NumericsError: The update grows beyond what float32 holds.
    """
    name = update.layer.name
    if update.is_thin:
        B, A = update.factors(engine.device)
        check_finite(B, name)
        check_finite(A, name)
        return B, A
    if isinstance(update, LoraXLayer) and source is not None and name in source.layers:
        update.check_source(source)
        return update.factors_in(engine.triplets(source, name, update.rank))
    weight = None
    if update.needs_weight:
        weight = source.fused_weight(update.layer, engine.device) if source is not None else None
        if source is None or weight is None:
            got = f"{name} ({update.kind}) without it"
            raise MismatchError("a layer of this kind needs its source base", got, "give the source base")
    delta_weight = update.delta_weight(weight).to(engine.device)
    check_finite(delta_weight, name)
    return refactor(delta_weight, rank or min(delta_weight.shape))
