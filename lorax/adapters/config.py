"""The scale of an adapter where PEFT and diffusers keep it: beside the file, or in its metadata."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..tensorfile import TensorFile, parse_json, read_json

# end of a module path -> its place in the file, and the value
Patterns = Mapping[str, tuple[int, float]]


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What `adapter_config.json` says of scales."""

    alpha: float | None = None
    rank: float | None = None
    use_rslora: bool = False
    alphas: Patterns = field(default_factory=dict[str, tuple[int, float]])
    ranks: Patterns = field(default_factory=dict[str, tuple[int, float]])

    def alpha_of(self, path: str, rank: int) -> float | None:
        """Return the alpha of a module whose update has this rank; None if nothing is said."""
        alpha = _matching(self.alphas, path, self.alpha)
        return alpha if alpha is None or not self.use_rslora else alpha * rank**0.5

    def scale_of(self, path: str) -> float:
        """Return `alpha / r` of a module: what PEFT multiplies a LoKr of two whole factors by. 1 if nothing is said."""
        alpha, rank = _matching(self.alphas, path, self.alpha), _matching(self.ranks, path, self.rank)
        return 1.0 if alpha is None or not rank else alpha / rank


def peft_config(file: TensorFile) -> PeftConfig:
    """Read the configuration of an adapter file; empty where there is none.

    Raises:
        FormatError: It is there and not readable.
    """
    beside = Path(file.path).with_name("adapter_config.json")
    inside = file.metadata.get("lora_adapter_metadata")
    try:
        loaded: dict[str, Any] = {}
        if inside or os.path.isfile(beside):
            loaded = parse_json(inside) if inside else read_json(beside)
        config = {re.sub(r"^(unet|transformer)\.", "", key): value for key, value in loaded.items()}
        return PeftConfig(
            alpha=_number(config.get("lora_alpha", config.get("alpha"))),
            rank=_number(config.get("r")),
            use_rslora=bool(config.get("use_rslora")),
            alphas=_patterns(config.get("alpha_pattern")),
            ranks=_patterns(config.get("rank_pattern")),
        )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        where = f"the metadata of {file.path}" if inside else str(beside)
        raise FormatError("the adapter's configuration is not readable", where, "mend it or take it away") from error


def _number(value: object) -> float | None:
    return None if value is None else _finite(value)


def _finite(value: object) -> float:
    number = float(str(value))
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def _patterns(entries: Mapping[str, object] | None) -> Patterns:
    return {key: (place, _finite(value)) for place, (key, value) in enumerate((entries or {}).items())}


def _matching(patterns: Patterns, path: str, default: float | None) -> float | None:
    """Return the value of the first pattern that is the path, or its end after a dot."""
    ends = (path[start:] for start in (0, *(dot.end() for dot in re.finditer(r"\.", path))))
    return min((patterns[end] for end in ends if end in patterns), default=(0, default))[1]
