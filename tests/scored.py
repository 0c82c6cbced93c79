"""A similarity without bases."""

from types import SimpleNamespace

import numpy as np

from lorax.compare.scores import ScoreTable
from lorax.compare.similarity import KindSimilarity, Similarity
from lorax.models.layers import Layer


def layout(blocks, kinds=8):
    """A similarity of two bases that have no weights: as many transformer blocks as SDXL, and random scores."""
    generator = np.random.default_rng(0)
    names = [f"attn{1 + i // 4}.to_{'qkvo'[i % 4]}" for i in range(kinds)]
    layers = {
        name: [Layer(f"unet.mid_block.attentions.0.transformer_blocks.{i}.{name}", (1280, 1280)) for i in range(blocks)]
        for name in names
    }
    found = []
    for name in names:
        phi = generator.uniform(0.4, 1, (2, blocks, blocks))
        sides = [ScoreTable(side, np.full_like(side, 0.5)) for side in phi]
        found.append(KindSimilarity(f"unet:{name}", layers[name], layers[name], *sides))
    base = SimpleNamespace(layers={layer.name: layer for kind in layers.values() for layer in kind})
    return Similarity("a", "b", None, ("", ""), found), base
