"""The nodes of the pack."""

from .files import LoraXLoader, LoraXSave
from .host import ComfyExtension
from .similarity import LoraXSimilarity
from .train import LoraXTrain
from .transfer import LoraXApply, LoraXConvert, LoraXTransfer

NODES = [LoraXLoader, LoraXSimilarity, LoraXTransfer, LoraXApply, LoraXConvert, LoraXSave, LoraXTrain]


class LoraXExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self):
        """Return the node classes."""
        return NODES
