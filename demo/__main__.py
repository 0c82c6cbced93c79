"""`make demo`: the main job on two base models made from a seed, the U-Net of Stable Diffusion 1.5 but narrower."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from lorax import Adapter, Base, LoraLayer, LoraXLayer, open_base, save_adapter
from lorax.families import families

from .synthetic import base_tensors

OUT = Path(__file__).parent / "out"


def main() -> None:
    """Make bases and adapters, and run the command line on them as a user would."""
    OUT.mkdir(exist_ok=True)
    family = families()["sd1"]
    narrow = replace(family, unet=replace(family.unet, model_channels=96), text_encoders=())
    print("Making two base models, the second a changed copy of the first, and two adapters for the first ...")
    for name, change in (("source", 0.0), ("target", 0.15)):
        save_file(base_tensors(narrow, 1, change=change), OUT / f"{name}.safetensors")
    source = open_base(OUT / "source.safetensors")
    _make_lora(source, OUT / "lora.safetensors")
    _make_lora_x(source, OUT / "lora_x.safetensors")
    bases = ["--source", "source.safetensors", "--target", "target.safetensors"]
    _run("inspect", "lora_x.safetensors")
    _run(
        "similarity", "source.safetensors", "target.safetensors", "--png", "similarity.png", "--json", "similarity.json"
    )
    files = ["--report", "transfer.json", "--png", "transfer.png"]
    _run("transfer", "lora_x.safetensors", *bases, "--rank", "64", "-o", "transferred.safetensors", *files)
    _run("transfer", "lora.safetensors", *bases, "-o", "transferred_lora.safetensors", "--report", "transfer_lora.json")
    print(f"\nIn {OUT}:")
    for path in sorted(OUT.iterdir()):
        print(f"  {path.stat().st_size / 1e6:8.2f} MB  {path.name}")


def _run(*words: str) -> None:
    print("\n$ lorax " + " ".join(words), flush=True)
    subprocess.run([sys.executable, "-m", "lorax", *words], cwd=OUT, check=True)


def _make_lora(source: Base, path: Path, rank: int = 8) -> None:
    """Write a LoRA in kohya naming on all attention layers, its update a twentieth of each weight."""
    generator = torch.Generator().manual_seed(7)
    layers: dict[str, LoraLayer] = {}
    for name, layer in source.layers.items():
        if layer.is_attention and layer.component == "unet":
            m, n = layer.matrix_shape
            up, down = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
            up *= 0.05 * source.weight(name).norm() / (up @ down).norm()
            layers[name] = LoraLayer(layer, up.half(), down.half(), float(rank))
    save_adapter(Adapter(path.name, source.family, "kohya", layers), path)


def _make_lora_x(source: Base, path: Path, rank: int = 64) -> None:
    """Write a LoRA-X on all attention layers: a change of the leading singular values."""
    generator = torch.Generator().manual_seed(8)
    layers = {
        name: LoraXLayer(layer, 0.05 * torch.randn(rank, generator=generator), source.fingerprint(name))
        for name, layer in source.layers.items()
        if layer.is_attention and layer.component == "unet"
    }
    save_adapter(Adapter(path.name, source.family, "lora-x", layers), path)


if __name__ == "__main__":
    main()
