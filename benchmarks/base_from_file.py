"""Peak memory of a transfer in ComfyUI whose source is loaded, or a file: `python -m benchmarks.base_from_file`.

Needs a ComfyUI with a Python of its own (COMFYUI_PATH, COMFYUI_PYTHON). The bases have the full width of FLUX and some
of its blocks, the LoRA has rank 16 on all linear layers. Writes benchmarks/results/base-from-file.json.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "txt_ids_dims": [],
    "qkv_bias": True,
    "guidance_embed": True,
}
RANK = 16


def make(folder: Path, double: int, single: int) -> None:
    """Write two bases and a LoRA of the first; runs in ComfyUI."""
    import torch
    from safetensors.torch import save_file

    flux, ops = map(importlib.import_module, ("comfy.ldm.flux.model", "comfy.ops"))
    with torch.device("meta"):
        config = FLUX | {"depth": double, "depth_single_blocks": single}
        model = flux.Flux(**config, operations=ops.disable_weight_init, dtype=torch.bfloat16)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for name, change in (("source", 0.0), ("target", 0.1)):
        generator, tensors = torch.Generator().manual_seed(1), {}
        noise = torch.Generator().manual_seed(2)
        for key, shape in shapes.items():
            weight = torch.randn(shape, generator=generator)
            weight += change * torch.randn(shape, generator=noise)
            tensors[key] = (weight / max(1, *shape) ** 0.5).bfloat16()
        save_file(tensors, folder / f"{name}.safetensors")
    generator, tensors = torch.Generator().manual_seed(3), {}
    for key, shape in shapes.items():
        if key.endswith(".weight") and len(shape) == 2 and "blocks." in key:
            module = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            tensors[f"{module}.lora_up.weight"] = torch.randn(shape[0], RANK, generator=generator).bfloat16()
            tensors[f"{module}.lora_down.weight"] = torch.randn(RANK, shape[1], generator=generator).bfloat16()
    save_file(tensors, folder / "lora.safetensors")


def move(way: str, folder: Path) -> dict[str, Any]:
    """Move the LoRA as the node does; runs in ComfyUI."""
    import torch

    for name, path in (("lora_x_pack", ROOT), ("lora_x_pack.nodes", ROOT / "nodes")):
        module = types.ModuleType(name)
        module.__path__ = [str(path)]
        sys.modules[name] = module
    sd = importlib.import_module("comfy.sd")
    host = importlib.import_module("lora_x_pack.nodes.host")
    lorax = importlib.import_module("lora_x_pack.lorax")
    memory = importlib.import_module("lora_x_pack.benchmarks.memory")

    def loaded(name: str) -> Any:
        return host.open_model(sd.load_diffusion_model(str(folder / f"{name}.safetensors")))

    with torch.inference_mode():
        target, before = loaded("target"), memory.peak()
        start = time.perf_counter()
        source = loaded("source") if way == "loaded" else lorax.open_base(folder / "source.safetensors")
        adapter = lorax.load_adapter(folder / "lora.safetensors", source)
        moved, report = host.compute(
            lambda engine, progress: lorax.transfer_adapter(adapter, source, target, engine=engine, progress=progress),
            len(adapter.layers),
            cache=False,
        )
        seconds = time.perf_counter() - start
    lorax.save_adapter(moved, folder / f"{way}.safetensors")
    return {
        "source": way,
        "layers": report.arrived,
        "seconds": round(seconds, 1),
        "peak_gb": round(memory.peak() / 2**30, 2),
        "peak_gb_with_the_target_alone": round(before / 2**30, 2),
    }


def in_comfyui() -> None:
    """One step in a process of ComfyUI's own: `make FOLDER DOUBLE SINGLE`, `loaded FOLDER`, `file FOLDER`."""
    what, folder, *counts = sys.argv[1:]
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path.insert(0, os.getcwd())
    importlib.import_module("comfy.options").enable_args_parsing()
    if what == "make":
        make(Path(folder), *map(int, counts))
    else:
        print(json.dumps(move(what, Path(folder))))


def main() -> None:
    from safetensors.torch import load_file

    from .__main__ import RESULTS, hardware

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--double-blocks", type=int, default=2)
    parser.add_argument("--single-blocks", type=int, default=4)
    parsed = parser.parse_args()
    comfyui = Path(os.environ["COMFYUI_PATH"])
    python = os.environ.get("COMFYUI_PYTHON", str(comfyui / ".venv" / "bin" / "python"))

    def run(*words: object) -> str:
        command = [python, __file__, *map(str, words)]
        return subprocess.run(command, cwd=comfyui, check=True, stdout=subprocess.PIPE, text=True).stdout

    with tempfile.TemporaryDirectory() as folder:
        run("make", folder, parsed.double_blocks, parsed.single_blocks)
        size = (Path(folder) / "source.safetensors").stat().st_size
        results = [json.loads(run(way, folder).splitlines()[-1]) for way in ("loaded", "file")]
        first, second = (load_file(Path(folder) / f"{way}.safetensors") for way in ("loaded", "file"))
        same = first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)
    found = {"hardware": hardware(), "base_gb": round(size / 2**30, 2), "same_result": same, "results": results}
    path = RESULTS / "base-from-file.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main() if __package__ else in_comfyui()
