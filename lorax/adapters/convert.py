"""Changing the format of an adapter; its base stays the same."""

import math
from collections.abc import Mapping
from dataclasses import replace

from ..checks import check_positive, check_rank
from ..compute.engine import CPU, Engine
from ..errors import MismatchError
from ..linalg import norm
from ..models.base import Base
from ..options import LORA_RANK, RANK
from ..progress import Progress, silent
from . import Adapter, AdapterLayer, LoraLayer, LoraXLayer, VectorLayer, expand

# What a user should know where little of the norm is kept.
KEEP_THE_LORA = "little of an ordinary LoRA is a change of singular values; keep the LoRA too"


def convert_to_lora(
    adapter: Adapter,
    source: Base | None = None,
    *,
    rank: int = LORA_RANK,
    engine: Engine = CPU,
    progress: Progress = silent,
) -> Adapter:
    """Write every layer as a LoRA: a LoRA-X exactly, `U diag(delta) Vh`, other kinds as the best of a given rank.

    LoRA layers, and differences of norms and biases, stay as they are.

    Args:
        adapter: The adapter.
        source: The base that it was made for; needed where the update depends on the weight: LoRA-X, DoRA, GLoRA, OFT.
        rank: Of the LoRA that an update without thin factors becomes.
        engine: How and where to compute.
        progress: Called with (done, total, layer name).

    Raises:
        MismatchError: A layer without the source base that it needs.
        OptionError: `rank` is below 1.
        NumericsError: An update grows beyond the dtype of its result.
    """
    check_positive(rank)
    adapter = adapter if source is None else adapter.resolved(source)
    layers: dict[str, AdapterLayer] = {}
    for done, (name, update) in enumerate(adapter.layers.items(), 1):
        if not isinstance(update, VectorLayer) and not (isinstance(update, LoraLayer) and update.is_thin):
            B, A = expand(update, source, engine, rank)
            layer = source.layers.get(name, update.layer) if source is not None else update.layer
            if update.layer.shape and layer.matrix_shape != update.layer.matrix_shape:
                layer = update.layer
            update = LoraLayer.of(layer, B, A, update.computed_dtype, update)
            update.check_finite()
        layers[name] = update
        progress(done, len(adapter.layers), name)
    return replace(adapter, layers=layers)


def convert_to_lora_x(
    adapter: Adapter, source: Base, *, rank: int | None = None, engine: Engine = CPU, progress: Progress = silent
) -> tuple[Adapter, Mapping[str, float]]:
    """Project an adapter on the LoRA-X adapters of its base: `delta_i = u_i^T delta_weight v_i`.

    That is the closest LoRA-X in the Frobenius norm, as the `u_i v_i^T` are orthonormal. An ordinary LoRA keeps little
    of itself; the shares tell how much.

    Args:
        adapter: The adapter, made for `source`.
        source: Its base.
        rank: Singular values that may move in each layer; None means 320, or as many as the layer has.
        engine: How and where to compute.
        progress: Called with (done, total, layer name).

    Returns:
        The LoRA-X adapter, and for each layer `||delta|| / ||delta_weight||_F`. A layer that `source` does not have, or
        has in another size, is not in it but in `unused`.

    Raises:
        MismatchError: No layer belongs to `source`.
        OptionError: `rank` is out of range.
        NumericsError: An update grows beyond what float32 holds.
    """
    check_rank(rank, source.layers.values())
    adapter = adapter.resolved(source)
    layers: dict[str, AdapterLayer] = {}
    shares: dict[str, float] = {}
    left: dict[str, str] = {}
    for done, (name, update) in enumerate(adapter.layers.items(), 1):
        layer = source.layers.get(name)
        if layer is None or (update.layer.shape and update.layer.matrix_shape != layer.matrix_shape):
            left[name] = "the source base has no such layer" if layer is None else "the source layer has another size"
            continue
        B, A = expand(update, source, engine)
        space = engine.triplets(source, name, rank or RANK)
        converted = LoraXLayer(layer, space.singular_change(B, A).cpu(), source.fingerprint(name))
        converted.check_finite()
        before = norm(B, A)
        shares[name] = converted.norm() / before if before else math.nan
        layers[name] = converted
        progress(done, len(adapter.layers), name)
    if not layers:
        got = f"{adapter.name} and {source.name} ({source.family.label})"
        raise MismatchError("the adapter does not belong to the source base", got, "give the base that it was made for")
    unused, unread = {**adapter.unused, **left}, {**adapter.unread, **left}
    return replace(adapter, family=source.family, layers=layers, unused=unused, unread=unread, alternatives=()), shares
