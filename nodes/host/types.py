"""What ComfyUI's sockets carry, as far as the pack uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypedDict
from uuid import UUID

import torch
from torch import Tensor


class Model(Protocol):
    """A MODEL, or what a CLIP holds its text encoders in: `comfy.model_patcher.ModelPatcher`.

    Attributes:
        model: The module with the weights: `comfy.model_base.BaseModel`.
        patches: Updates of the weights, by name of the parameter.
        patches_uuid: Another one after each change of the patches.
        backup: The weights as they were before the patches, where these are in the model now.
        model_options: What the sampler gives to the model.
        load_device: Where it computes.
        attachments: What others keep with it; copies have the same.
    """

    model: Any
    patches: Mapping[str, Sequence[Any]]
    patches_uuid: UUID
    backup: Mapping[str, Any]
    model_options: Mapping[str, Any]
    load_device: torch.device
    attachments: dict[str, Any]

    def clone(self) -> Model:
        """Return a copy with patches of its own."""
        ...

    def add_patches(self, patches: Mapping[Any, Any], strength_patch: float = 1.0) -> Sequence[Any]:
        """Add updates; return the keys of those that found their weight."""
        ...

    def set_model_compute_dtype(self, dtype: torch.dtype) -> None:
        """Compute in another dtype than that of the weights."""
        ...

    def pre_run(self) -> None:
        """Get ready to be called."""
        ...

    def cleanup(self) -> None:
        """Let go of what `pre_run` got ready."""
        ...


class Clip(Protocol):
    """A CLIP: `comfy.sd.CLIP`.

    Attributes:
        patcher: Its text encoders.
    """

    patcher: Model

    def clone(self) -> Clip:
        """Return a copy with patches of its own."""
        ...

    def add_patches(self, patches: Mapping[Any, Any], strength_patch: float = 1.0) -> Sequence[Any]:
        """Add updates; return the keys of those that found their weight."""
        ...


class Latent(TypedDict):
    """A LATENT: a batch of pictures as the VAE gives it, `[count, channels, ...]`."""

    samples: Tensor


# An entry of a CONDITIONING: the tensor of a prompt, and a dictionary of what else there is to know.
Caption: TypeAlias = Sequence[Any]
Conditioning: TypeAlias = Sequence[Caption]
