"""What the prompt that runs says of a node: what it is computed from, and the files that its models come from."""

from __future__ import annotations

from typing import Any, TypeGuard

# How the names of files with the weights of a model end.
WEIGHTS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")


def computed_from(hidden: Any) -> dict[str, dict[str, Any]]:
    """Return the part of the prompt that tells what a node was computed from, without links.

    That is what its own widgets were, and which files of weights the nodes before it loaded.

    Args:
        hidden: `hidden` of a node class while it runs, which asked for `unique_id` and `prompt`.
    """
    found: dict[str, dict[str, Any]] = {}
    waiting = [hidden.unique_id]
    while waiting:
        node = waiting.pop()
        if node in found or node not in (hidden.prompt or {}):
            continue
        inputs = _inputs(hidden.prompt, node)
        waiting += [value[0] for value in inputs.values() if _is_link(value)]
        own = {k: v for k, v in inputs.items() if not _is_link(v) and (node == hidden.unique_id or _is_weights(v))}
        found[node] = {"class_type": hidden.prompt[node].get("class_type"), "inputs": own}
    return {node: entry for node, entry in found.items() if entry["inputs"]}


def file_of(hidden: Any, socket: str) -> str | None:
    """Return the name of the file that the MODEL on an input was loaded from, without its folder.

    Nodes that change a model, such as LoRA loaders, are passed through by their input `model`.

    Args:
        hidden: As for `computed_from`.
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
            files = [value for value in inputs.values() if _is_weights(value)]
            return files[0].replace("\\", "/").rpartition("/")[2] if len(files) == 1 else None
    return None


def _inputs(prompt: Any, node: str | None) -> dict[str, Any]:
    return (prompt or {}).get(node, {}).get("inputs", {})


def _is_weights(value: Any) -> bool:
    return isinstance(value, str) and value.lower().endswith(WEIGHTS)


def _is_link(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)
