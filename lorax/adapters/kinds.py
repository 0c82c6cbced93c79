"""Every kind of adapter layer, and which one a set of parts belongs to."""

from collections.abc import Collection

from .diff import DiffLayer
from .foura import FouraLayer
from .glora import GloraLayer
from .layer import AdapterLayer
from .loha import LohaLayer
from .lokr import LokrLayer
from .lora import LoraLayer
from .lora_x import LoraXLayer
from .oft import BoftLayer, OftLayer

KINDS: tuple[type[AdapterLayer], ...] = (
    LoraLayer, LohaLayer, LokrLayer, GloraLayer, OftLayer, BoftLayer, DiffLayer, FouraLayer, LoraXLayer,
)  # fmt: skip
