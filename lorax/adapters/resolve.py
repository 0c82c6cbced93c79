"""Which layers the modules of an adapter file mean, and which family it was made for."""

from collections.abc import Mapping
from dataclasses import replace

from ..base import Base
from ..families import Family, families
from ..layers import MAIN, Layer, LayerTable, flatten, reads_text
from .keys import ENCODER_KINDS, indexed_layers
from .layer import Shape, fits

# component and module path, as a key spells them
Module = tuple[str, str]
# Chroma's blocks have the names and sizes of those of FLUX.1, for which there are far more adapters.
PREFERRED = "flux"


def family_of(shapes: Mapping[Module, Shape], namings: Mapping[Module, str], base: Base | None) -> Family | None:
    """Return the family whose layers fit best by name and size; that of `base` where none fits better."""
    widths = {shape[1] for (_, path), shape in shapes.items() if len(shape) > 1 and reads_text(path)}
    if widths:
        return next((f for f in families().values() if f.unet is not None and widths == {f.unet.context_dim}), None)
    scores = {family: _score(shapes, namings, family) for family in families().values()}
    best = max(scores, key=lambda family: scores[family])
    if base is not None and "indexed" not in namings.values():
        table, own = base.layers, base.family
        found = ((table.find(component_in(module[0], own), module[1]), shape) for module, shape in shapes.items())
        if sum(whole_fits(layers, shape) for layers, shape in found) >= scores[best][0]:
            return own
    return best if scores[best][0] else None


def _score(shapes: Mapping[Module, Shape], namings: Mapping[Module, str], family: Family) -> tuple[int, ...]:
    """Return how well a family fits: how many modules are layers of it, and what decides between equals."""
    fitting = spelled = 0
    after: list[int] = []
    for module, shape in shapes.items():
        naming = namings[module]
        layers = layers_of(module, shape, family, naming)
        if whole_fits(layers, shape):
            original = naming == "original" or (naming == "kohya" and family.kohya == "original")
            path = (original and layers[0].original) or layers[0].path
            is_spelled = flatten(path) in (flatten(module[1]), flatten(module[1]) + "_0")
            # Kohya's files of transformers have no second spelling, but other families' names are like it.
            fitting += is_spelled or naming != "kohya" or family.unet is not None or module[0] not in MAIN
            spelled += is_spelled
            after.append(family.blocks_after(layers[0]))
    there = [blocks for blocks in after if blocks >= 0]
    return fitting, spelled, len(there), family.name == PREFERRED, -min(there, default=0)


def layers_of(module: Module, shape: Shape, family: Family, naming: str) -> list[Layer]:
    """Return the layers of a family that a module means, in row order."""
    component, path = module
    if naming != "indexed" or not path.isdecimal():
        return family.find(component_in(component, family), path, shape)
    order = indexed_layers(family, component)
    return order[int(path) : int(path) + 1]


def component_in(component: str, family: Family | None) -> str:
    """Return the component of a family that a key calls `component`, which may be a kind of text encoder."""
    if component in ENCODER_KINDS:
        encoders = family.text_encoders if family is not None else ()
        default = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
        return next((e.component for e in encoders if e.kind == component), default.get(component, "text_encoder"))
    return family.component if component in MAIN and family is not None else component


def whole_fits(layers: list[Layer], shape: Shape) -> bool:
    """Return whether these layers, stacked by rows, can be a weight of this shape."""
    if not layers or not layers[0].shape:
        return bool(layers)
    rows = sum(layer.shape[0] if layer.shape else 0 for layer in layers)
    return fits((rows, *layers[0].shape[1:]), shape)


def places(module: Module, shape: Shape, base: Base | None, family: Family | None, naming: str) -> list[Layer]:
    """Return the layers that a module means, with their shapes; several are the parts of a fused weight.

    A module that nothing is known of, or whose size is another, is a layer of its own with the shape of the update.
    """
    component = component_in(module[0], family)
    shape = shape if len(shape) > 1 else ()  # of the outputs alone a layer cannot be made
    found = base.layers.find(component, module[1]) if base is not None and naming != "indexed" else []
    if not found and family is not None:
        found = layers_of(module, shape, family, naming)
    if not found:
        return [Layer(f"{component}.{module[1]}", shape)]
    if whole_fits(found, shape):
        return found if found[0].shape else [replace(layer, shape=shape) for layer in found]
    return [replace(found[0], shape=shape)] if len(found) == 1 else [whole_of(found, shape)]


def whole_of(parts: list[Layer], shape: Shape) -> Layer:
    """Return the fused weight as a layer of its own, for an update that cannot be cut and may not tell its shape."""
    if not shape and all(part.shape for part in parts):
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Layer(f"{parts[0].component}.{parts[0].original}", shape, parts[0].original)


def vector_place(module: Module, parameter: str, size: int, base: Base | None, family: Family | None) -> Layer:
    """Return the layer of a one-dimensional parameter of a module.

    Args:
        module: The module.
        parameter: `weight` or `bias`.
        size: Numbers of the difference.
        base: The base, if at hand.
        family: The family, if known.
    """
    component = component_in(module[0], family)
    known = base.vectors if base is not None else LayerTable([])
    for path in (f"{module[1]}.{parameter}", module[1]):
        if found := known.find(component, path):
            return replace(found[0], shape=(size,))
    owners = family.find(component, module[1]) if family is not None else []
    if not owners:
        return Layer(f"{component}.{module[1]}.{parameter}", (size,))
    owner = owners[0] if len(owners) == 1 else whole_of(owners, ())
    return Layer(f"{owner.name}.{parameter}", (size,), f"{owner.original or owner.path}.{parameter}")
