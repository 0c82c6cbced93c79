"""An adapter in memory: an update for each layer, as thin factors or as singular values."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..base import Base
from ..errors import MismatchError
from ..families import Family
from ..layers import Layer, reads_text
from ..linalg import Subspace, decompose, norm


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """The update of one layer as two factors: `delta_weight = alpha / rank * lora_up @ lora_down`.

    Attributes:
        layer: The layer that it belongs to.
        lora_up: `[m, k]`, or `[m, k, 1, 1]` for a convolution.
        lora_down: `[k, n]`, or `[k, in, kh, kw]` for a convolution.
        alpha: The numerator of the scale; None means a scale of 1.
    """

    layer: Layer
    lora_up: Tensor
    lora_down: Tensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """The inner size `k`."""
        return self.lora_down.shape[0]

    @property
    def scale(self) -> float:
        """`alpha / rank`."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.lora_down.dtype

    def factors(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Return `B [m, k]` (the scale included) and `A [k, n]` in float32 on `device`: `delta_weight = B A`."""
        B = self.lora_up.to(device, torch.float32).reshape(-1, self.rank) * self.scale
        return B, self.lora_down.to(device, torch.float32).reshape(self.rank, -1)

    def shaped(self, shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
        """Return `lora_up` and `lora_down` as programs expect them for a weight: 4D for a convolution.

        Args:
            shape: Shape of the weight; None takes that of `layer`.
        """
        shape = shape or self.layer.shape
        up = self.lora_up.reshape(shape[0], self.rank, *[1] * len(shape[2:]))
        return up, self.lora_down.reshape(self.rank, *shape[1:])

    def norm(self) -> float:
        """Return `||delta_weight||_F`, from the factors."""
        return norm(*self.factors())

    def delta_weight(self) -> Tensor:
        """Return the dense update `[m, n]` in float32 (for inspection: the package itself never forms it)."""
        B, A = self.factors()
        return B @ A


@dataclass(frozen=True, slots=True)
class LoraXLayer:
    """The update of one layer as a change of its singular values: `delta_weight = U diag(delta) Vh` (arXiv 2501.16559).

    Attributes:
        layer: The layer that it belongs to.
        delta: `[r]`, one number for each leading singular pair of the source weight.
        fingerprint: `Base.fingerprint` of the weight whose `U` and `Vh` are meant.
    """

    layer: Layer
    delta: Tensor
    fingerprint: str

    @property
    def rank(self) -> int:
        """The number of singular values `r`."""
        return self.delta.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `delta`."""
        return self.delta.dtype

    def norm(self) -> float:
        """Return `||delta_weight||_F`, which is that of `delta`."""
        return float(self.delta.double().norm())

    def check_source(self, source: Base) -> None:
        """Check that `source` holds the very weight that `delta` belongs to.

        Raises:
            MismatchError: It holds another one.
        """
        if source.fingerprint(self.layer.name) != self.fingerprint:
            raise MismatchError(
                "a LoRA-X adapter means nothing without its own source base",
                f"{self.layer.name} differs in {source.name}",
                "give the base that it was made for; if that is the target, swap source and target",
            )

    def factors(self, space: Subspace) -> tuple[Tensor, Tensor]:
        """Return `B [m, k]`, `A [k, n]` with `B A = U diag(delta) Vh`; `k` counts the deltas that are not 0 (or is 1).

        Args:
            space: The decomposition of the source weight at this layer's rank.

        Raises:
            MismatchError: `space` has fewer directions than `delta`.
        """
        if space.rank < self.rank:
            got = f"{self.layer.name}: {self.rank} deltas, rank {space.rank}"
            raise MismatchError("the source weight has fewer directions than the adapter", got, "check the source base")
        delta = self.delta.to(space.S.device, torch.float32)
        used = delta.nonzero().flatten() if bool(delta.any()) else torch.zeros(1, dtype=torch.long, device=delta.device)
        root = delta[used].abs().sqrt()
        return space.U[:, used] * (root * delta[used].sign()), root[:, None] * space.Vh[used]


AdapterLayer = LoraLayer | LoraXLayer


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Adapter:
    """An adapter: its layers by name, and what its file held beyond them.

    Attributes:
        name: What to call it, such as its file name.
        family: The family of its base, or None where it is unknown.
        naming: How its file spells the layers: `kohya`, `diffusers`, `peft`, `indexed` or `lora-x`.
        layers: The update of each layer, by layer name.
        unused: What else was in the file, key -> why it is not used.
        metadata: The file's own metadata.
        spellings: Module path of each layer as the file spells it, by layer name.
    """

    name: str
    family: Family | None
    naming: str
    layers: Mapping[str, AdapterLayer]
    unused: Mapping[str, str] = field(default_factory=dict[str, str])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    spellings: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def kind(self) -> str:
        """`lora`, `lora-x` or `mixed`."""
        kinds = {"lora-x" if isinstance(layer, LoraXLayer) else "lora" for layer in self.layers.values()}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def ranks(self) -> Counter[int]:
        """How many layers have each rank."""
        return Counter(layer.rank for layer in self.layers.values())

    def resolved(self, base: Base) -> "Adapter":
        """Return the adapter with its layers named as its own base names them.

        A file that was read without its base was named by the full-size model of its family, whose blocks may be
        numbered otherwise; what counts is the spelling in the file.

        Raises:
            MismatchError: The adapter is of another family: its cross-attention reads another text width.
        """
        widths = {
            own.layer.matrix_shape[1]
            for own in self.layers.values()
            if isinstance(own, LoraLayer) and reads_text(own.layer.path)
        }
        if base.family.unet is not None and widths - {base.family.unet.context_dim}:
            made_for = self.family.label if self.family else f"a family of text width {min(widths)}"
            raise MismatchError(
                "the adapter and the base model are of different families",
                f"{self.name} (made for {made_for}) and {base.name} ({base.family.label})",
                "give the base that it was made for (are source and target swapped?)",
            )
        layers: dict[str, AdapterLayer] = {}
        unused = dict(self.unused)
        for name, own in self.layers.items():
            found = base.layers.find(own.layer.component, self.spellings.get(name, own.layer.path))
            if len(found) == 1:
                own = replace(own, layer=replace(found[0], shape=own.layer.shape or found[0].shape))
            if own.layer.name in layers:
                unused[name] = f"another layer of the adapter means the same, {own.layer.name}"
            layers.setdefault(own.layer.name, own)
        return replace(self, layers=layers, unused=unused, spellings={})


def expand(layer: AdapterLayer, source: Base | None, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return the update of any adapter layer as factors `B [m, k]`, `A [k, n]`, float32 on `device`.

    Args:
        layer: The adapter layer.
        source: The base that it was made for; only a LoRA-X layer needs it.
        device: Where to compute.

    Raises:
        MismatchError: A LoRA-X layer without its own source base.
    """
    if isinstance(layer, LoraLayer):
        return layer.factors(device)
    if source is None or layer.layer.name not in source.layers:
        got = f"{layer.layer.name} without it"
        raise MismatchError("a LoRA-X layer needs its source base", got, "give the source base")
    layer.check_source(source)
    return layer.factors(decompose(source.weight(layer.layer.name, device), layer.rank))
