"""Families of U-Nets, whose layers are told by the configuration of the full-size model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from typing_extensions import override

from .family import Family, Shapes
from .layers import Layer, reads_text
from .unet import UNetConfig, diffusers_to_ldm, ldm_to_diffusers


@dataclass(frozen=True, eq=False)
class UNetFamily(Family):
    """A family of U-Nets of Stable Diffusion; how they call their blocks is in `lorax.models.unet`.

    Attributes:
        unet: The configuration of the full-size model.
    """

    unet: UNetConfig = field(kw_only=True)

    @property
    @override
    def text_width(self) -> int:
        return self.unet.context_dim

    @override
    def layers(self, shapes: Shapes) -> list[Layer]:
        is_ldm = "input_blocks.0.0" in shapes
        other = ldm_to_diffusers(shapes) if is_ldm else diffusers_to_ldm(shapes)
        layers: list[Layer] = []
        for path, shape in shapes.items():
            if len(shape) in (2, 4):
                name, original = (other.get(path, path), path) if is_ldm else (path, other.get(path, ""))
                layers.append(Layer(f"{self.component}.{name}", shape, original))
        return layers

    @override
    def fits(self, shapes: Shapes) -> bool:
        if not shapes.keys() >= set(self.has) or any(module in shapes for module in self.lacks):
            return False
        widths = {shape[1] if len(shape) > 1 else 0 for path, shape in shapes.items() if reads_text(path)}
        return ("input_blocks.0.0" in shapes or "conv_in" in shapes) and widths == {self.text_width}

    @override
    def _full_size(self) -> list[Layer]:
        shapes = self.unet.parameters()
        return self.layers({key.removesuffix(".weight"): v for key, v in shapes.items() if key.endswith(".weight")})

    @override
    def _namings(self, layers: Sequence[Layer], modules: set[str]) -> tuple[dict[str, str], dict[str, str]]:
        originals = {layer.original for layer in layers}
        if not originals.isdisjoint(modules):
            return ldm_to_diffusers(modules | originals), {}
        return {}, diffusers_to_ldm(modules | {layer.path for layer in layers})
