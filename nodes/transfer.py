"""Nodes that move and apply adapters."""

from __future__ import annotations

from ..lorax.adapters import Adapter
from ..lorax.checks import highest_rank
from ..lorax.compare.similarity import Similarity
from ..lorax.models.base import Base
from ..lorax.options import DEFAULTS, Dora, Matching, Method
from ..lorax.transfer.report import TransferReport
from ..lorax.transfer.run import transfer_adapter
from . import host
from .convert import remembered_as_lora
from .host import io
from .types import (
    CATEGORY,
    SHOWN_AGAIN,
    AdapterPort,
    SimilarityPort,
    base_input,
    cache_input,
    node_schema,
    rank_input,
    strength_input,
)

# What users who have a LoRA of another base look for.
SEARCHED = [
    "convert lora sd15 to sdxl",
    "convert lora to flux",
    "convert sdxl lora to pony",
    "migrate lora",
    "move lora",
    "port lora",
    "lora for another model",
    "lora to other checkpoint",
]


class LoraXTransfer(io.ComfyNode):
    """Move an adapter to another base model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return node_schema(
            node_id="LoraXTransfer",
            display_name="LoRA-X Transfer",
            category=CATEGORY,
            search_aliases=SEARCHED,
            advanced=["rank", "matching", "dora", "cache"],
            description="Moves an adapter from the base model it was made for to another, without training. Reports what "
            "arrived before anything is sampled.",
            inputs=[
                AdapterPort.Input("adapter", tooltip="From the LoRA-X Loader."),
                base_input("source", "The base model that the adapter was made for; Base from File saves its memory."),
                base_input("target", "The base model that it shall work on."),
                io.Combo.Input(
                    "method",
                    options=list(map(str, Method)),
                    default=str(DEFAULTS.method),
                    tooltip="auto: onto the paired layer, less what the target does already; align where the width changes.",
                ),
                rank_input(
                    "Leading singular directions that count, for all methods but copy and orthogonal. A smaller layer uses all."
                ),
                io.Float.Input(
                    "threshold",
                    default=DEFAULTS.threshold,
                    min=-10.0,
                    max=0.99,
                    step=0.01,
                    tooltip="A layer gets the update when its similarity, chance taken off, is above this. 0 is chance.",
                ),
                io.Combo.Input(
                    "matching",
                    options=list(map(str, Matching)),
                    default=str(DEFAULTS.matching),
                    optional=True,
                    tooltip="Pairing of blocks. auto: by number where both models have the same blocks, else by "
                    "similarity, in order. argmax: each module takes the most similar one (the published rule).",
                ),
                io.Combo.Input(
                    "dora",
                    options=list(map(str, Dora)),
                    default=str(DEFAULTS.dora),
                    optional=True,
                    tooltip="How a DoRA moves. direction: its magnitudes follow in proportion. dense: as a LoRA.",
                ),
                cache_input(),
                SimilarityPort.Input(
                    "similarity",
                    optional=True,
                    tooltip="From Subspace Similarity of the same two models: saves comparing again.",
                ),
                io.Clip.Input(
                    "source_clip", optional=True, tooltip="Text encoder of the source, to move those layers too."
                ),
                io.Clip.Input(
                    "target_clip", optional=True, tooltip="Text encoder of the target, to move those layers too."
                ),
            ],
            outputs=[
                AdapterPort.Output(display_name="adapter", tooltip="The adapter for the target."),
                io.String.Output(display_name="report", tooltip="What arrived, what did not and why."),
                io.Float.Output(
                    display_name="suggested_strength",
                    tooltip="Makes up for norm that was lost; 1 where layers are missing. Connect it to Apply if you like.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        adapter: Adapter,
        source: host.Model | Base,
        target: host.Model | Base,
        method: str,
        rank: int,
        threshold: float,
        matching: str = DEFAULTS.matching,
        dora: str = DEFAULTS.dora,
        cache: bool = True,
        similarity: Similarity | None = None,
        source_clip: host.Clip | None = None,
        target_clip: host.Clip | None = None,
    ) -> io.NodeOutput:
        """Move it."""
        base_s = host.open_model(source, source_clip, host.file_of(cls.hidden, "source"))
        base_t = host.open_model(target, target_clip, host.file_of(cls.hidden, "target"))
        most = highest_rank([*base_s.layers.values(), *base_t.layers.values()])
        words = {"method": method, "threshold": threshold, "matching": matching, "dora": dora}
        options = DEFAULTS.changed({"rank": min(rank, most), **words})
        moved, report = host.compute(
            lambda engine, progress: transfer_adapter(
                adapter,
                base_s,
                base_t,
                options,
                similarity=similarity,
                engine=engine,
                progress=progress,
            ),
            len(adapter.layers),
            cache=cache,
        )
        text = summary(report)
        strength = report.suggested_strength or 1.0
        return io.NodeOutput(moved, text, strength, ui=host.shown(cls.hidden, text, lorax_report=report.to_json()))


def summary(report: TransferReport) -> str:
    """Return what a transfer did, in a few lines."""
    lines = [report.summary, *report.assignment.summary, *(f"warning: {warning}" for warning in report.warnings)]
    return "\n".join(lines)


class LoraXApply(io.ComfyNode):
    """Patch a model with an adapter."""

    HAS_INTERMEDIATE_OUTPUT = SHOWN_AGAIN

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return node_schema(
            node_id="LoraXApply",
            display_name="Apply Transferred LoRA-X",
            category=CATEGORY,
            search_aliases=["apply moved lora", "patch model with adapter"],
            description="Patches a model with an adapter, as LoRA loaders do: strengths add up, saving bakes it.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the adapter now fits."),
                AdapterPort.Input("adapter", tooltip="A transferred adapter, or one on its own base model."),
                strength_input(),
                io.Clip.Input("clip", optional=True, tooltip="Text encoder, for an adapter that has layers for it."),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The patched model, for a sampler."),
                io.Clip.Output(display_name="CLIP", tooltip="The patched text encoder; nothing if none was given."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(
        cls, model: host.Model, adapter: Adapter, strength: float, clip: host.Clip | None = None
    ) -> io.NodeOutput:
        """Patch it."""
        loras = remembered_as_lora(adapter, model, clip)
        patched, patched_clip, missing = host.apply_adapter(model, clip, loras, strength)
        text = f"{len(adapter.layers) - len(missing)} of {len(adapter.layers)} layers applied"
        if missing:
            text += f"; no place for {len(missing)}, the first {missing[0]}"
        return io.NodeOutput(patched, patched_clip, ui=host.shown(cls.hidden, text))
