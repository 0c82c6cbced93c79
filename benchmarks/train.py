"""What a step of training costs, LoRA-X r 320 beside LoRA r 16 of PEFT; writes benchmarks/results/train.json.

python -m benchmarks.train

The model is diffusers' U-Net with SD 1.5's widths 320 and 640 and one block a level. Every measurement is a process of
its own, so that its peak memory is its own.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from lorax import save_adapter
from lorax.train import attach, train

from .__main__ import RESULTS, hardware
from .memory import peak

STEPS, WARM, SIZE, BATCH = 12, 2, 32, 1
ROWS = (("nothing learns, forward only", 0), ("lora", 16), ("lora-x", 16), ("lora-x", 320))
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=SIZE,
        block_out_channels=(320, 640),
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def measure(kind: str, rank: int) -> dict[str, Any]:
    """Train for a few steps in this process."""
    model = unet().requires_grad_(False)
    weights = sum(parameter.numel() for parameter in model.parameters())
    x, text = torch.randn(BATCH, 4, SIZE, SIZE), torch.randn(BATCH, 77, 768)
    start = time.perf_counter()
    learns: nn.Module = model
    if kind == "lora":
        learns = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=TARGETS))
    elif kind == "lora-x":
        learns = attach(model, rank=rank)
    row: dict[str, Any] = {"kind": kind, "rank": rank, "set_up_seconds": round(time.perf_counter() - start, 2)}
    times = [(time.perf_counter(), time.process_time())]

    def tick(*_: object) -> None:
        times.append((time.perf_counter(), time.process_time()))

    def loss(call: int) -> torch.Tensor:
        error = model(x, torch.tensor([call * 37 % 1000]), text).sample - x
        return error.square().mean()

    if rank:
        train(learns, loss, STEPS + WARM, on_step=tick)
    else:
        with torch.no_grad():
            for call in range(STEPS + WARM):
                loss(call)
                tick()
    wall, cpu = (statistics.median(b[i] - a[i] for a, b in pairwise(times[WARM:])) for i in (0, 1))
    row |= {
        "seconds_per_step": round(wall, 3),
        "cpu_seconds_per_step": round(cpu, 3),
        "peak_gb": round(peak() / 2**30, 2),
        "model_parameters": weights,
    }
    if rank:
        row["learnt_parameters"] = sum(p.numel() for p in learns.parameters() if p.requires_grad)
        row["subspace_numbers"] = sum(buffer.numel() for buffer in learns.buffers()) if kind == "lora-x" else 0
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.safetensors"
            if kind == "lora":
                save_file(peft.get_peft_model_state_dict(learns), path)
            else:
                save_adapter(learns.adapter(), path)
            row["file_bytes"] = path.stat().st_size
    return row


def main() -> None:
    """Measure each in a process of its own, and write."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
        return
    rows: list[dict[str, Any]] = []
    for kind, rank in ROWS:
        command = [sys.executable, "-m", "benchmarks.train", kind, str(rank)]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
        print(rows[-1], flush=True)
    setting = {"batch": BATCH, "latent": SIZE, "text_tokens": 77, "steps": STEPS, "dtype": "float32"}
    content = {"hardware": hardware(), "setting": setting, "results": rows}
    (RESULTS / "train.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
