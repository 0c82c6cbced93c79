"""A pack for the tests: conditioning for models that come without a text encoder, and latents to train on."""

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


class TestPictures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraXTestPictures",
            display_name="Test pictures",
            category="test",
            inputs=[io.String.Input("sizes", default="8 8 12"), io.Int.Input("width", min=1, max=4096)],
            outputs=[
                io.Latent.Output(display_name="latents", is_output_list=True),
                io.Conditioning.Output(display_name="conditionings", is_output_list=True),
            ],
        )

    @classmethod
    def execute(cls, sizes, width):
        """A latent and a caption for each size: a number of patches, and a length of the text of its own."""
        generator, latents, captions = torch.Generator().manual_seed(0), [], []
        for place, size in enumerate(map(int, sizes.split())):
            latents.append({"samples": 4 * torch.randn(1, 4, size, size, generator=generator)})
            text = torch.randn(1, 77 * (1 + place % 2), width, generator=generator)
            captions.append([[text, {"pooled_output": torch.randn(1, 1280, generator=generator)}]])
        return io.NodeOutput(latents, captions)


class TestExtension(ComfyExtension):
    async def get_node_list(self):
        return [TestConditioning, TestPictures]


async def comfy_entrypoint():
    return TestExtension()
