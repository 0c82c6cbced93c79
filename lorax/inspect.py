"""What a file is, read from no more of it than is needed."""

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from .errors import FormatError, LoraxError
from .files.ggufile import open_tensors
from .models.base import open_base
from .models.basefiles import is_adapter

# Numbers of a dense update whose norm is worth its memory (0.8 GB): a small file can stand for a very large one. The
# largest layer of FLUX.1 has 2^25.8.
DENSE = 2**26


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe an adapter or a base model as plain data.

    Of a base only the header is read; of an adapter all, for its norms.

    Args:
        path: A file, or the folder of a diffusers pipeline.

    Returns:
        `kind` (`adapter` or `base`) and what there is to say about it.

    Raises:
        FileError: The file is missing or damaged.
        FormatError: It is neither.
        NumericsError: An adapter holds NaN or Inf.
    """
    path = Path(path)
    if os.path.isfile(path) and is_adapter(open_tensors(path)):
        return _adapter(path)
    try:
        return _base(path)
    except FormatError as error:
        try:
            return _adapter(path)
        except LoraxError:
            raise error from None


def _base(path: Path) -> dict[str, Any]:
    base = open_base(path)
    layers = Counter(layer.kind for layer in base.layers.values())
    return {
        "kind": "base",
        "file": base.name,
        "family": base.family.name,
        "family_label": base.label,
        "naming": base.naming,
        "components": base.components,
        "parameters": base.parameters,
        "dtypes": dict(base.dtypes),
        "layers": len(base.layers),
        "layers_by_kind": dict(sorted(layers.items())),
    }


def _adapter(path: Path) -> dict[str, Any]:
    from .adapters import AdapterLayer, load_adapter

    def is_large(update: AdapterLayer) -> bool:
        return not update.is_thin and math.prod(update.layer.shape) > DENSE

    adapter = load_adapter(path)
    rows: list[dict[str, Any]] = []
    for name, update in adapter.layers.items():
        rows.append(
            {
                "layer": name,
                "shape": list(update.layer.shape),
                "rank": update.rank,
                "kind": update.kind,
                "alpha": getattr(update, "alpha", None),
                # Of a DoRA, GLoRA or rotation the size depends on the weights of the base.
                "norm": None if update.norm_needs_weight or is_large(update) else update.norm(),
                "dtype": str(update.dtype).removeprefix("torch."),
            }
        )
    norms = [row["norm"] for row in rows]
    return {
        "kind": "adapter",
        "file": adapter.name,
        "format": adapter.kind,
        "naming": adapter.naming,
        "family": adapter.family.name if adapter.family else None,
        "family_label": adapter.family_label or "unknown",
        "layers": len(rows),
        "layers_by_component": dict(Counter(update.layer.component for update in adapter.layers.values())),
        "layers_by_kind": dict(Counter(update.kind for update in adapter.layers.values())),
        "ranks": dict(sorted(adapter.ranks.items())),
        "alphas": dict(Counter("none" if row["alpha"] is None else f"{row['alpha']:g}" for row in rows)),
        "dtypes": dict(Counter(row["dtype"] for row in rows)),
        "norm": None if None in norms else sum(norm**2 for norm in norms) ** 0.5,
        "rows": rows,
        "unused": dict(adapter.unused),
        "metadata": dict(adapter.metadata),
    }
