"""What every kind of adapter layer has in common: its numbers, its dense update, how it is stored."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import FormatError, MismatchError, NumericsError
from ..linalg import all_finite, norm, to_exact
from ..models.layers import Layer
from .dora import decomposed, with_magnitude_of

# What an update may be; more is refused, before a small file makes much memory. The numbers are ours.
# No weight of a base has a smaller side of so many; a rank above that has no effect.
RANK = 2**14
# Numbers of the dense update: the largest weight of a known base, 55296 x 6144 (FLUX.2), has a third of it.
WEIGHT = 2**30
# The relative error up to which a multiple counts as exact: the unit roundoff of float32, by 16 for its small numbers.
# The factors that it is asked of were rounded to 2^-9 (bf16) or 2^-11 (fp16) when their file was made.
EXACT = 2.0**-20

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Parts = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class AdapterLayer(ABC):
    """The update of one layer of a base model.

    A subclass is one kind. Its tensor fields have the names that the field gives them and hold what the file holds.

    Attributes:
        layer: The layer that it belongs to.
    """

    KIND: ClassVar[str]
    # field -> what is written after `<module>.`, where it is not the name of the field
    KEYS: ClassVar[Mapping[str, str]] = {}
    REQUIRED: ClassVar[frozenset[str]]
    OPTIONAL: ClassVar[frozenset[str]] = frozenset()
    NEEDS_WEIGHT: ClassVar[bool] = False
    # Fields whose first size is the inner size of a product.
    INNER: ClassVar[frozenset[str]] = frozenset()

    layer: Layer

    @classmethod
    @abstractmethod
    def shape_of(cls, shapes: Shapes) -> Shape:
        """Return the shape of the weight that parts of these shapes update, as far as they tell it.

        Args:
            shapes: Shape of each part, by field.

        Returns:
            `[out, in]` or `[out, in, kh, kw]`; `[out]` where only the outputs are told; empty where nothing is.

        Raises:
            FormatError: The parts do not fit each other.
        """

    @property
    @abstractmethod
    def rank(self) -> int:
        """The inner size, by which `alpha` is divided; for kinds without one the highest rank of the update."""

    @abstractmethod
    def _update(self, parts: Parts, weight: Tensor | None) -> Tensor:
        """Return the dense update before any magnitude, in any shape of `m * n` numbers; `parts` in the dtype wanted.

        `weight` has the shape of the layer; it is there if `needs_weight`.
        """

    @classmethod
    def read(cls, layer: Layer, parts: Parts, alpha: float | None = None) -> Self:
        """Make a layer of the parts that a file holds.

        Args:
            layer: The layer that they belong to.
            parts: Tensor of each part, by field.
            alpha: The numerator of the scale (of OFT the constraint); None where the file has none.

        Raises:
            FormatError: Parts are missing, unknown, or do not fit each other or the layer.
        """
        cls.check(layer, {name: tuple(part.shape) for name, part in parts.items()})
        values: dict[str, Any] = {"layer": layer, **parts}
        if "dora_scale" in parts and layer.shape:
            scale = parts["dora_scale"]
            values["dora_scale"] = scale.reshape(magnitude_shape(tuple(scale.shape), layer.shape) or scale.shape)
        if "alpha" in {field.name for field in fields(cls)}:
            values["alpha"] = alpha
        return cls(**values)

    @classmethod
    def check(cls, layer: Layer, shapes: Shapes) -> None:
        """Check that parts of these shapes make an update of `layer`.

        Raises:
            FormatError: They do not.
        """
        missing, unknown = cls.REQUIRED - shapes.keys(), shapes.keys() - cls.REQUIRED - cls.OPTIONAL
        if missing:
            raise misfit(cls.KIND, shapes, f"without {', '.join(sorted(missing))}: its partner is not in the file")
        if unknown:
            raise misfit(cls.KIND, shapes, f"with {', '.join(sorted(unknown))}, which it cannot have")
        if any(0 in shape for shape in shapes.values()):
            raise misfit(cls.KIND, shapes, "with an empty part")
        shape = cls.shape_of(shapes)
        if math.prod(shape) > WEIGHT:
            raise misfit(cls.KIND, shapes, f"of a weight of more than {WEIGHT} numbers, larger than any")
        if any(shapes[name][0] > RANK for name in cls.INNER & shapes.keys()):
            raise misfit(cls.KIND, shapes, f"of a rank above {RANK}, which is never of use")
        if not fits(layer.shape, shape):
            raise misfit(cls.KIND, shapes, f"of a weight {list(shape)}, not {list(layer.shape)} of {layer.name}")
        scale = shapes.get("dora_scale")
        if scale is not None and layer.shape and magnitude_shape(scale, layer.shape) is None:
            raise misfit(cls.KIND, shapes, f"whose dora_scale {list(scale)} is no magnitude of {list(layer.shape)}")

    @property
    def kind(self) -> str:
        """Such as `lora` or `loha`; with a magnitude `dora` (of a LoRA), `dora-loha`, `dora-lokr`, `dora-glora`."""
        if "dora_scale" not in self.parts():
            return self.KIND
        return "dora" if self.KIND == "lora" else f"dora-{self.KIND}"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its tensors."""
        return next(iter(self.parts().values())).dtype

    @property
    def computed_dtype(self) -> torch.dtype:
        """The dtype to store what is computed from it: its own, but of 8 bits, in which too much would be lost, 16."""
        return self.dtype if self.dtype.itemsize > 1 else torch.float16

    @property
    def is_thin(self) -> bool:
        """Whether `factors` gives the update exactly and cheaply."""
        return False

    @property
    def needs_weight(self) -> bool:
        """Whether the update depends on the base weight."""
        return self.NEEDS_WEIGHT or "dora_scale" in self.parts()

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors that are there, by field."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def factors(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Return `B [m, k]` (the scale included) and `A [k, n]` in float32 on `device`: `delta_weight = B A`.

        Raises:
            MismatchError: The update is not thin.
        """
        raise MismatchError("the update has no thin factors", f"{self.layer.name} ({self.kind}) on {device}", _DENSE)

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return the dense update `[m, n]`, a convolution flattened to `[out, in*kh*kw]`.

        Args:
            weight: The base weight in any shape of `m * n` numbers. Needed where `needs_weight`; elsewhere it only says
                where to compute and how precisely.

        Returns:
            float64 if `weight` is float64, else float32; on the device of `weight`.

        Raises:
            MismatchError: The base weight is needed and not given, or of another size.
        """
        dtype = torch.float64 if weight is not None and weight.dtype == torch.float64 else torch.float32
        parts = {
            name: part.to(weight.device if weight is not None else "cpu", dtype) for name, part in self.parts().items()
        }
        if self.needs_weight:
            weight = self._shaped(weight).to(dtype)
        update = self._update(parts, weight)
        if weight is not None and "dora_scale" in parts:
            update = decomposed(update.reshape(weight.shape), weight, parts["dora_scale"])
        return update.reshape(update.shape[0] if not self.layer.shape else self.layer.shape[0], -1)

    @property
    def norm_needs_weight(self) -> bool:
        """Whether `norm` depends on the weight of the base."""
        return self.needs_weight

    def check_finite(self) -> None:
        """Check that what was computed did not grow beyond the dtype that it is stored in.

        Raises:
            NumericsError: It did.
        """
        for name, part in self.parts().items():
            check_finite(part, f"{name} of {self.layer.name}")

    def norm(self, weight: Tensor | None = None) -> float:
        """Return `||delta_weight||_F`, from the factors where it is thin.

        Raises:
            MismatchError: As in `delta_weight`.
        """
        if self.is_thin:
            return norm(*self.factors())
        return float(torch.linalg.vector_norm(to_exact(self.delta_weight(weight)), dtype=torch.float64))

    def tensors(self) -> dict[str, Tensor]:
        """Return what is written after `<module>.`, in the spelling of kohya and LyCORIS, `alpha` included."""
        written = {self.KEYS.get(name, name): part for name, part in self.parts().items()}
        alpha = self._stored_alpha()
        return written if alpha is None else written | {"alpha": number(alpha, self.dtype)}

    def moved(self, layer: Layer, dtype: torch.dtype | None = None) -> Self:
        """Return the same numbers on another layer of equal size: what loading the file there does.

        Args:
            layer: The other layer.
            dtype: The dtype to store; None keeps each tensor's own.
        """
        cast = {name: part if dtype is None else part.to(dtype) for name, part in self.parts().items()}
        changes: dict[str, Any] = {"layer": layer, **cast}
        return replace(self, **changes)

    def magnitude_on(self, source: Tensor, target: Tensor) -> Tensor:
        """Return its `dora_scale` for another base, in its ratio to the weight: see `lorax.adapters.dora`.

        Args:
            source: The weight that it was trained on, in any shape of `m * n` numbers.
            target: The weight of the other base, of as many.
        """
        shape = self.layer.shape
        return with_magnitude_of(self.parts()["dora_scale"], source.reshape(shape), target.reshape(shape))

    def cut(self, layers: Iterable[Layer]) -> "list[Self] | None":
        """Return the update of a fused weight as updates of its parts; None where this kind cannot be cut.

        Args:
            layers: The layers whose weights, stacked by rows in this order, are the fused weight.
        """
        axes = self.row_axes()
        if axes is None:
            return None
        found: list[Self] = []
        start = 0
        for layer in layers:
            rows = {
                name: part.narrow(axes[name], start, layer.shape[0])
                for name, part in self.parts().items()
                if name in axes
            }
            changes: dict[str, Any] = {"layer": layer, **rows}
            found.append(replace(self, **changes))
            start += layer.shape[0]
        return found

    def row_axes(self) -> dict[str, int] | None:
        """Return the parts that belong to rows of the update, and the axis of the rows; None if it cannot be cut."""
        return None

    def _stored_alpha(self) -> float | None:
        return None

    def _shaped(self, weight: Tensor | None) -> Tensor:
        if weight is None or (self.layer.shape and weight.numel() != math.prod(self.layer.shape)):
            got = f"{self.layer.name} ({self.kind}), given {'none' if weight is None else list(weight.shape)}"
            raise MismatchError("this kind of update needs the weight of its base", got, "give the source base")
        return weight.reshape(self.layer.shape or weight.shape)


