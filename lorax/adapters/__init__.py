"""Adapters: what they hold, and the files they come in."""

from .load import load_adapter
from .model import Adapter, AdapterLayer, LoraLayer, LoraXLayer
from .save import save_adapter

__all__ = ["Adapter", "AdapterLayer", "LoraLayer", "LoraXLayer", "load_adapter", "save_adapter"]
