"""Training LoRA-X: chosen layers of a model learn to move their leading singular values, and nothing else.

`y = W x + U (delta * (V^T x))` (arXiv 2501.16559): two thin products beside the layer's own, only `delta` learns.

    with attach(model, rank=320) as layers:
        train(layers, loss, steps=1000)
    save_adapter(layers.adapter("style"), "style.safetensors")

`train` takes any module that has parameters to learn, a model of PEFT too.
"""

from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import Self

from ..adapters import Adapter, LoraXLayer
from ..checks import check_rank
from ..compute.engine import Engine
from ..errors import MismatchError, OptionError
from ..linalg import Subspace
from ..models.base import Base, in_our_order, module_base, module_place
from ..models.layers import Layer, Rows
from ..options import RANK
from ..progress import Progress, silent


class LoraXLayers(nn.Module):
    """The LoRA-X layers of a model while they learn; made by `attach`, taken out by `remove` or at the end of `with`.

    Its parameters are the `delta` of each layer, float32. The model's own are frozen as long as it is attached.

    Attributes:
        unused: Chosen layers that cannot learn, name -> why.
    """

    def __init__(self, model: nn.Module, base: Base, layers: Mapping[str, "_Layer"], unused: Mapping[str, str]) -> None:
        super().__init__()
        self.unused = dict(unused)
        self._base = base
        self._layers = nn.ModuleDict({name.replace(".", "/"): layer for name, layer in layers.items()})
        self._frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        for parameter, _ in self._frozen:
            parameter.requires_grad_(False)
        modules = dict(model.named_modules())
        self._hooks = [
            modules[layer.module].register_forward_hook(layer.add_update, with_kwargs=True) for layer in layers.values()
        ]

    def adapter(self, name: str = "lora-x") -> Adapter:
        """Return what was learnt so far as an adapter, for `save_adapter`, a transfer, or `expand` on the same base.

        Args:
            name: What to call it.
        """
        layers = [layer.learnt() for layer in self._layers.values() if isinstance(layer, _Layer)]
        return Adapter(name, self._base.family, "lora-x", {update.layer.name: update for update in layers}, self.unused)

    def remove(self) -> None:
        """Take the layers out of the model, which is then what it was before; `adapter` still works."""
        for hook in self._hooks:
            hook.remove()
        for parameter, learns in self._frozen:
            parameter.requires_grad_(learns)
        self._hooks, self._frozen = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class _Layer(nn.Module):
    """One layer: `x [..., n] -> U (delta * (V^T x)) [..., m]`; of a convolution `[b, n', h, w] -> [b, m, h', w']`."""

    U: Tensor
    Vh: Tensor

    def __init__(
        self, layer: Layer, place: tuple[str, Rows | None], space: Subspace, delta: Tensor, fingerprint: str
    ) -> None:
        super().__init__()
        self.layer, self._fingerprint = layer, fingerprint
        self.module, self._rows = place
        self.delta = nn.Parameter(delta)
        self.register_buffer("U", space.U, persistent=False)
        self.register_buffer("Vh", space.Vh, persistent=False)

    def learnt(self) -> LoraXLayer:
        """Return the update as a layer of an adapter."""
        return LoraXLayer(self.layer, self.delta.detach().to("cpu", torch.float32, copy=True), self._fingerprint)

    def add_update(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add the update to the output of the module (a forward hook)."""
        x: Tensor = args[0] if args else kwargs["input"]
        update = self._convolved(module, x) if isinstance(module, nn.Conv2d) else self._product(x)
        if self._rows is not None:  # a part of a fused weight
            start, stop = self._rows
            width = output.shape[1 if isinstance(module, nn.Conv2d) else -1]
            pad = (0, 0, 0, 0) if isinstance(module, nn.Conv2d) else ()
            update = nn.functional.pad(update, (*pad, start, width - stop))
        return output + update.to(output.dtype)

    def _product(self, x: Tensor) -> Tensor:
        inner = nn.functional.linear(x, self.Vh.to(x.dtype))
        return nn.functional.linear(inner * self.delta.to(inner.dtype), self.U.to(inner.dtype))

    def _convolved(self, module: nn.Conv2d, x: Tensor) -> Tensor:
        kernel = self.Vh.to(x.dtype).unflatten(1, self.layer.shape[1:]).repeat(module.groups, 1, 1, 1)
        inner = nn.functional.conv2d(x, kernel, None, module.stride, module.padding, module.dilation, module.groups)
        inner = inner * self.delta.to(inner.dtype).repeat(module.groups)[:, None, None]
        return nn.functional.conv2d(inner, self.U.to(inner.dtype)[:, :, None, None], groups=module.groups)


def attach(
    model: nn.Module,
    *,
    base: Base | None = None,
    layers: Collection[str] | Callable[[Layer], bool] | None = None,
    rank: int | None = None,
    start: Adapter | None = None,
    engine: Engine | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> LoraXLayers:
    """Give chosen layers of a model a LoRA-X update that is zero; the model's own parameters are frozen, not changed.

    The subspaces are those of `lorax.linalg.decompose`, so that the saved adapter, expanded on the same base, is what
    was trained. No buffer of the size of a weight is made.

    Args:
        model: The model that denoises, or any module with `torch.nn.Linear` and `torch.nn.Conv2d` in it.
        base: Its weights; None reads them from `model`. Give it where the weights in use are not those in memory.
        layers: Names of layers or of modules; or what tells of a layer whether it shall learn; None: the attention
            projections.
        rank: Singular values that may move in each layer; None means 320, or as many as the layer has.
        start: A LoRA-X adapter of this base to train on: its layers and its ranks are taken.
        engine: How and where to decompose; None is exactly, where each weight is, keeping nothing.
        dtype: To hold `U` and `V` in; None is that of each weight (float32 where it has 8 bits).
        progress: Called with (done, total, layer name).

    Raises:
        MismatchError: No layer is chosen, a name is unknown, or `start` belongs to other weights.
        OptionError: `rank` is out of range, `start` is given with `layers` or `rank` or is no LoRA-X, or a chosen layer
            is neither linear nor a plain 2D convolution.
    """
    base = module_base(model) if base is None else base
    modules = dict(model.named_modules())
    known = {} if start is None else _started(start, base, alone=layers is None and rank is None)
    chosen = [base.layers[name] for name in known] if start is not None else _chosen(base, modules, layers)
    check_rank(rank, chosen)
    made: dict[str, _Layer] = {}
    unused: dict[str, str] = {}
    for done, layer in enumerate(chosen, 1):
        place = module_place(layer, modules)
        _check_module(layer, modules.get(place[0]))
        weight = modules[place[0]].get_parameter("weight")
        update = known.get(layer.name)
        where = engine or Engine(str(weight.device))
        space = where.triplets(base, layer.name, update.rank if update is not None else rank or RANK)
        if space.rank:
            kept = dtype or (weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else None)
            U = in_our_order(space.U, layer, place[0])  # which is its own inverse
            U, Vh = (part.to(weight.device, kept or torch.float32) for part in (U, space.Vh))
            delta = torch.zeros(space.rank) if update is None else update.delta
            delta = delta.to(weight.device, torch.float32, copy=True)
            space = Subspace(U, space.S, Vh)
            made[layer.name] = _Layer(layer, place, space, delta, base.fingerprint(layer.name))
        else:
            unused[layer.name] = "its weight is zero: it has no singular directions"
        progress(done, len(chosen), layer.name)
    if not made:
        raise MismatchError("no layer can learn", next(iter(unused)), "train a base that has been trained itself")
    return LoraXLayers(model, base, made, unused)


def _started(start: Adapter, base: Base, alone: bool) -> dict[str, LoraXLayer]:
    """Return the layers of an adapter to train on, by the names that the base has for them."""
    if not alone:
        raise OptionError("layers and rank are those of the adapter to train on", start.name, "leave them out")
    layers: dict[str, LoraXLayer] = {}
    for name, update in start.resolved(base).layers.items():
        if not isinstance(update, LoraXLayer):
            got = f"{name} is {update.kind}"
            raise OptionError("only a LoRA-X can be trained on", got, "convert it to LoRA-X first")
        if name not in base.layers:
            raise MismatchError("the adapter has a layer that the model has not", name, "give the adapter's own base")
        update.check_source(base)
        layers[name] = update
    return layers


def _chosen(
    base: Base, modules: Mapping[str, nn.Module], layers: Collection[str] | Callable[[Layer], bool] | None
) -> list[Layer]:
    if layers is None or callable(layers):
        wanted = layers or _is_attention
        known = ((layer, modules.get(module_place(layer, modules)[0])) for layer in base.layers.values())
        chosen = [layer for layer, module in known if module is not None and _is_plain(module) and wanted(layer)]
    else:
        chosen: list[Layer] = []
        for name in layers:
            found = base.layers.find("unet", name)
            if not found:
                some = ", ".join(list(base.layers)[:3])
                raise MismatchError("the model has no such layer", name, f"give names such as {some}")
            chosen += found
    if not chosen:
        got = f"{len(base.layers)} layers in {base.name}"
        raise MismatchError("no layer is chosen", got, "name the layers, or say which shall learn")
    return chosen


def _is_attention(layer: Layer) -> bool:
    return layer.is_attention


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a linear layer or a 2D convolution that is called itself (torch's own attention calls none)."""
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros"
    is_linear = isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features"))
    return is_linear and not isinstance(module, NonDynamicallyQuantizableLinear)


def _check_module(layer: Layer, module: nn.Module | None) -> None:
    if module is None or not _is_plain(module):
        got = f"{layer.name}: {type(module).__name__}"
        raise OptionError("only linear layers and plain 2D convolutions can be trained", got, "leave it out")
