"""One measurement in one process: prints a JSON object."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from demo.pruned import pruned_pair
from demo.synthetic import base_tensors, resized, unet_of
from lorax import Base, Cache, Engine, TransferOptions, load_adapter, open_base, save_adapter, transfer_adapter
from lorax.models.families import families
from lorax.options import Method

from .memory import peak

RANK, LORA_RANK, SAMPLE = 320, 16, 12


def make(work: str, folder: Path, channels: int) -> None:
    """Write source, target and a rank-16 LoRA on every attention layer of the U-Net; `sd1:4` has four times the blocks.

    The target is the source with a tenth of noise; in `sdxl-ssd1b` also with more than half of its blocks taken out.
    """
    truth: dict[str, str] = {}
    if work == "sdxl-ssd1b":
        _, _, truth = pruned_pair(folder, change=0.1, channels=channels, dtype=torch.float16)
    else:
        family, _, depth = work.partition(":")
        deeper = [blocks * int(depth or 1) for blocks in unet_of(families()[family]).transformer_depth]
        shape = resized(families()[family], model_channels=channels, transformer_depth=tuple(deeper))
        for name, change in (("source", 0.0), ("target", 0.1)):
            save_file(base_tensors(shape, 1, change=change), folder / f"{name}.safetensors")
    (folder / "truth.json").write_text(json.dumps(truth))
    generator, tensors = torch.Generator().manual_seed(3), {}
    for layer in open_base(folder / "source.safetensors").layers.values():
        if layer.is_attention:
            m, n = layer.matrix_shape
            tensors[f"{layer.name}.lora_B.weight"] = torch.randn(m, LORA_RANK, generator=generator)
            tensors[f"{layer.name}.lora_A.weight"] = torch.randn(LORA_RANK, n, generator=generator)
    save_file(tensors, folder / "lora.safetensors")


def ours(folder: Path, method: str, device: str, who: str) -> dict[str, str]:
    """Transfer as the command line does, files included; return the source of each layer of the target."""
    cache = Cache(folder / "cache", 2**36) if who in ("ours-filling", "ours-cached") else None
    source, target = open_base(folder / "source.safetensors"), open_base(folder / "target.safetensors")
    adapter = load_adapter(folder / "lora.safetensors", source)
    engine = Engine(device, cache)
    result, report = transfer_adapter(
        adapter, source, target, TransferOptions(method=Method(method), fast=who == "ours-fast"), engine=engine
    )
    save_adapter(result, folder / "out.safetensors")
    return {row.target: row.source for row in report.rows if row.target}


def svd_loop(folder: Path, device: str) -> dict[str, str]:
    """Do what a user would write: layers by name, the model in memory, one full SVD a layer."""
    target = load_file(folder / "target.safetensors")
    base = open_base(folder / "target.safetensors")
    adapter, out = load_file(folder / "lora.safetensors"), {}
    for name, layer in base.layers.items():
        if f"{name}.lora_A.weight" in adapter:
            W = target[f"model.diffusion_model.{layer.original}.weight"].float().to(device).reshape(layer.matrix_shape)
            U, _, Vh = torch.linalg.svd(W, full_matrices=False)
            U, Vh = U[:, :RANK], Vh[:RANK]
            B, A = adapter[f"{name}.lora_B.weight"].to(device), adapter[f"{name}.lora_A.weight"].to(device)
            out[f"{name}.lora_B.weight"] = (U @ U.T @ B).cpu()
            out[f"{name}.lora_A.weight"] = (A @ Vh.T @ Vh).cpu()
    save_file(out, folder / "out.safetensors")
    return {key.removesuffix(".lora_A.weight"): key.removesuffix(".lora_A.weight") for key in out if "lora_A" in key}


def error(folder: Path, target: Base, pairs: Mapping[str, str], device: str) -> float:
    """Return the largest relative error of a sample of layers against the formula in float64."""
    given, found = load_adapter(folder / "lora.safetensors", target), load_adapter(folder / "out.safetensors", target)
    names = list(found.layers)
    worst = 0.0
    for name in names[:: max(1, len(names) // SAMPLE)]:
        svd = torch.linalg.svd(target.weight(name, device).double(), full_matrices=False)
        U, Vh = svd.U[:, :RANK].cpu(), svd.Vh[:RANK].cpu()
        expected = U @ (U.T @ given.layers[pairs[name]].delta_weight().double() @ Vh.T) @ Vh
        difference = found.layers[name].delta_weight().double() - expected
        worst = max(worst, float(difference.norm() / expected.norm()))
    return worst


def main() -> None:
    what, *words = sys.argv[1:]
    if what == "make":
        family, folder, channels = words
        make(family, Path(folder), int(channels))
        print(json.dumps({}))
        return
    folder, method, device = Path(words[0]), words[1], words[2]
    torch.zeros(1, device=device)  # a GPU is awake before the clock starts
    start = time.perf_counter()
    pairs = svd_loop(folder, device) if what == "svd-loop" else ours(folder, method, device, what)
    row = {
        "who": what,
        "method": method,
        "device": device,
        "layers": len(pairs),
        "seconds": round(time.perf_counter() - start, 2),
        "peak_gb": round(peak() / 2**30, 2),
    }
    if device != "cpu":
        row["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if method == "project":
        row["relative_error"] = error(folder, open_base(folder / "target.safetensors"), pairs, device)
    if truth := json.loads((folder / "truth.json").read_text()):
        source, target = open_base(folder / "source.safetensors"), open_base(folder / "target.safetensors")
        known = [(place, name) for place, name in pairs.items() if target.layers[place].original in truth]
        right = [source.layers[name].original == truth[target.layers[place].original] for place, name in known]
        row["attention_layers"] = sum(layer.is_attention for layer in target.layers.values())
        row["paired_right"] = f"{sum(right)} of {len(right)}"
    print(json.dumps(row))


if __name__ == "__main__":
    main()
