"""Adapters learnt on a base model: LoRA-X by ours, LoRA and DoRA by PEFT, FouRA by its formula; all on attention."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from lorax import Adapter, load_adapter
from lorax.adapters import FouraLayer
from lorax.models.base import module_base, module_place
from lorax.models.layers import Layer
from lorax.train import attach, train

from . import DEVICE, MODELS
from .data import load
from .model import loss

STEPS, BATCH = 100, 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
# Kind -> rank, learning rate. LoRA's is the better of 1e-3 and 3e-3 on the held-out loss of one training on the source,
# and the others have it; of 1e-2, 3e-2 and 1e-1 for LoRA-X the largest is a little better there and worse on the
# fine-tunes, so it is measured on its own.
KINDS = {
    "lora-x": (MODELS.rank, 3e-2),
    "lora-x, rate 0.1": (MODELS.rank, 1e-1),
    "lora-1": (1, 3e-3),
    "lora-16": (16, 3e-3),
    "lora-32": (32, 3e-3),
    "dora-16": (16, 3e-3),
    "foura-16": (16, 3e-3),
}


def tune(model: UNet2DConditionModel, kind: str, style: str, seed: int) -> Adapter:
    """Return an adapter of a style, learnt on a base model, which does not change.

    Args:
        model: The base model.
        kind: One of KINDS.
        style: Whose pictures to learn.
        seed: Of the training.
    """
    rank, rate = KINDS[kind]
    data, chosen = load(), load().split("learn")

    def learn(learns: nn.Module, model: nn.Module) -> None:
        def step(call: int) -> Tensor:
            batch = chosen[torch.randint(len(chosen), (BATCH,))]
            return loss(model, data.pictures[style][batch], data.tokens[batch])

        train(learns, step, STEPS, learning_rate=rate, seed=seed)

    name, own = f"{kind} {style} {seed}", copy.deepcopy(model)
    torch.manual_seed(seed)
    if kind.startswith("lora-x"):
        with attach(own, rank=rank) as layers:
            learn(layers, own)
        return layers.adapter(name)
    if kind.startswith("foura"):
        foura = Foura(own, rank).to(DEVICE)
        learn(foura, own)
        return foura.adapter(name)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, use_dora=kind.startswith("dora"))
    wrapped = peft.get_peft_model(own, config)
    learn(wrapped, wrapped)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter_model.safetensors"
        save_file(peft.get_peft_model_state_dict(wrapped), path)
        return load_adapter(path, module_base(model))


class Foura(nn.Module):
    """`y = W x + B Re(F^-1 (gate * F (A x)))`: a LoRA with a learnt gate on the frequencies of its rank axis."""

    def __init__(self, model: UNet2DConditionModel, rank: int) -> None:
        super().__init__()
        self.family = module_base(model).family
        self.layers = [layer for layer in module_base(model).layers.values() if layer.is_attention]
        modules = dict(model.named_modules())
        self.down, self.up, self.gate = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for place, layer in enumerate(self.layers):
            m, n = layer.matrix_shape
            self.down.append(torch.randn(rank, n) / n**0.5)
            self.up.append(torch.zeros(m, rank))
            self.gate.append(torch.ones(rank))
            modules[module_place(layer, modules)[0]].register_forward_hook(self._adding(place))

    def _adding(self, place: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inner = torch.fft.fft(args[0] @ self.down[place].T, norm="ortho") * self.gate[place]
            return output + torch.fft.ifft(inner, norm="ortho").real @ self.up[place].T

        return add

    def adapter(self, name: str) -> Adapter:
        """Return what was learnt."""

        def own(place: int, layer: Layer) -> FouraLayer:
            return FouraLayer(layer, *(part[place].detach().cpu() for part in (self.up, self.down, self.gate)))

        layers = {layer.name: own(place, layer) for place, layer in enumerate(self.layers)}
        return Adapter(name, self.family, "foura", layers)
