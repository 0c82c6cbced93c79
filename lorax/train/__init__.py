"""Training LoRA-X layers in a torch module."""

from .layers import LoraXLayers, attach
from .loop import Training, thinned, train

__all__ = ["LoraXLayers", "Training", "attach", "thinned", "train"]
