"""LoRA-X for ComfyUI: the pack's entry point. Nothing heavy is imported until the host asks for the nodes."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  what follows is not for them: say so, before they stumble over it
    raise ImportError(f"LoRA-X needs Python 3.10 or newer, and this ComfyUI runs on {sys.version.split()[0]}")

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Return the extension (called once by ComfyUI)."""
    from .nodes import LoraXExtension

    return LoraXExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
