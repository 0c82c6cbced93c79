"""The sockets that are ours."""

from ..lorax.options import RANK
from .host import io

CATEGORY = "LoRA-X"
# `HAS_INTERMEDIATE_OUTPUT` of nodes that are no output nodes: where they need not run again, newer hosts send what they
# said before. An attribute, for `io.Schema` of older hosts has no such option.
SHOWN_AGAIN = True

AdapterPort = io.Custom("LORAX_ADAPTER")
SimilarityPort = io.Custom("LORAX_SIMILARITY")


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
