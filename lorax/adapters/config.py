"""The scale of an adapter where PEFT and diffusers keep it: beside the file, or in its metadata."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..tensorfile import TensorFile


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What `adapter_config.json` says of scales."""

    alpha: float | None = None
    rank: float | None = None
    use_rslora: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict[str, float])
    ranks: Mapping[str, float] = field(default_factory=dict[str, float])

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
    text = file.metadata.get("lora_adapter_metadata") or (
        beside.read_text(encoding="utf-8") if beside.is_file() else ""
    )
    try:
        loaded: dict[str, Any] = json.loads(text) if text else {}
        config = {re.sub(r"^(unet|transformer)\.", "", key): value for key, value in loaded.items()}
        return PeftConfig(
            alpha=_number(config.get("lora_alpha", config.get("alpha"))),
            rank=_number(config.get("r")),
            use_rslora=bool(config.get("use_rslora")),
            alphas={key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
            ranks={key: float(value) for key, value in (config.get("rank_pattern") or {}).items()},
        )
    except (ValueError, AttributeError, TypeError) as error:
        raise FormatError(
            "the adapter's configuration is not readable", f"{beside}", "mend it or take it away"
        ) from error


def _number(value: object) -> float | None:
    return None if value is None else float(str(value))


def _matching(patterns: Mapping[str, float], path: str, default: float | None) -> float | None:
    return next(
        (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({re.escape(key)})", path)), default
    )
