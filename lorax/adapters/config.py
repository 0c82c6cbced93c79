"""The scale of an adapter where it is not beside its tensors: in PEFT's configuration, or in the header of the file."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..files.longpath import on_disk
from ..files.tensorfile import TensorFile, parse_json, read_json
from ..models.layers import MAIN
from .pattern import Patterns

# The name under which PEFT looks for the weights beside an `adapter_config.json`.
PEFT_FILE = "adapter_model.safetensors"
# How diffusers calls the components in `lora_adapter_metadata`.
COMPONENTS = (*MAIN, "text_encoder", "text_encoder_2", "text_encoder_3")
# What trainers call the one alpha of a file in its header, where no layer has a tensor of it (diffusers reads `alpha`,
# SGLang all three). Not `ss_network_alpha`: that is kohya's record of the training, which stays when a converter has
# put the scale into the factors.
HEADER_ALPHA = ("lora_alpha", "network_alpha", "alpha")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What a configuration of PEFT says of scales."""

    alpha: float | None = None
    rank: float | None = None
    use_rslora: bool = False
    alphas: Patterns = field(default_factory=lambda: Patterns({}))
    ranks: Patterns = field(default_factory=lambda: Patterns({}))

    def alpha_of(self, path: str, rank: int) -> float | None:
        """Return the alpha of a module whose update has this rank; None if nothing is said."""
        alpha = self.alphas.value(path, self.alpha)
        return alpha if alpha is None or not self.use_rslora else alpha * rank**0.5

    def scale_of(self, path: str) -> float:
        """Return `alpha / r` of a module: what PEFT multiplies a LoKr of two whole factors by. 1 if nothing is said."""
        alpha, rank = self.alphas.value(path, self.alpha), self.ranks.value(path, self.rank)
        return 1.0 if alpha is None or not rank else alpha / rank


@dataclass(frozen=True, slots=True)
class Configs:
    """The configurations of an adapter file: that of each component, and that of every key in PEFT's own spelling."""

    components: Mapping[str, PeftConfig]
    peft: PeftConfig

    def of(self, component: str, naming: str) -> PeftConfig:
        """Return the configuration of a module, by its component (`unet` for the main model) and its naming."""
        found = self.components.get(component, self.components.get(""))
        return found or (self.peft if naming == "peft" else PeftConfig())


def read_files(adapter: Path) -> list[Path]:
    """Return the files that may be read for an adapter: its own, and the configuration beside it."""
    return [adapter, adapter.parent / "adapter_config.json"]


def read_configs(file: TensorFile) -> Configs:
    """Read what the header of an adapter file says of scales, and the `adapter_config.json` that belongs to it.

    That belongs to `adapter_model.safetensors`, as PEFT has it, and there to keys in PEFT's spelling
    (`base_model.model....`); to no other file of the folder. `lora_adapter_metadata`, diffusers' copy in the header,
    comes first; one alpha for the file in the header counts where no tensor is an alpha.

    Raises:
        FormatError: It is there and not readable, or the header says two alphas.
    """
    _, beside = read_files(file.path)
    inside = file.metadata.get("lora_adapter_metadata")
    if inside:
        return Configs(_parsed(f"the metadata of {file.path}", inside), PeftConfig())
    if file.path.name == PEFT_FILE and os.path.isfile(on_disk(beside)):
        return Configs({}, _parsed(str(beside), beside)["unet"])
    if any(key.endswith(".alpha") for key in file.entries):
        return Configs({}, PeftConfig())
    found = {name: alpha for name in HEADER_ALPHA if (alpha := _positive(file.metadata.get(name))) is not None}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{name} {alpha:g}" for name, alpha in found.items())
        raise FormatError("the header says two alphas", f"{said} in {file.path}", "take the wrong one out of it")
    return Configs({"": PeftConfig(alpha=next(iter(found.values())))} if found else {}, PeftConfig())


def _parsed(where: str, text: str | Path) -> dict[str, PeftConfig]:
    """Return the configuration of each component; what has no component is that of the main model, `unet`."""
    try:
        loaded: dict[str, Any] = read_json(text) if isinstance(text, Path) else parse_json(text)
        parts: dict[str, dict[str, Any]] = {"unet": {}}
        for key, value in loaded.items():
            component, _, name = key.partition(".")
            if component not in COMPONENTS or not name:
                component, name = "unet", key
            parts.setdefault("unet" if component in MAIN else component, {})[name] = value
        return {component: _config(part) for component, part in parts.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        got = f"{where} ({error})" if isinstance(error, ValueError) else where
        raise FormatError("the adapter's configuration is not readable", got, "mend it or take it away") from error


def _config(said: Mapping[str, Any]) -> PeftConfig:
    return PeftConfig(
        alpha=_number(said.get("lora_alpha", said.get("alpha"))),
        rank=_number(said.get("r")),
        use_rslora=bool(said.get("use_rslora")),
        alphas=_patterns(said.get("alpha_pattern")),
        ranks=_patterns(said.get("rank_pattern")),
    )


def _patterns(values: Mapping[str, object] | None) -> Patterns:
    return Patterns({key: _finite(value) for key, value in (values or {}).items()})


def _number(value: object) -> float | None:
    return None if value is None else _finite(value)


def _finite(value: object) -> float:
    number = float(str(value))
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def _positive(text: str | None) -> float | None:
    """Return the number that a free text of a header is; None if it is none, or none above 0."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 < number < math.inf else None
