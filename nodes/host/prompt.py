"""What the prompt that runs says of a node: the values of its widgets, and the files that its models come from."""

from __future__ import annotations

from typing import Any

# How the names of files with the weights of a model end.
WEIGHTS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")


def widget_values(hidden: Any) -> dict[str, Any]:
    """Return the values that a node got from its own widgets, by name.

    Args:
        hidden: `hidden` of a node class while it runs, which asked for `unique_id` and `prompt`.
    """
    return {name: value for name, value in _inputs(hidden.prompt, hidden.unique_id).items() if not _is_link(value)}


def file_of(hidden: Any, socket: str) -> str | None:
    """Return the name of the file that the MODEL on an input was loaded from, without its folder.

    Nodes that change a model, such as LoRA loaders, are passed through by their input `model`.

    Args:
        hidden: As for `widget_values`.
        socket: Name of the input.

    Returns:
        The name; None where the prompt does not tell, as behind a node that merges models.
    """
    link, seen = _inputs(hidden.prompt, hidden.unique_id).get(socket), set[str]()
    while _is_link(link) and link[0] not in seen:
        seen.add(link[0])
        inputs = _inputs(hidden.prompt, link[0])
        link = inputs.get("model")
        if not _is_link(link):
            files = [v for v in inputs.values() if isinstance(v, str) and v.lower().endswith(WEIGHTS)]
            return files[0].replace("\\", "/").rpartition("/")[2] if len(files) == 1 else None
    return None


def _inputs(prompt: Any, node: str | None) -> dict[str, Any]:
    return (prompt or {}).get(node, {}).get("inputs", {})


def _is_link(value: Any) -> bool:
    return isinstance(value, list)
