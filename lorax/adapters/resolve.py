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
class SpelledUpdate:
    """An update as its file spells it: which layer it is of, only a base or a family tells.

    Attributes:
        component: What its key says: `unet` for the model that denoises, a text encoder or a kind of one.
        path: The module path as it is spelled.
        update: The update, on a layer of that name.
        shape: What its parts tell of the weight (see `AdapterLayer.shape_of`).
        naming: The naming of its key.
        keys: The keys of the file that hold it.
        parameter: `weight` or `bias` for the difference of a parameter of one dimension, else empty.
    """

    component: str
    path: str
    update: AdapterLayer
    shape: Shape
    naming: str = ""
    keys: tuple[str, ...] = ()
    parameter: str = ""

    @property
    def module(self) -> tuple[str, str, str]:
        """What its key says of the layer: component, path and naming."""
        return self.component, self.path, self.naming


Origins = tuple[SpelledUpdate, ...]


@dataclass(slots=True)
class Resolved:
    """Updates on the layers that they mean.

    Attributes:
        families: The families that the adapter may be of, by whose names the layers are called.
        layers: The update of each layer, by layer name.
        origins: The updates of the file that each of `layers` is (or is a part of) the sum of.
        refused: What found no layer, and why.
    """

    families: tuple[Family, ...]
    layers: dict[str, AdapterLayer] = field(default_factory=dict[str, AdapterLayer])
    origins: dict[AdapterLayer, Origins] = field(default_factory=dict[AdapterLayer, Origins])
    refused: list[tuple[SpelledUpdate, FormatError]] = field(default_factory=list[tuple[SpelledUpdate, FormatError]])

    @property
    def family(self) -> Family | None:
        """The family, where it is told."""
        return self.families[0] if len(self.families) == 1 else None

    @property
    def alternatives(self) -> tuple[Family, ...]:
        """The families that it may be of, where it is not told."""
        return self.families if len(self.families) > 1 else ()


def resolve(updates: Sequence[SpelledUpdate], base: Base | None, told: tuple[Family, ...]) -> Resolved:
    """Give every update the layer that it means: by the names of its base, else by those of its family.

    What nothing is known of, and what several possible families call differently, keeps the name of its file.

    Args:
        updates: The updates of one adapter.
        base: The base that it was made for, if at hand.
        told: The families that it may be of, as far as it tells (see `families_of`).
    """
    if base is not None and _is_of(updates, base, told):
        told = (base.family,)
    resolved = Resolved(told)
    layers, origins = resolved.layers, resolved.origins
    reach: dict[str, set[str]] = {}  # of each layer, all layers of the updates that it has
    for spelled in updates:
        try:
            found = _vector(spelled, base, told) if spelled.parameter else _matrix(spelled, base, told)
            names = {update.layer.name for update in found}
            # As in ComfyUI those of a fused weight and of its part add up; of two for the same weight one counts.
            if twice := next((name for name in names if reach.get(name) == names), ""):
                got = f"another key of the file means the same layer, {twice}"
                raise FormatError("two updates for one layer", got, "use a sound copy")
            found = [total(layers[u.layer.name], u) if u.layer.name in layers else u for u in found]
        except FormatError as error:
            resolved.refused.append((spelled, error))
            continue
        for update in found:
            name = update.layer.name
            before = origins.pop(layers[name]) if name in layers else ()
            layers[name] = update
            origins[update] = (*before, spelled)
            reach[name] = names
    return resolved


def families_of(updates: Iterable[SpelledUpdate]) -> tuple[Family, ...]:
    """Return the families that names and sizes of updates fit, the more the better; none if they fit none.

    Several are left where the file does not tell: FLUX.1 and Chroma call most of their layers alike.
    """
    updates = [spelled for spelled in updates if not spelled.parameter]
    if widths := text_widths(updates):
        return tuple(f for f in families().values() if widths == {f.text_width})
    found = {family: _fitted(updates, family) for family in families().values()}
    if not any(found.values()):
        return ()

    def fitting(family: Family) -> int:
        return len(found[family])

    def as_deep(family: Family) -> int:
        return family.as_deep(layer for _, layers in found[family] for layer in layers)

    def as_spelled(family: Family) -> int:
        return sum(_is_spelled(spelled, layers[0], family) for spelled, layers in found[family])

    left = list(found)
    for evidence in (fitting, as_deep, as_spelled):
        values = [evidence(family) for family in left]
        left = [family for family, value in zip(left, values, strict=True) if value == max(values)]
    return tuple(left)


def text_widths(updates: Iterable[SpelledUpdate]) -> set[int]:
    """Return the widths of the text that the cross-attention of a U-Net reads, by which its family is told."""
    return {spelled.shape[1] for spelled in updates if len(spelled.shape) > 1 and reads_text(spelled.path)}


def _is_of(updates: Sequence[SpelledUpdate], base: Base, told: tuple[Family, ...]) -> bool:
    """Return whether updates are of the family of a base rather than of those that they tell without it."""
    if text_widths(updates):
        return base.family in told
    return _fitting(updates, base.family, base) >= max((_fitting(updates, family) for family in told), default=0)


def _fitted(updates: Iterable[SpelledUpdate], family: Family) -> list[tuple[SpelledUpdate, list[Layer]]]:
    """Return the updates that can be of layers of a family, with these."""
    # Without its naming: that the first text encoder of kohya is a family's second is told by the rest of a file.
    found = (
        (u, _meant(u.component, u.path, "" if u.naming == "kohya" else u.naming, u.shape, family)) for u in updates
    )
    return [
        (spelled, layers)
        for spelled, layers in found
        if _whole_fits(layers, spelled.shape) and family.is_proportional(layers, spelled.shape)
    ]


