"""Work on ComfyUI's device, with its progress bar, its cancel button, its texts and events."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import comfy.model_management as management
import comfy.utils

from ...lorax.compute.cache import open_cache
from ...lorax.compute.engine import Engine, or_on_cpu
from ...lorax.errors import printable
from ...lorax.progress import Progress
from .prompt import computed_from

# Room to make on the GPU for one layer: the largest weight of SDXL, 10240 x 1280, in float64, six times.
WORKSPACE_BYTES = 640 * 2**20
Result = TypeVar("Result")


def compute(work: Callable[[Engine, Progress], Result], steps: int, *, cache: bool = True) -> Result:
    """Run `work(engine, progress)` on the host's device, with its progress bar and its cancel button.

    Where the device fails, out of memory or otherwise, the work is done again on the CPU; a line in the log says so.

    Args:
        work: Computes something; calls `progress` often.
        steps: How many steps there will be, about.
        cache: Take subspaces and scores from the user's cache, and keep new ones there.
    """
    bar = comfy.utils.ProgressBar(steps)

    def progress(done: int, total: int, what: str) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    device = management.get_torch_device()

    def begun(engine: Engine) -> Result:
        if engine.device != "cpu":
            management.free_memory(WORKSPACE_BYTES, device)
        return work(engine, progress)

    try:
        return or_on_cpu(begun, Engine(str(device), cache=open_cache() if cache else None))
    finally:
        with suppress(RuntimeError):  # a device that failed may not even let go of its memory
            management.soft_empty_cache()


def counted(steps: int) -> Callable[[int], None]:
    """Return a function that shows how many steps are done in the host's bar, and ends where the user cancels."""
    bar = comfy.utils.ProgressBar(steps)

    def count(done: int) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, steps)

    return count


def show(text: str, node_id: str | None) -> None:
    """Show text on the face of a node while the graph runs; names in it come from files, and are shown as they are."""
    from server import PromptServer

    if node_id is not None:
        PromptServer.instance.send_progress_text(as_text(text), node_id)


def shown(hidden: Any, text: str, **views: Any) -> dict[str, list[Any]]:
    """Show text on the face of a node, and return what its view shows when it has run: the `ui` of its output.

    Args:
        hidden: `hidden` of the node class while it runs, which asked for `unique_id` and `prompt`.
        text: What the node says.
        **views: What its view shows, by the key that the view reads.
    """
    show(text, hidden.unique_id)
    return {"text": [text], "lorax_inputs": [computed_from(hidden)]} | {key: [data] for key, data in views.items()}


def as_text(text: str) -> str:
    """Return text so that a page shows it as it is, whether it takes it for HTML or for Markdown.

    The host's classic canvas takes it for HTML and makes links of addresses and of `[[words|address]]`, its Vue nodes
    take it for Markdown, of which an image is fetched. A sign that is written by its number means nothing in either; two
    blanks end a line in Markdown.
    """
    lines = (printable(line).strip() for line in text.split("\n"))
    return "  \n".join("".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in line) for line in lines)


def send(event: str, data: Mapping[str, Any]) -> None:
    """Send an event to the browser that runs the graph."""
    from server import PromptServer

    PromptServer.instance.send_sync(event, dict(data), PromptServer.instance.client_id)
