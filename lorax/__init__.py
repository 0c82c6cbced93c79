"""Move adapters between diffusion base models without training and without data (LoRA-X, arXiv 2501.16559)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .adapters import Adapter, LoraLayer, LoraXLayer, load_adapter, save_adapter
    from .adapters.convert import convert_to_lora, convert_to_lora_x
    from .compare.matching import Assignment, load_assignment, match_bases
    from .compare.scores import Score
    from .compare.similarity import Similarity, compare_bases, pair_scores
    from .compute.cache import Cache, open_cache
    from .compute.engine import Engine
    from .errors import (
        FileError,
        FormatError,
        LoraxError,
        MismatchError,
        NumericsError,
        OptionError,
        OutputError,
    )
    from .models.base import Base, module_base, open_base
    from .models.layers import Layer, LayerTable
    from .options import TransferOptions
    from .transfer.plan import Plan, plan_transfer
    from .transfer.report import Outcome, Row, TransferReport, similarity_json
    from .transfer.run import run_plan, transfer_adapter

# Where each name lives. It is imported when it is first asked for: reading a header needs no torch.
_PLACES = {
    "adapters": ("Adapter", "LoraLayer", "LoraXLayer", "load_adapter", "save_adapter"),
    "models.base": ("Base", "module_base", "open_base"),
    "compute.cache": ("Cache", "open_cache"),
    "adapters.convert": ("convert_to_lora", "convert_to_lora_x"),
    "compute.engine": ("Engine",),
    "errors": (
        "FileError",
        "FormatError",
        "LoraxError",
        "MismatchError",
        "NumericsError",
        "OptionError",
        "OutputError",
    ),
    "models.layers": ("Layer", "LayerTable"),
    "compare.matching": ("Assignment", "load_assignment", "match_bases"),
    "options": ("TransferOptions",),
    "transfer.report": ("Outcome", "Row", "TransferReport", "similarity_json"),
    "compare.scores": ("Score",),
    "compare.similarity": ("Similarity", "compare_bases", "pair_scores"),
    "transfer.plan": ("Plan", "plan_transfer"),
    "transfer.run": ("run_plan", "transfer_adapter"),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "Adapter",
    "Assignment",
    "Base",
    "Cache",
    "Engine",
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
    "Plan",
    "Row",
    "Score",
    "Similarity",
    "TransferOptions",
    "TransferReport",
    "__version__",
    "compare_bases",
    "convert_to_lora",
    "convert_to_lora_x",
    "load_adapter",
    "load_assignment",
    "match_bases",
    "module_base",
    "open_base",
    "open_cache",
    "pair_scores",
    "plan_transfer",
    "run_plan",
    "save_adapter",
    "similarity_json",
    "transfer_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
