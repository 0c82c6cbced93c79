"""Move adapters between diffusion base models without training and without data (LoRA-X, arXiv 2501.16559)."""

from .adapters import Adapter, LoraLayer, LoraXLayer, load_adapter, save_adapter
from .base import Base, open_base
from .convert import to_lora, to_lora_x
from .errors import (
    FileError,
    FormatError,
    LoraxError,
    MismatchError,
    NumericsError,
    OptionError,
    OutputError,
)
from .layers import Layer, LayerTable
from .report import Outcome, Row, TransferReport, similarity_json
from .similarity import Score, Similarity, pair_scores, similarity
from .transfer import transfer

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Base",
    "FileError",
    "FormatError",
    "Layer",
    "LayerTable",
    "LoraLayer",
    "LoraXLayer",
    "LoraxError",
    "MismatchError",
    "NumericsError",
    "OptionError",
    "Outcome",
    "OutputError",
    "Row",
    "Score",
    "Similarity",
    "TransferReport",
    "load_adapter",
    "open_base",
    "pair_scores",
    "save_adapter",
    "similarity",
    "similarity_json",
    "to_lora",
    "to_lora_x",
    "transfer",
]
