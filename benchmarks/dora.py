"""The ways to move a DoRA, compared on a base whose rows have other lengths: writes benchmarks/results/dora.json.

python -m benchmarks.dora
"""

import json

import torch
from torch import Tensor

from demo.pruned import noisy
from demo.synthetic import falling
from lorax.adapters import LoraLayer
from lorax.adapters.layer import with_magnitude
from lorax.linalg import refactor
from lorax.models.layers import Layer
from lorax.options import LORA_RANK

from .__main__ import RESULTS, hardware

SIZE, RANK = 640, 8
# Changes of the target against the source: noise in norms of the weight, and of each row's length.
CHANGES = ((0.1, 0.0), (0.1, 0.1), (0.5, 0.1))


def lengths(update: Tensor, weight: Tensor) -> Tensor:
    """Return by how much an update changes the length of each row, as a share of it."""
    return (weight + update).norm(dim=1) / weight.norm(dim=1) - 1


def main() -> None:
    """Measure and write."""
    generator, rows = torch.Generator().manual_seed(0), []
    layer = Layer("unet.x", (SIZE, SIZE))
    source = falling((SIZE, SIZE), generator)
    up, down = torch.randn(SIZE, RANK, generator=generator), torch.randn(RANK, SIZE, generator=generator)
    up *= 0.05 * source.norm() / (up @ down).norm()
    magnitude = (source + up @ down).norm(dim=1, keepdim=True) * (1 + 0.02 * torch.randn(SIZE, 1, generator=generator))
    own = LoraLayer(layer, up, down, float(RANK), dora_scale=magnitude)
    update = own.delta_weight(source)
    for noise, length in CHANGES:
        target = noisy(source, noise, generator) * (1 + length * torch.randn(SIZE, 1, generator=generator))
        B, A = refactor(update, LORA_RANK)
        for way, moved in {
            "direction": with_magnitude(own, own.magnitude_on(source, target)).delta_weight(target),
            "dense": B @ A,
            "the file as it is": own.delta_weight(target),
        }.items():
            wanted, found = lengths(update, source), lengths(moved, target)
            rows.append(
                {
                    "noise": noise,
                    "row_lengths": length,
                    "way": way,
                    "norm_kept": float(moved.norm() / update.norm()),
                    "row_length_error": float((found - wanted).norm() / wanted.norm()),
                }
            )
            print(rows[-1])
    (RESULTS / "dora.json").write_text(json.dumps({"hardware": hardware(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