class ScaledLayer(AdapterLayer):
    """An update with an inner size, by which its `alpha` is divided."""

    __slots__ = ()
    if TYPE_CHECKING:
        alpha: float | None

    @property
    def scale(self) -> float:
        """`alpha / rank`; 1 without an alpha."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def _stored_alpha(self) -> float | None:
        return float(self.rank if self.alpha is None else self.alpha)


_DENSE = "use delta_weight"


def fits(layer: Shape, shape: Shape) -> bool:
    """Return whether a weight of this layer shape can be what `AdapterLayer.shape_of` told."""
    if not layer or not shape:
        return True
    return layer[0] == shape[0] if len(shape) == 1 else Layer("", layer).matrix_shape == Layer("", shape).matrix_shape


def misfit(kind: str, shapes: Shapes, why: str) -> FormatError:
    """Return the error of parts that are no update of a kind."""
    came = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
    return FormatError(f"not an update of kind {kind}", f"{came or 'nothing'} {why}", "use a sound copy")


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuse a result that is not finite.

    Raises:
        NumericsError: It holds NaN or Inf.
    """
    if not all_finite(tensor):
        raise beyond(f"{name}, as {str(tensor.dtype).removeprefix('torch.')}")


def beyond(got: str) -> NumericsError:
    """Return the error of an update whose numbers become too large."""
    return NumericsError("the update grows beyond its dtype", got, "store float32, or check the numbers of the file")


