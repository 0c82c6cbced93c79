"""The two namings of Stable Diffusion's U-Net, and the parameters that a configuration has.

LDM is the original naming (`input_blocks.1.1...`), which ComfyUI keeps; diffusers numbers by level
(`down_blocks.0.attentions.0...`). How many blocks a level has is read off the names, so pruned models need no table.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count

# (blocks of a level, the LDM index of the sampler that ends it within its block; 0: none)
Levels = list[tuple[int, int]]

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def ldm_to_diffusers(modules: Iterable[str]) -> dict[str, str]:
    """Map the module paths of one U-Net in LDM naming to their diffusers paths.

    Args:
        modules: All module paths, such as `input_blocks.1.1.proj_in`.

    Returns:
        LDM path -> diffusers path, without the modules that fit no rule.
    """
    names = set(modules)
    heads = {".".join(name.split(".")[:2]) for name in names}
    down: Levels = [(0, 0)]
    for k in _while_in(heads, "input_blocks.{}", 1):
        ends = f"input_blocks.{k}.0.op" in names
        down[-1] = (down[-1][0] + (not ends), int(ends))
        if ends:
            down.append((0, 0))
    up: Levels = [(0, 0)]
    for k in _while_in(heads, "output_blocks.{}", 0):
        index = next((index for index in (1, 2) if f"output_blocks.{k}.{index}.conv" in names), 0)
        up[-1] = (up[-1][0] + 1, index)
        if index:
            up.append((0, 0))
    return _translate(names, dict(_blocks(down, up)), RESNET)


def diffusers_to_ldm(modules: Iterable[str]) -> dict[str, str]:
    """Map the module paths of one U-Net in diffusers naming to their LDM paths; inverse of `ldm_to_diffusers`.

    Args:
        modules: All module paths, such as `down_blocks.0.attentions.0.proj_in`.

    Returns:
        Diffusers path -> LDM path, without the modules that fit no rule.
    """
    names = set(modules)
    heads = {".".join(name.split(".")[:depth]) for name in names for depth in (2, 4)}

    def blocks_of(level: str) -> int:
        return sum(1 for _ in _while_in(heads, level + ".resnets.{}", 0))

    down = [
        (blocks_of(f"down_blocks.{i}"), int(f"down_blocks.{i}.downsamplers.0.conv" in names))
        for i in _while_in(heads, "down_blocks.{}", 0)
    ]
    up: Levels = []
    for i in _while_in(heads, "up_blocks.{}", 0):
        blocks = blocks_of(f"up_blocks.{i}")
        # An upsampler stands behind the attention of its block, where there is one.
        index = 2 if f"up_blocks.{i}.attentions.{blocks - 1}" in heads else 1
        up.append((blocks, index if f"up_blocks.{i}.upsamplers.0.conv" in names else 0))
    prefixes = {path: ldm for ldm, path in _blocks(down, up)}
    return _translate(names, prefixes, {path: ldm for ldm, path in RESNET.items()})


def _while_in(names: set[str], pattern: str, start: int) -> Iterator[int]:
    for k in count(start):
        if pattern.format(k) not in names:
            return
        yield k


def _blocks(down: Levels, up: Levels) -> Iterator[tuple[str, str]]:
    yield from ENDS.items()
    k = 0
    for level, (blocks, sampler) in enumerate(down):
        for j in range(blocks):
            k += 1
            yield f"input_blocks.{k}.0", f"down_blocks.{level}.resnets.{j}"
            yield f"input_blocks.{k}.1", f"down_blocks.{level}.attentions.{j}"
        if sampler:
            k += 1
            yield f"input_blocks.{k}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
    k = -1
    for level, (blocks, index) in enumerate(up):
        for j in range(blocks):
            k += 1
            yield f"output_blocks.{k}.0", f"up_blocks.{level}.resnets.{j}"
            yield f"output_blocks.{k}.1", f"up_blocks.{level}.attentions.{j}"
        if index:
            yield f"output_blocks.{k}.{index}.conv", f"up_blocks.{level}.upsamplers.0.conv"


def _translate(names: Iterable[str], prefixes: Mapping[str, str], inner: Mapping[str, str]) -> dict[str, str]:
    translated: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            prefix = prefixes.get(".".join(parts[:cut]))
            if prefix is not None:
                rest = ".".join(parts[cut:])
                translated[name] = ".".join(filter(None, (prefix, inner.get(rest, rest))))
                break
    return translated


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """A U-Net of the Stable Diffusion family, in the words of its original configuration files.

    Attributes:
        model_channels: Width of the first level.
        channel_mult: Width of each level, in multiples of `model_channels`.
        num_res_blocks: Residual blocks of a level on the way down (one more on the way up).
        transformer_depth: Transformer blocks behind each residual block, by level.
        context_dim: Width of the text embedding.
        use_linear: Whether `proj_in` and `proj_out` are linear layers instead of 1x1 convolutions.
        adm_in_channels: Width of the pooled-text and size embedding; 0 where there is none.
        transformer_depth_middle: Transformer blocks in the middle; -1 where pruning left a single residual block there.
        depths_down: For a pruned model, the transformer blocks behind each residual block on the way down, by level.
        depths_up: The same on the way up, in its own order.
    """

    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    transformer_depth: tuple[int, ...]
    context_dim: int
    transformer_depth_middle: int
    use_linear: bool = False
    adm_in_channels: int = 0
    depths_down: tuple[tuple[int, ...], ...] = ()
    depths_up: tuple[tuple[int, ...], ...] = ()

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Return every parameter in LDM naming (`input_blocks.0.0.weight`) with its shape."""
        shapes, channels = _Shapes(self), self.model_channels
        for name, inputs in (("time_embed", channels), ("label_emb.0", self.adm_in_channels)):
            if inputs:
                shapes.add(f"{name}.0", 4 * channels, inputs)
                shapes.add(f"{name}.2", 4 * channels, 4 * channels)
        shapes.add("input_blocks.0.0", channels, 4, 3, 3)
        skips, k = [channels], 0
        blocks = self.num_res_blocks
        down = self.depths_down or tuple((depth,) * blocks for depth in self.transformer_depth)
        up = self.depths_up or tuple((depth,) * (blocks + 1) for depth in reversed(self.transformer_depth))
        levels = [channels * mult for mult in self.channel_mult]
        for level, width in enumerate(levels):
            for depth in down[level]:
                k += 1
                shapes.block(f"input_blocks.{k}", skips[-1], width, depth)
                skips.append(width)
            if level < len(levels) - 1:
                k += 1
                shapes.add(f"input_blocks.{k}.0.op", width, width, 3, 3)
                skips.append(width)
        width = skips[-1]
        shapes.block("middle_block", width, width, max(self.transformer_depth_middle, 0))
        if self.transformer_depth_middle >= 0:
            shapes.resnet("middle_block.2", width, width)
        k = -1
        for level, outputs in reversed(list(enumerate(levels))):
            for block, depth in enumerate(up[len(levels) - 1 - level]):
                k += 1
                shapes.block(f"output_blocks.{k}", width + skips.pop(), outputs, depth)
                width = outputs
                if level and block == blocks:
                    shapes.add(f"output_blocks.{k}.{2 if depth else 1}.conv", width, width, 3, 3)
        shapes.add("out.0", channels)
        shapes.add("out.2", 4, channels, 3, 3)
        return dict(shapes)


