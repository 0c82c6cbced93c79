"""What decomposing and comparing cost, and how that grows: `python -m benchmarks.spectra [--profile smoke|full]`.

Writes benchmarks/results/spectra-<profile>.json and, in full, docs/images/growth-layers.png, -width.png and -rank.png.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from safetensors.torch import save_file
from torch import Tensor

from demo.synthetic import base_tensors, falling, resized, unet_of
from lorax import Engine, compare_bases, open_base
from lorax.linalg import decompose, leading_subspace
from lorax.models.families import families
from lorax.models.layers import Layer

from .__main__ import RESULTS, hardware, run

RANK = 320
PICTURES = Path(__file__).parents[1] / "docs" / "images"
LAYERS, WIDTHS, RANKS = (1, 2, 4, 8), (40, 80, 160, 320), (16, 64, 160, 320, 640, 1280)


def loop(weight: Tensor, rank: int) -> Tensor:
    """Do what a user would write."""
    return torch.linalg.svd(weight, full_matrices=False)[0][:, :rank]


WAYS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "svd-loop": loop,
    "exact": lambda weight, rank: decompose(weight, rank).U,
    "fast": lambda weight, rank: leading_subspace(weight, rank).U,
}


def seconds(work: Callable[[], object]) -> float:
    """Return how long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def attention(channels: int) -> list[Layer]:
    family = resized(families()["sdxl"], model_channels=channels)
    parameters = unet_of(family).parameters().items()
    shapes = {key.removesuffix(".weight"): shape for key, shape in parameters if key.endswith("weight")}
    return [layer for layer in family.layers(shapes) if layer.is_attention]


def subspaces(layers: list[Layer], device: str) -> list[dict[str, Any]]:
    """Decompose every attention weight of an SDXL, in each way; errors against float64."""
    generator, rows = torch.Generator().manual_seed(0), []
    shapes = [layer.matrix_shape for layer in layers]
    weights = {shape: falling(shape, generator).to(device) for shape in dict.fromkeys(shapes)}
    rank = min(RANK, min(map(min, shapes)) // 2)
    for who, way in WAYS.items():
        worst = 0.0
        for weight in weights.values():
            basis, exact = way(weight, rank).double(), loop(weight.double(), rank)
            worst = max(worst, float((basis - exact @ (exact.T @ basis)).norm()) / rank**0.5)
        took = seconds(lambda way=way: [way(weights[shape], rank)[0, 0].item() for shape in shapes])
        rows.append({"who": who, "matrices": len(shapes), "rank": rank, "seconds": took, "subspace_error": worst})
        print(rows[-1], flush=True)
    return rows


def similarity(layers: list[Layer], channels: int, device: str) -> list[dict[str, Any]]:
    """Compare two SDXL, all pairs of a kind; the formula of pairwise SVDs is timed by shape and counted up."""
    shape = resized(families()["sdxl"], model_channels=channels)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.safetensors" for name in ("source", "target")]
        for path, change in zip(paths, (0.0, 0.1), strict=True):
            save_file(base_tensors(shape, 1, change=change), path)
        took = seconds(lambda: compare_bases(*map(open_base, paths), engine=Engine(device)))
    decomposed = pairs = 0.0
    count = 0
    generator = torch.Generator().manual_seed(0)
    for (m, n), number in Counter(layer.matrix_shape for layer in layers).items():
        weight = falling((m, n), generator).to(device)
        decomposed += 2 * number * seconds(lambda weight=weight: torch.linalg.svd(weight, full_matrices=False))
    for kind in {layer.kind for layer in layers}:
        for d, number in (
            item for side in (0, 1) for item in Counter(x.matrix_shape[side] for x in layers if x.kind == kind).items()
        ):
            U = torch.randn(d, min(d, max(layer.matrix_shape[0] for layer in layers)), device=device)
            pairs += number**2 * min(seconds(lambda U=U: float((U.T @ U).square().sum())) for _ in range(3))
            count += number**2
    rows: list[dict[str, Any]] = [
        {"who": "ours", "layers": 2 * len(layers), "seconds": took},
        {"who": "pairwise-svd", "layers": 2 * len(layers), "seconds": decomposed + pairs, "counted_up": True,
         "seconds_decomposing": decomposed, "seconds_comparing": pairs, "products": count},
    ]  # fmt: skip
    print(*rows, sep="\n", flush=True)
    return rows


def growth(device: str) -> dict[str, list[dict[str, Any]]]:
    """Return time and memory of a transfer by number of layers and by width, and the time of a layer by rank."""
    found: dict[str, list[dict[str, Any]]] = {"layers": [], "width": [], "rank": []}
    works = [("layers", f"sd1:{depth}", 160) for depth in LAYERS] + [("width", "sd1", width) for width in WIDTHS]
    for axis, work, channels in works:
        with tempfile.TemporaryDirectory() as folder:
            run("make", work, folder, str(channels))
            for who in ("ours", "svd-loop"):
                row = run(who, folder, "project", device)
                found[axis].append({"x": row["layers"] if axis == "layers" else channels, **row})
                print(found[axis][-1], flush=True)
    weight = falling((1280, 1280), torch.Generator().manual_seed(0)).to(device)
    for rank in RANKS:
        for who, way in WAYS.items():
            took = min(seconds(lambda way=way, rank=rank: way(weight, rank)[0, 0].item()) for _ in range(3))
            found["rank"].append({"x": rank, "who": who, "seconds": took})
    return found


def draw(found: dict[str, list[dict[str, Any]]]) -> None:
    """Draw a picture for each axis."""
    names = {
        "layers": "attention layers (width 160 to 640)",
        "width": "width of the first level (128 layers)",
        "rank": "rank (one weight of 1280 x 1280)",
    }
    for axis, rows in found.items():
        figure, left = plt.subplots(figsize=(6, 3.6), dpi=120, layout="constrained")
        right = left.twinx() if axis != "rank" else None
        for who, style in {"svd-loop": "--s", "ours": "-o", "exact": "-o", "fast": "-^"}.items():
            mine = [row for row in rows if row["who"] == who]
            if mine:
                (line,) = left.plot(
                    [r["x"] for r in mine], [r["seconds"] for r in mine], style, label=f"{who}, seconds"
                )
                if right is not None:
                    memory = [row["peak_gb"] for row in mine]
                    right.plot([row["x"] for row in mine], memory, ":", color=line.get_color(), label=f"{who}, memory")
        left.set(xlabel=names[axis], ylabel="seconds", ylim=(0, None))
        left.grid(alpha=0.3)
        handles, labels = left.get_legend_handles_labels()
        if right is not None:
            right.set(ylabel="peak memory, GB (dotted)", ylim=(0, None))
            more = right.get_legend_handles_labels()
            handles, labels = handles + more[0], labels + more[1]
        left.legend(handles, labels, fontsize=8)
        figure.savefig(PICTURES / f"growth-{axis}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", choices=["full", "smoke"], default="full")
    parser.add_argument("--device", default="cpu")
    profile, device = (parsed := parser.parse_args()).profile, parsed.device
    channels = 320 if profile == "full" else 32
    layers = attention(channels)
    result = {"hardware": hardware(), "profile": profile, "device": device}
    result["subspaces"] = subspaces(layers, device)
    result["similarity"] = similarity(layers, channels, device)
    if profile == "full":
        result["growth"] = growth(device)
        draw(result["growth"])
    path = RESULTS / f"spectra-{profile}-{device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
