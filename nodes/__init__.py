"""The nodes of the pack."""

from .convert import LoraXConvert
from .files import LoraXLoader, LoraXSave
from .host import ComfyExtension
from .similarity import LoraXSimilarity
from .train import LoraXTrain
from .transfer import LoraXApply, LoraXTransfer

NODES: list[type] = [LoraXLoader, LoraXSimilarity, LoraXTransfer, LoraXApply, LoraXConvert, LoraXSave, LoraXTrain]


class LoraXExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type]:
        """Return the node classes."""
        return NODES
