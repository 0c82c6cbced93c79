"""All that knows ComfyUI: its models, devices, folders, progress and cancel button."""

from typing import Any

from .files import adapter_files, adapter_path, base_files, base_path, check_prefix, file_state, free_path
from .models import model_key, open_model, state_of, weight_of
from .moved import apply_moved, without_moved
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
    "apply_moved",
    "as_text",
    "base_files",
    "base_path",
    "check_prefix",
    "compute",
    "counted",
    "file_of",
    "file_state",
    "free_path",
    "model_key",
    "open_model",
    "send",
    "show",
    "shown",
    "state_of",
    "training",
    "weight_of",
    "without_moved",
]


def __getattr__(name: str) -> Any:
    """Give the node API (`io`, `ui`, `ComfyExtension`) on demand: hosts of before 2025 have none."""
    if name in ("io", "ui", "ComfyExtension"):
        from comfy_api import latest

        return getattr(latest, name)
    raise AttributeError(name)
