"""`make demo`: the main job on two small diffusion models that were trained in the laboratory, and pictures of it.

The source knows Google's emoji. The target is its pruned and distilled version, with one of every two transformer
blocks, as SSD-1B is of SDXL. The adapters learnt the style of Fluent emoji on the source.
"""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from lab import CHECKPOINTS
from lab.applied import changed, dense
from lab.bases import base
from lab.model import generate
from lab.sheets import save_sheet
from lorax import load_adapter
from lorax.models.base import module_base

OUT = Path(__file__).parent / "out"


def main() -> None:
    """Run the command line as a user would, and draw."""
    OUT.mkdir(exist_ok=True)
    bases = [str(CHECKPOINTS / "source.safetensors"), str(CHECKPOINTS / "pruned.safetensors")]
    both = ["--source", bases[0], "--target", bases[1], "--rank", "24"]
    lora_x, lora = (str(CHECKPOINTS / f"{kind}-fluent.safetensors") for kind in ("lora-x", "lora-16"))
    _run("inspect", lora_x)
    _run("similarity", *bases, "--png", "similarity.png", "--json", "similarity.json", "--html", "similarity.html")
    files = ["--report", "transfer.json", "--png", "transfer.png"]
    _run("transfer", lora_x, *both, "-o", "transferred.safetensors", *files)
    _run("transfer", lora, *both, "-o", "transferred_lora.safetensors", "--report", "transfer_lora.json")
    print("\nDrawing with both models, without and with the adapter ...")
    save_sheet(OUT / "pictures.png", _pictures(lora_x))
    print(f"\nIn {OUT}:")
    for path in sorted(OUT.iterdir()):
        print(f"  {path.stat().st_size / 1e6:8.2f} MB  {path.name}")


def _run(*words: str) -> None:
    print("\n$ lorax " + " ".join(Path(word).name if "/" in word else word for word in words), flush=True)
    subprocess.run([sys.executable, "-m", "lorax", *words], cwd=OUT, check=True)


def _pictures(lora_x: str) -> dict[str, torch.Tensor]:
    tokens = load_file(CHECKPOINTS / "prompts.safetensors")["tokens"].float()
    rows: dict[str, torch.Tensor] = {}
    for name, adapter in (("source", lora_x), ("pruned", str(OUT / "transferred.safetensors"))):
        model = base(name)
        known = module_base(model)
        rows[name] = generate([model], tokens)
        with changed(model, dense(load_adapter(adapter, known), known), known):
            rows[f"{name} + {'adapter' if name == 'source' else 'transferred'}"] = generate([model], tokens)
    return rows


if __name__ == "__main__":
    main()
