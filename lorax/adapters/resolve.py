"""Which layers the updates of an adapter file mean, and which family it was made for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import FormatError
from ..models.base import Base
from ..models.families import families
from ..models.family import Family
from ..models.layers import MAIN, Layer, flatten, is_swapped, reads_text
from .combine import total, with_halves_swapped
from .keys import ENCODER_KINDS, indexed_layers
from .layer import AdapterLayer, Shape, fits, magnitude_shape


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """An update as its file spells it: which layer it is of, only a base or a family tells.

    Attributes:
        component: What its key says: `unet` for the model that denoises, a text encoder or a kind of one.
        path: The module path as it is spelled.
        own: The update, on a layer of that name.
        shape: What its parts tell of the weight (see `AdapterLayer.shape_of`).
        naming: The naming of its key.
        keys: The keys of the file that hold it.
        parameter: `weight` or `bias` for the difference of a parameter of one dimension, else empty.
    """

    component: str
    path: str
    own: AdapterLayer
    shape: Shape
    naming: str = ""
    keys: tuple[str, ...] = ()
    parameter: str = ""

    @property
    def module(self) -> tuple[str, str, str]:
        """What its key says of the layer: component, path and naming."""
        return self.component, self.path, self.naming


@dataclass(slots=True)
class Placed:
    """Updates on the layers that they mean.

    Attributes:
        families: The families that the adapter may be of, by whose names the layers are called.
        layers: The update of each layer, by layer name.
        origins: The updates of the file that each of `layers` is (or is a part of) the sum of.
        refused: What found no place, and why.
    """

    families: tuple[Family, ...]
    layers: dict[str, AdapterLayer] = field(default_factory=dict[str, AdapterLayer])
    origins: dict[AdapterLayer, tuple[Update, ...]] = field(default_factory=dict[AdapterLayer, tuple[Update, ...]])
    refused: list[tuple[Update, FormatError]] = field(default_factory=list[tuple[Update, FormatError]])

    @property
    def family(self) -> Family | None:
        """The family, where it is told."""
        return self.families[0] if len(self.families) == 1 else None

    @property
    def alternatives(self) -> tuple[Family, ...]:
        """The families that it may be of, where it is not told."""
        return self.families if len(self.families) > 1 else ()


def place(updates: Sequence[Update], base: Base | None, told: tuple[Family, ...]) -> Placed:
    """Give every update the layer that it means: by the names of its base, else by those of its family.

    What nothing is known of, and what several possible families call differently, keeps the name of its file.

    Args:
        updates: The updates of one adapter.
        base: The base that it was made for, if at hand.
        told: The families that it may be of, as far as it tells (see `families_of`).
    """
    if base is not None and _is_of(updates, base, told):
        told = (base.family,)
    placed = Placed(told)
    reach: dict[str, set[str]] = {}  # of each layer, all layers of the updates that it has
    for update in updates:
        try:
            found = _vector(update, base, told) if update.parameter else _matrix(update, base, told)
            names = {own.layer.name for own in found}
            # As in ComfyUI those of a fused weight and of its part add up; of two for the same weight one counts.
            if twice := next((name for name in names if reach.get(name) == names), ""):
                got = f"another key of the file means the same layer, {twice}"
                raise FormatError("two updates for one layer", got, "use a sound copy")
            found = [
                total(placed.layers[own.layer.name], own) if own.layer.name in placed.layers else own for own in found
            ]
        except FormatError as error:
            placed.refused.append((update, error))
            continue
        for own in found:
            name = own.layer.name
            before = placed.origins.pop(placed.layers[name]) if name in placed.layers else ()
            placed.layers[name] = own
            placed.origins[own] = (*before, update)
            reach[name] = names
    return placed


def families_of(updates: Iterable[Update]) -> tuple[Family, ...]:
    """Return the families that names and sizes of updates fit, the more the better; none if they fit none.

    Several are left where the file does not tell: FLUX.1 and Chroma call most of their layers alike.
    """
    updates = [update for update in updates if not update.parameter]
    if widths := text_widths(updates):
        return tuple(f for f in families().values() if widths == {f.text_width})
    found = {family: _fitted(updates, family) for family in families().values()}
    if not any(found.values()):
        return ()

    def fitting(family: Family) -> int:
        return len(found[family])

    def as_deep(family: Family) -> int:
        return family.as_deep(layer for _, layers in found[family] for layer in layers)

    def spelled(family: Family) -> int:
        return sum(_is_spelled(update, layers[0], family) for update, layers in found[family])

    left = list(found)
    for evidence in (fitting, as_deep, spelled):
        values = [evidence(family) for family in left]
        left = [family for family, value in zip(left, values, strict=True) if value == max(values)]
    return tuple(left)


def text_widths(updates: Iterable[Update]) -> set[int]:
    """Return the widths of the text that the cross-attention of a U-Net reads, by which its family is told."""
    return {update.shape[1] for update in updates if len(update.shape) > 1 and reads_text(update.path)}


def _is_of(updates: Sequence[Update], base: Base, told: tuple[Family, ...]) -> bool:
    """Return whether updates are of the family of a base rather than of those that they tell without it."""
    if text_widths(updates):
        return base.family in told
    return _fitting(updates, base.family, base) >= max((_fitting(updates, family) for family in told), default=0)


def _fitted(updates: Iterable[Update], family: Family) -> list[tuple[Update, list[Layer]]]:
    """Return the updates that can be of layers of a family, with these."""
    # Without its naming: that the first text encoder of kohya is a family's second is told by the rest of a file.
    found = (
        (u, _meant(u.component, u.path, "" if u.naming == "kohya" else u.naming, u.shape, family)) for u in updates
    )
    return [
        (update, layers)
        for update, layers in found
        if _whole_fits(layers, update.shape) and family.is_proportional(layers, update.shape)
    ]


def _fitting(updates: Iterable[Update], family: Family, base: Base | None = None) -> int:
    """Return how many updates can be of layers of a base or, where it lacks them, of its family."""
    updates = [update for update in updates if not update.parameter]
    rest = [u for u in updates if base is None or not _whole_fits(_found(*u.module, base, (), u.shape), u.shape)]
    return len(updates) - len(rest) + len(_fitted(rest, family))


def _is_spelled(update: Update, layer: Layer, family: Family) -> bool:
    """Return whether programs that write files in this naming for this family call the layer so."""
    if update.naming == "kohya" and not layer.is_main:
        encoder = next(e for e in family.text_encoders if e.component == layer.component)
        return all(key.startswith(f"{encoder.kohya}_") for key in update.keys)
    original = update.naming == "original" or (update.naming == "kohya" and family.kohya == "original")
    path = flatten((original and layer.original) or layer.path)
    return path in (flatten(update.path), flatten(update.path) + "_0")


def names_of(component: str, path: str, naming: str, base: Base | None, told: tuple[Family, ...]) -> list[str]:
    """Return the names of the layers that a module of a file means; where nothing is known of it, its own.

    Args:
        component: What its key says (see `Update`).
        path: The module path as it is spelled.
        naming: The naming of its key.
        base: The base, if at hand.
        told: The families that the adapter may be of.
    """
    vector = base.vectors.find(_component(component, naming, base.family), path) if base is not None else []
    found = vector or _found(component, path, naming, base, told, ())
    return [layer.name for layer in found] or [_own_name(component, path, told)]


def _own_name(component: str, path: str, told: tuple[Family, ...]) -> str:
    """Return the name of a module that nothing is known of."""
    return f"{_component(component, '', told[0] if len({f.component for f in told}) == 1 else None)}.{path}"


def _found(
    component: str, path: str, naming: str, base: Base | None, told: tuple[Family, ...], shape: Shape
) -> list[Layer]:
    """Return the layers that a module means: in its base, else as all families agree that it may be of."""
    found = base.layers.find(_component(component, naming, base.family), path) if base is not None else []
    return found or _agreed([_meant(component, path, naming, shape, family) for family in told])


def _meant(component: str, path: str, naming: str, shape: Shape, family: Family) -> list[Layer]:
    """Return the layers of a family that a module means, in row order."""
    component = _component(component, naming, family)
    if naming != "indexed" or not path.isdecimal():
        return family.find(component, path, shape)
    order = indexed_layers(family, component)
    return order[int(path) : int(path) + 1]


def _component(component: str, naming: str, family: Family | None) -> str:
    """Return the component of a family that a key in this naming calls `component`."""
    encoders = family.text_encoders if family is not None else ()
    if component in ENCODER_KINDS:
        default = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
        return next((e.component for e in encoders if e.kind == component), default.get(component, "text_encoder"))
    if naming == "kohya" and component == "text_encoder":  # its first one is the second of HunyuanVideo
        return next((e.component for e in encoders if e.kohya in ("lora_te", "lora_te1")), component)
    return family.component if component in MAIN and family is not None else component


def _whole_fits(layers: list[Layer], shape: Shape) -> bool:
    """Return whether these layers, stacked by rows, can be a weight of this shape."""
    if not layers or not layers[0].shape:
        return bool(layers)
    rows = sum(layer.shape[0] for layer in layers)
    return fits((rows, *layers[0].shape[1:]), shape)


def _matrix(update: Update, base: Base | None, told: tuple[Family, ...]) -> list[AdapterLayer]:
    """Return the update of a matrix on its layer; on the parts of a fused one, where its kind can be cut."""
    found = _found(*update.module, base, told, update.shape)
    own, shape = update.own, update.own.layer.shape  # of the outputs alone a layer cannot be made
    if not found:
        return [replace(own, layer=replace(own.layer, name=_own_name(update.component, update.path, told)))]
    own = _in_our_order(update, found[0])
    if not _whole_fits(found, shape):
        whole = replace(found[0], shape=shape) if len(found) == 1 else whole_of(found, shape)
        return [_on(own, whole)]
    if len(found) == 1:
        return [_on(own, found[0] if found[0].shape else replace(found[0], shape=shape))]
    own = _on(own, whole_of(found, shape))
    return [*(own.cut(found) or [own])]


def _agreed(options: list[list[Layer]]) -> list[Layer]:
    """Return the layers that all families mean that know the module; without the original name if only that differs."""
    options = [layers for layers in options if layers]
    first = options[0] if options else []
    if all(layers == first for layers in options):
        return first
    alone = all(len(layers) == 1 and layers[0].rows is None for layers in options)
    named = [replace(layers[0], original="") for layers in options] if alone else []
    return named[:1] if len(set(named)) == 1 else []


def _in_our_order(update: Update, layer: Layer) -> AdapterLayer:
    """Return an update with shift and scale in the order of its layer, where its file has them in the other."""
    path = f"{update.path}.{update.parameter}" if update.parameter else update.path
    is_other = is_swapped(layer, path) and not update.own.layer.swapped  # what a transfer made has our order
    return with_halves_swapped(update.own) if is_other else update.own


def _on(own: AdapterLayer, layer: Layer) -> AdapterLayer:
    """Return an update on a layer.

    Raises:
        FormatError: It cannot be of a layer of this size.
    """
    own.check(layer, {name: tuple(part.shape) for name, part in own.parts().items()})
    changes: dict[str, Any] = {"layer": layer}
    scale = own.parts().get("dora_scale")
    if scale is not None and layer.shape:
        changes["dora_scale"] = scale.reshape(magnitude_shape(tuple(scale.shape), layer.shape) or scale.shape)
    return replace(own, **changes)


def whole_of(parts: list[Layer], shape: Shape) -> Layer:
    """Return the fused weight as a layer of its own, for an update that cannot be cut and may not tell its shape."""
    if not shape and all(part.shape for part in parts):
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Layer(f"{parts[0].component}.{parts[0].original}", shape, parts[0].original)


def _vector(update: Update, base: Base | None, told: tuple[Family, ...]) -> list[AdapterLayer]:
    """Return the difference of a parameter of one dimension on it."""
    for path in (f"{update.path}.{update.parameter}", update.path):
        if base is not None and (
            found := base.vectors.find(_component(update.component, update.naming, base.family), path)
        ):
            return [replace(_in_our_order(update, found[0]), layer=replace(found[0], shape=update.shape))]
    owners = _agreed([family.find(_component(update.component, update.naming, family), update.path) for family in told])
    if not owners:
        name = f"{_own_name(update.component, update.path, told)}.{update.parameter}"
        return [replace(update.own, layer=replace(update.own.layer, name=name))]
    owner = owners[0] if len(owners) == 1 else whole_of(owners, ())
    original = f"{owner.original or owner.path}.{update.parameter}"
    layer = Layer(f"{owner.name}.{update.parameter}", update.shape, original, swapped=owner.swapped)
    return [replace(_in_our_order(update, layer), layer=layer)]
