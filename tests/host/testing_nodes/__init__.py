"""A pack for the tests: conditioning for models that come without a text encoder."""

import torch
from comfy_api.latest import ComfyExtension, io


class TestConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraXTestConditioning",
            display_name="Test conditioning",
            category="test",
            inputs=[io.Int.Input("seed", min=0, max=1000), io.Int.Input("width", min=1, max=4096)],
            outputs=[io.Conditioning.Output(display_name="conditioning")],
        )

    @classmethod
    def execute(cls, seed, width):
        generator = torch.Generator().manual_seed(seed)
        pooled = torch.randn(1, 1280, generator=generator)
        return io.NodeOutput([[torch.randn(1, 77, width, generator=generator), {"pooled_output": pooled}]])


class TestExtension(ComfyExtension):
    async def get_node_list(self):
        return [TestConditioning]


async def comfy_entrypoint():
    return TestExtension()
