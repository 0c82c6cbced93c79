"""The training loop: any loss, any module with parameters that learn, checkpoints that resume bit for bit."""

import math
import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..errors import NumericsError, OptionError
from ..files.output import check_output
from ..options import CLIP_NORM, LEARNING_RATE
from .state import Checkpoint, random_state, seed_all, set_random_state


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
