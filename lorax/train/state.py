"""The state of a training in a file: parameters, optimizer, losses, random numbers. Safetensors and JSON, no pickle."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ..errors import FormatError, MismatchError, OptionError
from ..files.output import write_bytes
from ..files.tensorfile import TensorFile, parse_json, serialize

VERSION = "1"
# What reading of damaged content raises; errors of our own pass.
DAMAGED = (KeyError, IndexError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError, SafetensorError)


@dataclass(frozen=True, slots=True)
class RandomState:
    """Where the generators of torch (CPU, then each CUDA device), NumPy and Python stand."""

    torch: list[Tensor]
    numpy: Any
    python: Any


def random_state() -> RandomState:
    """Return where the global generators stand."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return RandomState([torch.get_rng_state(), *devices], np.random.get_state(), random.getstate())


def set_random_state(state: RandomState) -> None:
    """Put the global generators where they stood."""
    torch.set_rng_state(state.torch[0])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state.torch[1:])
    np.random.set_state(state.numpy)
    random.setstate(state.python)


def seed_all(seed: int) -> None:
    """Seed the global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@dataclass(slots=True)
class Checkpoint:
    """What a training is after a step.

    Attributes:
        names: Name of each parameter.
        parameters: What learns, in the order of the optimizer.
        optimizer: What moves them.
        losses: The loss of each step so far.
        random: The generators after the last step.
    """

    names: list[str]
    parameters: list[Parameter]
    optimizer: Optimizer
    losses: list[float] = field(default_factory=list[float])
    random: RandomState = field(default_factory=random_state)

    def save(self, path: Path) -> None:
        """Write it, whole or not at all.

        Raises:
            OptionError: The optimizer keeps what is neither tensor nor number.
            OutputError: The file cannot be written.
        """
        tensors: dict[str, Tensor] = {
            f"parameter.{name}": p for name, p in zip(self.names, self.parameters, strict=True)
        }
        plain: dict[str, Any] = {}
        for index, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                (tensors if isinstance(value, Tensor) else plain)[f"optimizer.{index}.{key}"] = value
        tensors |= {f"random.{i}": state for i, state in enumerate(self.random.torch)}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        numpy = [part.tolist() if isinstance(part, np.ndarray) else part for part in self.random.numpy]
        values = {
            "optimizer": type(self.optimizer).__name__,
            "plain": plain,
            "numpy": numpy,
            "python": self.random.python,
        }
        try:
            header = {"lorax_checkpoint_version": VERSION, "training": json.dumps(values, separators=(",", ":"))}
        except TypeError as error:
            got = f"{type(self.optimizer).__name__}: {error}"
            raise OptionError(
                "the state of this optimizer cannot be stored", got, "choose another optimizer"
            ) from error
        write_bytes(path, serialize(tensors, header))

    def load(self, path: Path) -> None:
        """Take everything from a file; parameters and optimizer are changed in place, the generators set.

        The settings of the optimizer, such as its learning rate, stay.

        Raises:
            FileError: The file is missing or damaged.
            FormatError: It is no checkpoint, or a damaged one; nothing was changed.
            MismatchError: It is of other parameters or of another optimizer; nothing was changed.
        """
        before, old = random_state(), self.optimizer.state_dict()
        try:
            held = _contents(path)
            self._check(path, held.tensors, held.optimizer)
            set_random_state(held.random)
            self.optimizer.load_state_dict(old | {"state": held.state})
        except DAMAGED as error:
            set_random_state(before)
            self.optimizer.load_state_dict(old)
            got = f"{path}: {type(error).__name__} {error}"
            raise FormatError("a damaged checkpoint of a training", got, "take an earlier one") from error
        with torch.no_grad():
            for name, parameter in zip(self.names, self.parameters, strict=True):
                parameter.copy_(held.tensors[f"parameter.{name}"])
        self.losses, self.random = held.losses, held.random

    def _check(self, path: Path, tensors: Mapping[str, Tensor], optimizer: str) -> None:
        held = {key.removeprefix("parameter."): value for key, value in tensors.items() if key.startswith("parameter.")}
        mine = dict(zip(self.names, self.parameters, strict=True))
        strange = [name for name in {**mine, **held} if name not in mine or name not in held]
        strange += [
            name
            for name in mine
            if name in held and (mine[name].shape, mine[name].dtype) != (held[name].shape, held[name].dtype)
        ]
        if strange:
            got = f"{path}: {strange[0]} and {len(strange) - 1} more of {len(mine)}"
            raise MismatchError("the checkpoint is of other parameters", got, "train the same layers at the same rank")
        if optimizer != type(self.optimizer).__name__:
            raise MismatchError("the checkpoint is of another optimizer", f"{path}: {optimizer}", "use that one")


@dataclass(frozen=True, slots=True)
class _Contents:
    """What a file holds: tensors by name, the optimizer's class and its state by index, losses, generators."""

    tensors: dict[str, Tensor]
    optimizer: str
    state: dict[int, dict[str, Any]]
    losses: list[float]
    random: RandomState


def _contents(path: Path) -> _Contents:
    """Read a file; what is wrong in it raises one of DAMAGED."""
    file = TensorFile(path)
    header = file.metadata
    if header.get("lorax_checkpoint_version") != VERSION:
        raise FormatError("no checkpoint of a training", str(path), "give the file that the training wrote")
    tensors, values = load(file.content()), parse_json(header["training"])
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **values["plain"]}.items():
        part, _, rest = key.partition(".")
        if part == "optimizer":
            index, _, name = rest.partition(".")
            state.setdefault(int(index), {})[name] = value
    version, words, gauss = values["python"]
    states = [tensors[f"random.{i}"] for i in range(sum(key.startswith("random.") for key in tensors))]
    kind, numbers, *rest = values["numpy"]
    numpy = (kind, np.array(numbers, dtype=np.uint32), *rest)
    losses = [float(loss) for loss in tensors["losses"].tolist()]
    return _Contents(
        tensors, values["optimizer"], state, losses, RandomState(states, numpy, (version, tuple(words), gauss))
    )
