"""Run by the host's Python in the host's folder: the loss that the pack trains on, and the field's formula for it.

    python loss_of_models.py PACK

Prints JSON: model -> [the pack's loss, the formula's, length of the pack's gradient, slope of the formula along it by a
difference]. The formula calls the diffusion model itself, one picture at a time: noise for `eps`, `alpha noise - sigma
latent` for `v`, `noise - latent` for a flow.
"""

import importlib
import json
import os
import sys
from functools import partial
from pathlib import Path

pack = Path(sys.argv[1])
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, os.getcwd())

import comfy.options

comfy.options.enable_args_parsing()

import comfy.model_patcher
import comfy.model_sampling
import comfy.supported_models
import torch
from load_pack import load_pack
from small_models import SMALLEST, build

host, _ = load_pack(pack)
attach = importlib.import_module("lora_x_pack.lorax.train").attach

FAMILIES = {"eps": ("sd1", 4, 768, 0), "v": ("sd1", 4, 768, 0), "flow": ("flux", 16, 96, 48)}
COUNT = 3


class V(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
    """A schedule of SD with velocities."""


def opened(kind):
    model = build(comfy.supported_models, *SMALLEST[FAMILIES[kind][0]], "cpu")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.diffusion_model.parameters():
        spread = 1 / max(1, parameter.shape[1:].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
        parameter.copy_(spread * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    if kind == "v":
        patcher.add_object_patch("model_sampling", V(model.model_config))
    return patcher


def pictures(kind):
    _, channels, width, pooled = FAMILIES[kind]
    generator = torch.Generator().manual_seed(2)
    found = []
    for place in range(COUNT):
        text = torch.randn(1, 77 * (1 + place % 2), width, generator=generator)
        extra = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        found.append((torch.randn(1, channels, 8, 8, generator=generator), [text, extra]))
    return found


def formula(kind, model, data):
    """The mean over the pictures of the error of what the model predicts, with the random numbers of the pack."""
    torch.manual_seed(0)
    sampling, times = model.model_sampling, torch.rand(COUNT)
    sigmas = [sampling.percent_to_sigma(float(time)) for time in times]
    noises = torch.randn(COUNT, *data[0][0].shape[1:])
    losses = []
    for (latent, (text, extra)), sigma, noise in zip(data, sigmas, noises, strict=True):
        latent, noise = model.process_latent_in(latent.clone())[0], noise
        if kind == "flow":
            seen, target = (1 - sigma) * latent + sigma * noise, noise - latent
        else:
            alpha = 1 / (1 + sigma**2) ** 0.5
            seen = alpha * (latent + sigma * noise)
            target = noise if kind == "eps" else alpha * noise - alpha * sigma * latent
        more = {"y": extra["pooled_output"].clone(), "guidance": torch.tensor([3.5])} if kind == "flow" else {}
        time = sampling.timestep(torch.tensor([float(sigma)])).float()
        out = model.diffusion_model(seen[None], time, context=text.clone(), transformer_options={}, **more)
        losses.append((out[0] - target).square().mean())
    return torch.stack(losses).mean()


def gradient(layers, value):
    for delta in layers.parameters():
        delta.grad = None
    value.backward()
    return torch.cat([delta.grad for delta in layers.parameters()])


found = {}
with torch.inference_mode():
    for kind in FAMILIES:
        for blocks in (False, True):
            patcher, data = opened(kind), pictures(kind)
            added = partial(attach, base=host.open_model(patcher), rank=4)
            with host.training(patcher, data, added, dtype=torch.float32, gradient_checkpointing=blocks) as (
                layers,
                loss,
            ):
                with torch.no_grad():
                    for delta in layers.parameters():
                        delta.copy_(0.1 * torch.randn(len(delta), generator=torch.Generator().manual_seed(len(delta))))
                torch.manual_seed(0)
                ours = loss(range(COUNT))
                grad = gradient(layers, ours)
                theirs = formula(kind, patcher.model, data)
                # The slope of the loss along its gradient, by a difference.
                flat, step = [delta.data for delta in layers.parameters()], 1e-2
                direction, ends = (grad / grad.norm()).split([len(delta) for delta in flat]), []
                with torch.no_grad():
                    for side in (step, -2 * step):
                        for delta, part in zip(flat, direction, strict=True):
                            delta += side * part
                        ends.append(formula(kind, patcher.model, data).item())
                slope = (ends[0] - ends[1]) / (2 * step)
            name = f"{kind}, blocks again" if blocks else kind
            found[name] = [ours.item(), theirs.item(), float(grad.norm()), slope]
print(json.dumps(found))  # noqa: T201
