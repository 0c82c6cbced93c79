"""The sockets that are ours, and what several nodes say of themselves."""

from collections.abc import Container
from typing import Any

from ..lorax.options import RANK
from .host import adapter_files, io

CATEGORY = "LoRA-X"
# `HAS_INTERMEDIATE_OUTPUT` of nodes that are no output nodes: where they need not run again, newer hosts send what they
# said before. An attribute, for `io.Schema` of older hosts has no such option.
SHOWN_AGAIN = True

AdapterPort = io.Custom("LORAX_ADAPTER")
BasePort = io.Custom("LORAX_BASE")
SimilarityPort = io.Custom("LORAX_SIMILARITY")


def base_input(name: str, tooltip: str, *, optional: bool = False) -> object:
    """Return the input of a base model whose weights are only read: a MODEL, or a file that need not be loaded."""
    return io.MultiType.Input(name, types=[io.Model, BasePort], tooltip=tooltip, optional=optional)


def node_schema(*, search_aliases: list[str], advanced: Container[str] = (), **described: Any) -> io.Schema:
    """Return what a node says of itself.

    Args:
        search_aliases: By what else the front end's search finds it. It looks for each word of a search in one alias, near
            its beginning.
        advanced: The widgets that the front end folds away.
        described: All else that `io.Schema` takes. It knows neither of these two in older hosts, which leave them alone.
    """
    schema = io.Schema(**described)
    schema.search_aliases = search_aliases
    for field in schema.inputs:
        if field.id in advanced:
            field.extra_dict["advanced"] = True
    return schema


def cache_input() -> object:
    """Return the widget that says whether results are kept on disk."""
    return io.Boolean.Input(
        "cache",
        default=True,
        optional=True,
        tooltip="Keep subspaces and similarities of these models on disk (lorax cache info), so that the next time takes "
        "seconds.",
    )


def rank_input(tooltip: str) -> object:
    """Return the rank widget that several nodes share."""
    return io.Int.Input("rank", default=RANK, min=1, max=16384, tooltip=tooltip)


def strength_input() -> object:
    """Return the strength widget that several nodes share."""
    return io.Float.Input(
        "strength",
        default=1.0,
        min=-10.0,
        max=10.0,
        step=0.01,
        tooltip="Factor of the update. Changing it computes nothing again.",
    )


def lora_input() -> object:
    """Return the list of adapter files that several nodes share."""
    return io.Combo.Input(
        "lora_name",
        options=adapter_files(),
        tooltip="A LoRA or LoRA-X file from the loras folders. Press R to see new files.",
    )
