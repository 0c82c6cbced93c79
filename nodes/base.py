"""The node that gives a base model from its file."""

from __future__ import annotations

from ..lorax.models.base import open_base
from . import host
from .host import io
from .types import CATEGORY, SHOWN_AGAIN, BasePort, node_schema


class LoraXBase(io.ComfyNode):
    """Open a base model without loading it."""

    HAS_INTERMEDIATE_OUTPUT = SHOWN_AGAIN

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return node_schema(
            node_id="LoraXBase",
            display_name="Base from File",
            category=CATEGORY,
            description="Opens a base model whose weights are only read, a layer at a time: it takes no memory. For every "
            "source of this pack; samplers need a loaded model.",
            search_aliases=["base model from file", "open checkpoint without loading", "source model", "load base"],
            inputs=[
                io.Combo.Input(
                    "base_name",
                    options=host.base_files(),
                    tooltip="From the checkpoints and diffusion_models folders. Press R to see new files.",
                )
            ],
            outputs=[BasePort.Output(display_name="base", tooltip="For inputs that are called source.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def fingerprint_inputs(cls, base_name: str) -> str:
        """Open the file again when it changed."""
        return str(open_base(host.base_path(base_name)).state)

    @classmethod
    def execute(cls, base_name: str) -> io.NodeOutput:
        """Open it."""
        base = open_base(host.base_path(base_name))
        stored = ", ".join(f"{count} {dtype}" for dtype, count in base.dtypes.most_common())
        text = f"{base.name}: {base.label}, {len(base.layers)} layers ({', '.join(base.components)})\n"
        text += f"{base.parameters / 1e9:.2f} billion parameters, stored as {stored} tensors"
        return io.NodeOutput(base, ui=host.shown(cls.hidden, text))
