"""Adapters: what they hold, and the files they come in."""

from .diff import DiffLayer, VectorLayer
from .foura import FouraLayer
from .glora import GloraLayer
from .layer import AdapterLayer
from .load import load_adapter
from .loha import LohaLayer
from .lokr import LokrLayer
from .lora import LoraLayer, fuse
from .lora_x import LoraXLayer
from .model import Adapter, expand
from .oft import BoftLayer, OftLayer
from .save import save_adapter

__all__ = [
    "Adapter",
    "AdapterLayer",
    "BoftLayer",
    "DiffLayer",
    "FouraLayer",
    "GloraLayer",
    "LohaLayer",
    "LokrLayer",
    "LoraLayer",
    "LoraXLayer",
    "OftLayer",
    "VectorLayer",
    "expand",
    "fuse",
    "load_adapter",
    "save_adapter",
]
