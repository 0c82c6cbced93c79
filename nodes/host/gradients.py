"""What lets models of ComfyUI, which are loaded for inference, take part in backward passes."""

import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint


@contextmanager
def differentiable(model: nn.Module) -> Generator[None]:
    """Put views of the same memory in the place of weights that the host loaded in inference mode."""
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (vars(module)["_parameters"], vars(module)["_buffers"])
            for table in tables:
                for name, held in table.items():
                    if held is not None and held.is_inference() and type(held.data) is Tensor:
                        kept.append((table, name, held))
                        view = torch.empty(0, dtype=held.dtype, device=held.device)
                        view.set_(held.untyped_storage(), held.storage_offset(), held.shape, held.stride())
                        table[name] = nn.Parameter(view, False) if table is tables[0] else view
        yield
    finally:
        for table, name, held in kept:
            table[name] = held


@functools.cache
def teach_rotations() -> None:
    """Give the host's own kernels for rotary embeddings, which have none, their gradient: the rotation backwards."""
    kernels: Any = getattr(torch.ops, "comfy_kitchen", None)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[-1])

    def back(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (turns,) = ctx.saved_tensors
        turns = turns.transpose(-1, -2)
        return *(kernels.apply_rope1(gradient.contiguous(), turns) for gradient in gradients), None

    for name in ("apply_rope", "apply_rope1"):
        if hasattr(kernels, name):
            torch.library.register_autograd(f"comfy_kitchen::{name}", back, setup_context=keep)


def copies(frozen: Sequence[nn.Module]) -> Callable[[], saved_tensors_hooks]:
    """Return a context that keeps copies for the backward pass: models of the host add to their tensors in place.

    What `frozen` holds does not change and is kept as it is.
    """
    tensors = [tensor for module in frozen for tensor in (*module.parameters(), *module.buffers())]
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors if type(tensor.data) is Tensor}

    def pack(tensor: Tensor) -> Tensor:
        return tensor if tensor.untyped_storage().data_ptr() in known else tensor.clone()

    return lambda: saved_tensors_hooks(pack, lambda tensor: tensor)


@contextmanager
def recomputing(model: nn.Module, saved: Callable[[], saved_tensors_hooks]) -> Generator[None]:
    """Let each block of a model be computed again in the backward pass."""
    blocks = list(_blocks(model))
    kept = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = functools.partial(_recomputed, block.forward, saved)
        yield
    finally:
        for block, before in zip(blocks, kept, strict=True):
            del block.forward
            if before is not None:
                block.forward = before


def _recomputed(
    forward: Callable[..., Any], saved: Callable[[], saved_tensors_hooks], *args: Any, **kwargs: Any
) -> Any:
    """Call `forward` and keep only its inputs for the backward pass, as copies.

    What torch's newer checkpoints keep is not protected from changes in place, and its older ones take no keywords.
    """
    leaves, form = tree_flatten((args, kwargs))
    if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
        return forward(*args, **kwargs)  # nothing before it learns, and the older checkpoints would cut it off
    forms: list[Any] = []

    def run(*leaves: Any) -> tuple[Any, ...]:
        with saved():
            cloned = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(cloned, form)
            results, result_form = tree_flatten(forward(*args, **kwargs))
        forms.append(result_form)
        return tuple(results)

    results = checkpoint(run, *leaves, use_reentrant=True, preserve_rng_state=False)
    return tree_unflatten(list(results), forms[0])


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules below `module` that are not mere lists of modules."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            yield from _blocks(child)
        else:
            yield child
