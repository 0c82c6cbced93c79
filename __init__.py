"""LoRA-X for ComfyUI: the pack's entry point. Nothing heavy is imported until the host asks for the nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Return the extension (called once by ComfyUI)."""
    from .nodes import LoraXExtension

    return LoraXExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