def number(value: float, dtype: torch.dtype) -> Tensor:
    """Return a number as a tensor of `dtype`, or of float32 where `dtype` does not hold it exactly."""
    stored = torch.tensor(value, dtype=torch.float64).to(dtype)
    return stored if float(stored) == value else torch.tensor(value, dtype=torch.float32)


def times(tensor: Tensor, factor: float) -> Tensor:
    """Return a multiple of a tensor: in its dtype where that rounds by no more than `EXACT`, else in float32."""
    exact = tensor.double() * factor
    stored = exact.to(tensor.dtype)
    error = torch.linalg.vector_norm(stored.double() - exact)
    return stored if float(error) <= EXACT * float(torch.linalg.vector_norm(exact)) else exact.float()


def stacked(parts: Sequence[AdapterLayer], layer: Layer) -> AdapterLayer | None:
    """Return the update whose `cut` is `parts`; None where there is none.

    Args:
        parts: Updates of one kind, in the order of their rows.
        layer: The fused layer.
    """
    first = parts[0]
    axes = first.row_axes()
    if axes is None or not all(_shares(first, part, axes) for part in parts):
        return None
    rows = {
        name: torch.cat([part.parts()[name] for part in parts], axis)
        for name, axis in axes.items()
        if name in first.parts()
    }
    changes: dict[str, Any] = {"layer": layer, **rows}
    return replace(first, **changes)


def _shares(a: AdapterLayer, b: AdapterLayer, axes: Mapping[str, int]) -> bool:
    """Return whether two layers differ in nothing but their rows."""
    ours, theirs = a.parts(), b.parts()
    if type(a) is not type(b) or ours.keys() != theirs.keys() or b.row_axes() != axes:
        return False
    if getattr(a, "alpha", None) != getattr(b, "alpha", None) or any(ours[n].dtype != theirs[n].dtype for n in ours):
        return False
    # float8 knows no comparison
    shared = [name for name in ours if name not in axes]
    return all(torch.equal(ours[name].float(), theirs[name].float()) for name in shared)


def magnitude_shape(scale: Shape, weight: Shape) -> Shape | None:
    """Return the shape of a magnitude beside a weight, `[out, 1, ...]` or `[1, in, ...]`; None if it is none.

    Args:
        scale: Its shape in a file: `[out]` and `[out, 1, ...]` are per output, `[1, in, ...]` per input.
        weight: Shape of the weight.
    """
    size, tail = math.prod(scale), (1,) * len(weight[2:])
    if scale[:2] == (1, weight[1]) and size == weight[1]:
        return (1, size, *tail)
    return (size, 1, *tail) if size == weight[0] and max(scale) == size else None


def without_magnitude(update: AdapterLayer) -> AdapterLayer:
    """Return an update without its `dora_scale`: that of the direction."""
    changes: dict[str, Any] = {"dora_scale": None}
    return replace(update, **changes)


def with_magnitude(update: AdapterLayer, dora_scale: Tensor) -> AdapterLayer:
    """Return an update with a `dora_scale`, in the dtype of the update and as its layer has it."""
    shape = magnitude_shape(tuple(dora_scale.shape), update.layer.shape) or dora_scale.shape
    changes: dict[str, Any] = {"dora_scale": dora_scale.to("cpu", update.dtype).reshape(shape)}
    return replace(update, **changes)
