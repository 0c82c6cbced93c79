"""A device with single precision only, `single`, as Apple's MPS, Intel's Arc GPUs and DirectML are.

It is a backend of torch written in Python: its tensors hold a tensor on the CPU. Whatever those devices refuse it
refuses too: float64, bfloat16 and 8-bit floats, decompositions, Fourier transforms, and tensors of the CPU among its
own. Its products round as another machine's do. `failures` makes it break in the middle of the work.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map

NAME = "single"
CPU = torch.device("cpu")
aten = torch.ops.aten
KNOWN = (torch.float32, torch.float16)
MISSING = ("linalg_", "_linalg_", "fft_", "_fft_", "svd", "qr", "cholesky", "lu_", "triangular_solve", "geqrf")
PRESENT = ("linalg_vector_norm",)
COPIES = ("copy_", "_to_copy", "_copy_from")
is_possible = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
# What the next operations raise instead of computing, from the last one on.
failures: list[BaseException] = []
_libraries: list[torch.library.Library] = []


class Single(Tensor):
    """A tensor on the device."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "Single":
        _check(held.dtype)
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=f"{NAME}:0"
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def tolist(self) -> Any:
        """Return numbers: torch does not ask a subclass for them."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _check(dtype: torch.dtype) -> None:
    if (dtype.is_floating_point and dtype not in KNOWN) or dtype.is_complex:
        raise TypeError(f"Cannot convert a tensor to {dtype} as the framework doesn't support {dtype}")


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func._can_decompose():  # in inference mode torch leaves that to the device
        return func.decompose(*args, **kwargs)
    name = func._schema.name.removeprefix("aten::")
    if failures and name not in COPIES:
        raise failures.pop()
    if name.startswith(MISSING) and name not in PRESENT:
        raise NotImplementedError(f"The operator 'aten::{name}' is not currently implemented for the device")
    given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    plain = [leaf for leaf in given if not isinstance(leaf, Single)]
    if name not in COPIES and any(leaf.dim() or leaf.dtype == torch.float64 for leaf in plain):
        raise RuntimeError(f"Expected all tensors to be on the same device ({name})")
    ours = {id(leaf.held): leaf for leaf in given if isinstance(leaf, Single)}
    args, kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, Single) else leaf, (args, kwargs))
    wanted = torch.device(kwargs.get("device") or (CPU if name == "copy_" and plain and given[0] is plain[0] else NAME))
    if wanted == CPU:  # copied away: as it is stored
        _check(kwargs.get("dtype") or given[0].dtype)
        return func(*args, **kwargs)
    if "device" in kwargs:
        kwargs["device"] = CPU
    if name == "mm":  # the same sums in another order
        args = args[0].flip(1), args[1].flip(0)
    result = func(*args, **kwargs)
    # What is seen of an ordinary tensor is one, also in inference mode.
    with torch.inference_mode(torch.is_inference_mode_enabled() and all(map(Tensor.is_inference, ours.values()))):
        return tree_map(lambda leaf: _wrapped(leaf, ours) if isinstance(leaf, Tensor) else leaf, result)


def _wrapped(held: Tensor, ours: dict[int, Single]) -> Single:
    return ours[id(held)] if id(held) in ours else Single(held)


def _factories() -> list[Any]:
    """Return the operators that make a tensor on a device and take none."""
    found: list[Any] = []
    for full in torch._C._dispatch_get_all_op_names():
        name, _, overload = full.removeprefix("aten::").partition(".")
        if full.startswith("aten::") and not any(word in name for word in ("sparse", "quantized", "nested", "file")):
            func = getattr(getattr(aten, name), overload or "default")
            types = [str(argument.type) for argument in func._schema.arguments]
            made = [str(value.type) for value in func._schema.returns]
            if made == ["Tensor"] and not any("Tensor" in kind for kind in types):
                found += [func] * any(argument.name == "device" for argument in func._schema.arguments)
    return found


def register() -> None:
    """Make it a device of torch, once in a process."""
    if _libraries:
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    for func in _factories():
        name = func._schema.name.removeprefix("aten::") + "." * bool(func._schema.overload_name)
        library.impl(
            name + func._schema.overload_name,
            lambda *args, func=func, **kwargs: Single(func(*args, **kwargs | {"device": CPU, "pin_memory": None})),
            "PrivateUse1",
        )
    library.impl(
        "_copy_from", lambda source, to, _=False: _computed(aten.copy_.default, (to, source), {}), "PrivateUse1"
    )
    _libraries.append(library)
