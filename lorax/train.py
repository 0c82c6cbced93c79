"""Training LoRA-X: chosen layers of a model learn to move their leading singular values, and nothing else.

`y = W x + U (delta * (V^T x))` (arXiv 2501.16559): two thin products beside the layer's own, only `delta` learns.

    with attach(model, rank=320) as layers:
        train(layers, loss, steps=1000)
    save_adapter(layers.adapter("style"), "style.safetensors")

`train` takes any module that has parameters to learn, a model of PEFT too.
"""

import math
import os
import signal
import threading
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.optim import AdamW, Optimizer
from typing_extensions import Self

from .adapters import Adapter, LoraXLayer
from .base import Base, in_our_order, module_base, module_place
from .checkpoint import Checkpoint, random_state, seed_all, set_random_state
from .engine import Engine
from .errors import MismatchError, NumericsError, OptionError
from .layers import Layer, Rows
from .linalg import Subspace
from .options import CLIP_NORM, LEARNING_RATE, RANK
from .output import check_output
from .progress import Progress, silent
from .similarity import check_rank


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
        return Adapter(name, self._base.family, "lora-x", {own.layer.name: own for own in layers}, self.unused)

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
        own = known.get(layer.name)
        where = engine or Engine(str(weight.device))
        space = where.triplets(base, layer.name, own.rank if own is not None else rank or RANK)
        if space.rank:
            kept = dtype or (weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else None)
            U = in_our_order(space.U, layer, place[0])  # which is its own inverse
            U, Vh = (part.to(weight.device, kept or torch.float32) for part in (U, space.Vh))
            delta = torch.zeros(space.rank) if own is None else own.delta
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
    for name, own in start.resolved(base).layers.items():
        if not isinstance(own, LoraXLayer):
            raise OptionError("only a LoRA-X can be trained on", f"{name} is {own.kind}", "convert it to LoRA-X first")
        if name not in base.layers:
            raise MismatchError("the adapter has a layer that the model has not", name, "give the adapter's own base")
        own.check_source(base)
        layers[name] = own
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
            found = [base.layers[name]] if name in base.layers else base.layers.find("unet", name)
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


@dataclass(frozen=True, slots=True)
class Training:
    """What a training gave.

    Attributes:
        losses: The loss of each step, from the first on, also of those before a resume.
        interrupted: Whether it was ended early, by Ctrl-C.
    """

    losses: list[float]
    interrupted: bool = False


def train(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    *,
    learning_rate: float = LEARNING_RATE,
    optimizer: Callable[..., Optimizer] = AdamW,
    grad_accumulation_steps: int = 1,
    clip_norm: float = CLIP_NORM,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 0,
    resume: bool = False,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Training:
    """Minimise a loss over the parameters of a module that require a gradient.

    The state is always that after a whole step. Ctrl-C ends the training and what was learnt so far stays in `module`;
    so it is where an error is raised. The random numbers of torch, NumPy and Python are seeded, and are after it what
    they were before.

    Args:
        module: What learns: `LoraXLayers`, a model of PEFT, any module.
        loss: Called with 0, 1, 2, ... (`grad_accumulation_steps` times a step); returns a scalar to minimise. Random
            numbers that it draws are the same each time for one `seed`.
        steps: Steps of the optimizer in all, those before a resume included.
        learning_rate: For the optimizer.
        optimizer: Called with (parameters, lr=learning_rate).
        grad_accumulation_steps: How many losses make a step; the mean counts.
        clip_norm: Longest gradient, all parameters together; `math.inf` clips nothing.
        seed: Of all random numbers.
        checkpoint: A file to write the whole state to at the end, however it comes, for `resume`.
        checkpoint_every: Write it also after every so many steps; 0 does not.
        resume: Go on from `checkpoint`: the result is bit for bit that of a training that never stopped.
        on_step: Called after each step with its number (1, 2, ...) and its loss; an exception ends the training.

    Returns:
        The losses.

    Raises:
        NumericsError: The loss or the gradient of a step is NaN or Inf; that step is not taken.
        OptionError: An argument is out of range, or nothing requires a gradient.
        FileError: The checkpoint cannot be read.
        MismatchError: It is of other parameters or of another optimizer.
        OutputError: It cannot be written.
    """
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    _check_options(steps, grad_accumulation_steps, len(parameters), resume=resume and checkpoint is None)
    path = None if checkpoint is None else check_output(checkpoint, [])
    kept, interrupted = random_state(), False
    try:
        seed_all(seed)
        state = Checkpoint(names, parameters, optimizer(parameters, lr=learning_rate))
        if resume and path is not None:
            state.load(path)
        losses = state.losses
        try:
            for step in range(len(losses), steps):
                value = _backward(loss, step, steps, grad_accumulation_steps)
                if not math.isfinite(float(nn.utils.clip_grad_norm_(parameters, clip_norm))):
                    raise _diverged("gradient", step, steps)
                with _uninterrupted():
                    state.optimizer.step()
                    state.optimizer.zero_grad()
                    losses.append(value)
                    state.random = random_state()
                if path is not None and checkpoint_every and (step + 1) % checkpoint_every == 0:
                    state.save(path)
                on_step(step + 1, value)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            state.optimizer.zero_grad()
            if path is not None:
                state.save(path)
    finally:
        set_random_state(kept)
    return Training(losses, interrupted)


def thinned(count: int, most: int) -> list[int]:
    """Return at most `most` of the steps 1 to `count`, evenly spaced, the last among them: what a curve can show."""
    return list(range(count, 0, -max(1, -(-count // most))))[::-1]


def _backward(loss: Callable[[int], Tensor], step: int, steps: int, parts: int) -> float:
    """Add up the gradient of the mean of `parts` losses; return that mean."""
    total = 0.0
    for part in range(parts):
        value = loss(step * parts + part) / parts
        total += float(value.detach())
        if not math.isfinite(total):
            raise _diverged("loss", step, steps)
        value.backward()
    return total


def _diverged(what: str, step: int, steps: int) -> NumericsError:
    fix = "what was learnt before is kept; lower the learning rate, or train in float32"
    return NumericsError(f"the {what} is NaN or Inf", f"step {step + 1} of {steps}", fix)


def _check_options(steps: int, parts: int, learning: int, *, resume: bool) -> None:
    if steps < 1 or parts < 1:
        raise OptionError("a training has at least one step", f"steps {steps}, accumulated {parts}", "give 1 or more")
    if not learning:
        raise OptionError("nothing can learn", "no parameter requires a gradient", "attach LoRA-X layers to the model")
    if resume:
        raise OptionError("nothing to resume", "no checkpoint", "give the checkpoint file")


@contextmanager
def _uninterrupted() -> Generator[None]:
    """Let Ctrl-C wait until what is done together is done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread only
        return
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        raise KeyboardInterrupt