class _Shapes(dict[str, tuple[int, ...]]):
    """The parameters of a U-Net as they are added, module by module."""

    def __init__(self, config: UNetConfig) -> None:
        self.config = config

    def add(self, name: str, *shape: int, bias: bool = True) -> None:
        self[f"{name}.weight"] = shape
        if bias:
            self[f"{name}.bias"] = shape[:1]

    def block(self, name: str, inputs: int, outputs: int, depth: int) -> None:
        self.resnet(f"{name}.0", inputs, outputs)
        if depth:
            self.transformer(f"{name}.1", outputs, depth)

    def resnet(self, name: str, inputs: int, outputs: int) -> None:
        self.add(f"{name}.in_layers.0", inputs)
        self.add(f"{name}.in_layers.2", outputs, inputs, 3, 3)
        self.add(f"{name}.emb_layers.1", outputs, 4 * self.config.model_channels)
        self.add(f"{name}.out_layers.0", outputs)
        self.add(f"{name}.out_layers.3", outputs, outputs, 3, 3)
        if inputs != outputs:
            self.add(f"{name}.skip_connection", outputs, inputs, 1, 1)

    def transformer(self, name: str, width: int, depth: int) -> None:
        kernel = () if self.config.use_linear else (1, 1)
        self.add(f"{name}.norm", width)
        self.add(f"{name}.proj_in", width, width, *kernel)
        for block in (f"{name}.transformer_blocks.{i}" for i in range(depth)):
            for attention, context in (("attn1", width), ("attn2", self.config.context_dim)):
                self.add(f"{block}.{attention}.to_q", width, width, bias=False)
                self.add(f"{block}.{attention}.to_k", width, context, bias=False)
                self.add(f"{block}.{attention}.to_v", width, context, bias=False)
                self.add(f"{block}.{attention}.to_out.0", width, width)
            self.add(f"{block}.ff.net.0.proj", 8 * width, width)
            self.add(f"{block}.ff.net.2", width, 4 * width)
            for norm in ("norm1", "norm2", "norm3"):
                self.add(f"{block}.{norm}", width)
        self.add(f"{name}.proj_out", width, width, *kernel)
