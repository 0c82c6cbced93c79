"""The node that compares two models."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..lorax.compare.matching import Assignment, match_bases
from ..lorax.compare.scores import finite_mean
from ..lorax.compare.similarity import Similarity, compare_bases
from ..lorax.compute.engine import Engine
from ..lorax.models.base import Base
from ..lorax.progress import Progress
from ..lorax.show.pictures import similarity_picture
from ..lorax.show.view import similarity_view
from . import host
from .host import io
from .types import CATEGORY, SimilarityPort, base_input, cache_input, node_schema

LAYERS = ("attention", "all")


class LoraXSimilarity(io.ComfyNode):
    """Compare the subspaces of two models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return node_schema(
            node_id="LoraXSimilarity",
            display_name="Subspace Similarity",
            category=CATEGORY,
            search_aliases=[
                "compare models",
                "compare checkpoints",
                "compare base models",
                "model similarity",
                "difference of models",
            ],
            advanced=["rank", "cache"],
            description="Compares every layer of one model with every layer of its kind of another. Bright: the same subspace.",
            inputs=[
                base_input("source", "The base model that an adapter was made for."),
                base_input("target", "The base model that it shall move to."),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=16384,
                    tooltip="Compare only so many leading directions. 0 compares whole layers, and is fastest.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYERS),
                    default=LAYERS[0],
                    tooltip="attention: the projections where most adapters live. all: feed-forward and convolutions too.",
                ),
                cache_input(),
            ],
            outputs=[
                SimilarityPort.Output(display_name="similarity", tooltip="For LoRA-X Transfer of the same two models."),
                io.Image.Output(display_name="heatmap", tooltip="Source layers down, target layers across."),
                io.String.Output(
                    display_name="report", tooltip="Mean similarity of the layers of equal name, by kind."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, source: host.Model | Base, target: host.Model | Base, rank: int, layers: str, cache: bool = True
    ) -> io.NodeOutput:
        """Compare them."""
        base_s = host.open_model(source, name=host.file_of(cls.hidden, "source"))
        base_t = host.open_model(target, name=host.file_of(cls.hidden, "target"))
        result, pairs = host.compute(
            lambda engine, progress: _compare(base_s, base_t, rank, layers, engine, progress),
            len(base_s.layers) + len(base_t.layers),
            cache=cache,
        )
        text = describe(result)
        view = similarity_view(result, base_s, base_t, pairs)
        return io.NodeOutput(result, picture(result), text, ui=host.shown(cls.hidden, text, lorax_similarity=view))


def _compare(
    base_s: Base, base_t: Base, rank: int, layers: str, engine: Engine, progress: Progress
) -> tuple[Similarity, Assignment]:
    """Return the similarity of two bases, and which layer feeds which by it."""
    found = compare_bases(
        base_s, base_t, rank=rank or None, attention_only=layers == LAYERS[0], engine=engine, progress=progress
    )
    return found, match_bases(base_s, base_t, scores=found.scores, engine=engine, progress=progress)


def picture(similarity: Similarity) -> torch.Tensor:
    """Return the heat map as the host's IMAGE: `[1, height, width, 3]`, float32 from 0 to 1."""
    return torch.from_numpy(np.asarray(similarity_picture(similarity), dtype=np.float32) / 255)[None]


def describe(similarity: Similarity) -> str:
    """Return the mean corrected similarity of the layers of equal name, a line for each kind."""
    lines: list[str] = []
    for kind in similarity.kinds:
        mean = finite_mean(score.corrected for pair in kind.equal_names() for score in pair)
        lines.append(f"{kind.kind}: " + ("no layers of equal name" if math.isnan(mean) else f"{mean:.3f}"))
    return "\n".join(lines)