def _fitting(updates: Iterable[SpelledUpdate], family: Family, base: Base | None = None) -> int:
    """Return how many updates can be of layers of a base or, where it lacks them, of its family."""
    updates = [spelled for spelled in updates if not spelled.parameter]
    rest = [u for u in updates if base is None or not _whole_fits(_found(*u.module, base, (), u.shape), u.shape)]
    return len(updates) - len(rest) + len(_fitted(rest, family))


def _is_spelled(spelled: SpelledUpdate, layer: Layer, family: Family) -> bool:
    """Return whether programs that write files in this naming for this family call the layer so."""
    if spelled.naming == "kohya" and not layer.is_main:
        encoder = next(e for e in family.text_encoders if e.component == layer.component)
        return all(key.startswith(f"{encoder.kohya}_") for key in spelled.keys)
    original = spelled.naming == "original" or (spelled.naming == "kohya" and family.kohya == "original")
    path = flatten((original and layer.original) or layer.path)
    return path in (flatten(spelled.path), flatten(spelled.path) + "_0")


def names_of(component: str, path: str, naming: str, base: Base | None, told: tuple[Family, ...]) -> list[str]:
    """Return the names of the layers that a module of a file means; where nothing is known of it, its own.

    Args:
        component: What its key says (see `SpelledUpdate`).
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


def _matrix(spelled: SpelledUpdate, base: Base | None, told: tuple[Family, ...]) -> list[AdapterLayer]:
    """Return the update of a matrix on its layer; on the parts of a fused one, where its kind can be cut."""
    found = _found(*spelled.module, base, told, spelled.shape)
    update, shape = spelled.update, spelled.update.layer.shape  # of the outputs alone a layer cannot be made
    if not found:
        return [replace(update, layer=replace(update.layer, name=_own_name(spelled.component, spelled.path, told)))]
    update = _in_our_order(spelled, found[0])
    if not _whole_fits(found, shape):
        whole = replace(found[0], shape=shape) if len(found) == 1 else whole_of(found, shape)
        return [_on(update, whole)]
    if len(found) == 1:
        return [_on(update, found[0] if found[0].shape else replace(found[0], shape=shape))]
    update = _on(update, whole_of(found, shape))
    return [*(update.cut(found) or [update])]


def _agreed(options: list[list[Layer]]) -> list[Layer]:
    """Return the layers that all families mean that know the module; without the original name if only that differs."""
    options = [layers for layers in options if layers]
    first = options[0] if options else []
    if all(layers == first for layers in options):
        return first
    alone = all(len(layers) == 1 and layers[0].rows is None for layers in options)
    named = [replace(layers[0], original="") for layers in options] if alone else []
    return named[:1] if len(set(named)) == 1 else []


def _in_our_order(spelled: SpelledUpdate, layer: Layer) -> AdapterLayer:
    """Return an update with shift and scale in the order of its layer, where its file has them in the other."""
    path = f"{spelled.path}.{spelled.parameter}" if spelled.parameter else spelled.path
    is_other = is_swapped(layer, path) and not spelled.update.layer.swapped  # what a transfer made has our order
    return with_halves_swapped(spelled.update) if is_other else spelled.update


def _on(update: AdapterLayer, layer: Layer) -> AdapterLayer:
    """Return an update on a layer.

    Raises:
        FormatError: It cannot be of a layer of this size.
    """
    update.check(layer, {name: tuple(part.shape) for name, part in update.parts().items()})
    changes: dict[str, Any] = {"layer": layer}
    scale = update.parts().get("dora_scale")
    if scale is not None and layer.shape:
        changes["dora_scale"] = scale.reshape(magnitude_shape(tuple(scale.shape), layer.shape) or scale.shape)
    return replace(update, **changes)


def whole_of(parts: list[Layer], shape: Shape) -> Layer:
    """Return the fused weight as a layer of its own, for an update that cannot be cut and may not tell its shape."""
    if not shape and all(part.shape for part in parts):
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Layer(f"{parts[0].component}.{parts[0].original}", shape, parts[0].original)


def _vector(spelled: SpelledUpdate, base: Base | None, told: tuple[Family, ...]) -> list[AdapterLayer]:
    """Return the difference of a parameter of one dimension on it."""
    for path in (f"{spelled.path}.{spelled.parameter}", spelled.path):
        if base is not None and (
            found := base.vectors.find(_component(spelled.component, spelled.naming, base.family), path)
        ):
            return [replace(_in_our_order(spelled, found[0]), layer=replace(found[0], shape=spelled.shape))]
    component, naming = spelled.component, spelled.naming
    owners = _agreed([family.find(_component(component, naming, family), spelled.path) for family in told])
    if not owners:
        name = f"{_own_name(spelled.component, spelled.path, told)}.{spelled.parameter}"
        return [replace(spelled.update, layer=replace(spelled.update.layer, name=name))]
    owner = owners[0] if len(owners) == 1 else whole_of(owners, ())
    original = f"{owner.original or owner.path}.{spelled.parameter}"
    layer = Layer(f"{owner.name}.{spelled.parameter}", spelled.shape, original, swapped=owner.swapped)
    return [replace(_in_our_order(spelled, layer), layer=layer)]
