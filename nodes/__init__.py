"""The nodes of the pack."""

from .base import LoraXBase
from .convert import LoraXConvert
from .files import LoraXLoader, LoraXSave
from .host import ComfyExtension
from .move import LoraXMove
from .similarity import LoraXSimilarity
from .train import LoraXTrain
from .transfer import LoraXApply, LoraXTransfer

NODES: list[type] = [
    LoraXLoader,
    LoraXBase,
    LoraXSimilarity,
    LoraXTransfer,
    LoraXApply,
    LoraXMove,
    LoraXConvert,
    LoraXSave,
    LoraXTrain,
]


class LoraXExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type]:
        """Return the node classes."""
        return NODES
