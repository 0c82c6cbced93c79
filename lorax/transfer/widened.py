"""Input layers that read more channels than those of the model they were made of: inpainting, editing, image-to-video.

Such a model reads the channels of its parent first, then masks, masked pictures or the first frame (SD inpainting 9 of
which 4, InstructPix2Pix 8 of 4, Wan image-to-video 36 of 16, HunyuanVideo 33 of 16; FLUX.1 Fill 384 of 64 and Control
128 of 64, where the four pixels of a patch stand together for each channel). So the first columns of the flattened
weight are the shared ones.
"""

import torch
from torch import Tensor

from ..adapters import AdapterLayer, DiffLayer, LoraLayer, LoraXLayer, expand
from ..compute.engine import CPU, Engine
from ..models.base import Base
from ..models.layers import Layer, LayerTable

# Diffusers' names of input layers. Those of Lumina 2 and Z-Image hold the channels of each pixel of a patch together,
# and Cosmos reads a mask of its own last, so that theirs do not begin alike.
INPUTS = {
    "conv_in", "x_embedder", "x_embedder.proj", "pos_embed.proj", "patch_embedding", "img_in", "proj_in",
}  # fmt: skip
OTHER_ORDER = ("lumina2", "z_image", "anima")


def shared_channels(source: Base, target: Base, layer_s: Layer, layer_t: Layer) -> int:
    """Return how many input channels the same input layer of two models of a family shares; 0 where it is no such.

    That is one of another number of channels, while its outputs and its kernel are the same.
    """
    same = layer_s.path == layer_t.path in INPUTS and source.family.name == target.family.name not in OTHER_ORDER
    if not same or layer_s.shape[1] == layer_t.shape[1]:
        return 0
    if layer_s.shape[:1] + layer_s.shape[2:] != layer_t.shape[:1] + layer_t.shape[2:]:
        return 0
    return min(layer_s.shape[1], layer_t.shape[1])


def first_channels(base: Base, layer: Layer, channels: int) -> Base:
    """Return a base of one layer of another, of which it has the first input channels."""
    part = _of(layer, channels)
    columns = part.matrix_shape[1]

    def read(_: Layer) -> Tensor:
        return base.weight(layer.name)[:, :columns].reshape(part.shape)

    return Base(base.name, base.family, LayerTable([part]), read)


def cut(update: AdapterLayer, source: Base, channels: int, engine: Engine) -> AdapterLayer:
    """Return what an update does to the first input channels, as a LoRA where it is thin, in float32."""
    layer = source.layers[update.layer.name]
    part = _of(layer, channels)
    columns = part.matrix_shape[1]
    if update.is_thin or isinstance(update, LoraXLayer):
        B, A = expand(update, source, engine)
        return LoraLayer.of(part, B, A[:, :columns], torch.float32, update)
    weight = engine.weight(source, layer.name) if update.needs_weight else None
    return DiffLayer(part, update.delta_weight(weight).cpu()[:, :columns].reshape(part.shape))


def widen(update: AdapterLayer, layer: Layer) -> AdapterLayer:
    """Return an update of the first input channels as one of all channels of `layer`; the others get none."""
    more = layer.matrix_shape[1] - update.layer.matrix_shape[1]
    if isinstance(update, LoraLayer):
        B, A = update.lora_up, update.lora_down.reshape(update.rank, -1)
        return LoraLayer(layer, B, torch.nn.functional.pad(A, (0, more)), update.alpha)
    diff = update.parts()["diff"].flatten(1)
    return DiffLayer(layer, torch.nn.functional.pad(diff, (0, more)).reshape(layer.shape))


def fitted(update: AdapterLayer, base: Base, engine: Engine = CPU) -> AdapterLayer | None:
    """Return an update of an input layer as one of that of a base which reads more channels, or fewer.

    The channels that both read take it. An update that needs the weight gets that of the base.

    Args:
        update: An update of any kind but LoRA-X, by the name that the layer has in the base.
        base: The base.
        engine: How and where to compute.

    Returns:
        The update; None where the layers are no such pair, or the weight is needed of channels that the base lacks.
    """
    layer = base.layers.get(update.layer.name)
    channels = 0 if layer is None else shared_channels(base, base, update.layer, layer)
    if layer is None or not channels:
        return None
    if channels == update.layer.shape[1]:
        return widen(cut(update, first_channels(base, layer, channels), channels, engine), layer)
    if update.needs_weight:
        return None
    return cut(update, Base(base.name, base.family, LayerTable([update.layer]), base.read), channels, engine)


def _of(layer: Layer, channels: int) -> Layer:
    return Layer(layer.name, (layer.shape[0], channels, *layer.shape[2:]), layer.original, layer.rows)
