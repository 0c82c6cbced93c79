"""Every kind of adapter layer, and which one a set of parts belongs to."""

from .diff import DiffLayer
from .foura import FouraLayer
from .glora import GloraLayer
from .layer import AdapterLayer, Shapes, misfit
from .loha import LohaLayer
from .lokr import LokrLayer
from .lora import LoraLayer
from .lora_x import LoraXLayer
from .oft import BoftLayer, OftLayer

KINDS: tuple[type[AdapterLayer], ...] = (
    LoraLayer, LohaLayer, LokrLayer, GloraLayer, OftLayer, BoftLayer, DiffLayer, FouraLayer, LoraXLayer,
)  # fmt: skip


def kind_of(shapes: Shapes) -> type[AdapterLayer]:
    """Return the kind that has parts of these names.

    Args:
        shapes: Shape of each part of one module, by field.

    Raises:
        FormatError: None has, or several have.
    """
    shared = {"dora_scale"}
    kinds = [kind for kind in KINDS if shapes.keys() & ((kind.REQUIRED | kind.OPTIONAL) - shared)]
    if {OftLayer, BoftLayer} <= set(kinds):
        kinds.remove(OftLayer if len(shapes.get("oft_blocks", ())) == BoftLayer.DIMENSIONS else BoftLayer)
    if len(kinds) > 1:
        raise misfit(" and ".join(kind.KIND for kind in kinds), shapes, "of several kinds for one layer")
    if not kinds:
        raise misfit("any", shapes, "alone: the partner is not in the file")
    return kinds[0]
