"""The node that makes a LoRA-X of an adapter, and the way back that other nodes take."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import replace
from weakref import WeakKeyDictionary

from ..lorax.adapters import Adapter, LoraXLayer
from ..lorax.adapters.convert import KEEP_THE_LORA, convert_to_lora, convert_to_lora_x
from ..lorax.checks import highest_rank
from ..lorax.compare.scores import finite_mean
from ..lorax.models.base import Base
from ..lorax.transfer.report import WEAK
from . import host
from .host import io
from .types import CATEGORY, AdapterPort, base_input, node_schema, rank_input

# Adapter -> (state of the model, what became of the adapter on it): changing the strength never decomposes again.
_remembered: WeakKeyDictionary[Adapter, tuple[object, Adapter]] = WeakKeyDictionary()


class LoraXConvert(io.ComfyNode):
    """Project an adapter onto its own base model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return node_schema(
            node_id="LoraXConvert",
            display_name="Convert to LoRA-X",
            category=CATEGORY,
            search_aliases=["lora to lora-x", "project lora", "shrink lora", "compress lora"],
            description="Projects an ordinary LoRA onto its own base model: only changes of singular values are left.",
            inputs=[
                AdapterPort.Input("adapter", tooltip="From the LoRA-X Loader."),
                base_input("source", "The base model that the adapter was made for."),
                rank_input("Singular values that may move in each layer."),
                io.Clip.Input("source_clip", optional=True, tooltip="Its text encoder, to convert those layers too."),
            ],
            outputs=[
                AdapterPort.Output(display_name="adapter", tooltip="The LoRA-X adapter."),
                io.String.Output(display_name="report", tooltip="How much of the update is left."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, adapter: Adapter, source: host.Model | Base, rank: int, source_clip: host.Clip | None = None
    ) -> io.NodeOutput:
        """Project it."""
        base = host.open_model(source, source_clip, host.file_of(cls.hidden, "source"))
        most = highest_rank(base.layers.values())
        converted, shares = host.compute(
            lambda engine, progress: convert_to_lora_x(
                adapter, base, rank=min(rank, most), engine=engine, progress=progress
            ),
            len(adapter.layers),
        )
        mean = finite_mean(shares.values())
        kept = "nothing" if math.isnan(mean) else f"{mean:.0%}"
        text = f"{len(shares)} of {len(adapter.layers)} layers converted, {kept} of the norm kept on average"
        if left := [name for name in converted.unused if name not in adapter.unused]:
            text += f"\n{len(left)} not converted, the first {left[0]}: {converted.unused[left[0]]}"
        if mean < WEAK:
            text += f"\nwarning: {KEEP_THE_LORA}"
        return io.NodeOutput(converted, text, ui=host.shown(cls.hidden, text))


def has_lora_x(adapter: Adapter) -> bool:
    """Whether a layer of an adapter is a LoRA-X, which means something only on its own base."""
    return any(isinstance(layer, LoraXLayer) for layer in adapter.layers.values())


def as_lora(adapter: Adapter, base: Base, components: Container[str] | None = None) -> Adapter:
    """Return an adapter as its base names it, its LoRA-X layers (those of `components`, if given) as LoRA layers."""
    adapter = adapter.resolved(base)
    changes = {
        name: update
        for name, update in adapter.layers.items()
        if isinstance(update, LoraXLayer) and (components is None or update.layer.component in components)
    }
    lora = host.compute(
        lambda engine, progress: convert_to_lora(
            replace(adapter, layers=changes), base, engine=engine, progress=progress
        ),
        len(changes),
    )
    return replace(adapter, layers={**adapter.layers, **lora.layers})


def remembered_as_lora(adapter: Adapter, model: host.Model, clip: host.Clip | None) -> Adapter:
    """Return what `as_lora` makes of an adapter on a model, from memory where that was done before."""
    if not has_lora_x(adapter):
        return adapter
    state = host.state_of(model, clip)
    before, result = _remembered.get(adapter, (None, adapter))
    if before != state:
        base = host.open_model(model, clip)
        result = as_lora(adapter, base, base.components)
        _remembered[adapter] = (state, result)
    return result
