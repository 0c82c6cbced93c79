"""Move adapters between diffusion base models without training and without data (LoRA-X, arXiv 2501.16559)."""

from .adapters import Adapter, LoraLayer, LoraXLayer, load_adapter, save_adapter
from .base import Base, open_base
from .convert import convert_to_lora, convert_to_lora_x
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
from .similarity import Score, Similarity, compare_bases, pair_scores
from .transfer import transfer_adapter
from .version import __version__

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
    "__version__",
    "compare_bases",
    "convert_to_lora",
    "convert_to_lora_x",
    "load_adapter",
    "open_base",
    "pair_scores",
    "save_adapter",
    "similarity_json",
    "transfer_adapter",
]
