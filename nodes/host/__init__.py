"""All that knows ComfyUI: its models, devices, folders, progress and cancel button."""

from typing import Any

from .files import adapter_files, adapter_path, check_prefix, free_path
from .models import model_key, open_model, state_of, weight_of
from .patch import apply_adapter
from .prompt import file_of
from .run import as_text, compute, counted, send, show, shown
from .train import training
from .types import Caption, Clip, Conditioning, Latent, Model

__all__ = [
    "Caption",
    "Clip",
    "Conditioning",
    "Latent",
    "Model",
    "adapter_files",
    "adapter_path",
    "apply_adapter",
    "as_text",
    "check_prefix",
    "compute",
    "counted",
    "file_of",
    "free_path",
    "model_key",
    "open_model",
    "send",
    "show",
    "shown",
    "state_of",
    "training",
    "weight_of",
]


def __getattr__(name: str) -> Any:
    """Give the node API (`io`, `ui`, `ComfyExtension`) on demand: hosts of before 2025 have none."""
    if name in ("io", "ui", "ComfyExtension"):
        from comfy_api import latest

        return getattr(latest, name)
    raise AttributeError(name)
