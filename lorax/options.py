"""The options of a transfer, the choices, and the defaults (of training too), each with its source."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, TypeVar, get_args

from .checks import check_positive
from .errors import OptionError


class Choice(str, Enum):
    """Words to choose from, each the text that it is (`enum.StrEnum`, which Python 3.10 does not have)."""

    __str__ = str.__str__
    __hash__ = str.__hash__  # an enum's own goes by its name, and would not find its word


class Method(Choice):
    """How an update is moved; what each needs and does is in `lorax.transfer.methods`."""

    auto = "auto"
    orthogonal = "orthogonal"
    copy = "copy"
    project = "project"
    subspace_null = "subspace-null"
    align = "align"
    by_index = "index"


class Matching(Choice):
    """How blocks of the two bases are paired; see `lorax.compare.matching`."""

    auto = "auto"
    by_name = "name"
    in_order = "order"
    argmax = "argmax"


class Dora(Choice):
    """How a DoRA is moved."""

    direction = "direction"
    dense = "dense"


class Format(Choice):
    """The form of the result."""

    lora = "lora"
    lora_x = "lora-x"


class Naming(Choice):
    """How the result spells its layers."""

    keep = "keep"
    kohya = "kohya"
    diffusers = "diffusers"
    original = "original"


class DType(Choice):
    """How the result is stored."""

    keep = "keep"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Run(Choice):
    """Where a migration runs."""

    local = "local"
    ray = "ray"


# The paper's setting for every pair of bases (arXiv 2501.16559, section 5).
RANK = 320
# Of a LoRA that is made of an update of another kind. Ours: no published rule; the report shows what it keeps.
LORA_RANK = 64
# Columns of the sketches by which wide layers are compared; docs/performance.md has the accuracy of others.
SKETCH = 64
# What unrelated layers score after the correction: a layer that is no better than chance gets no update.
THRESHOLD = 0.0
# A step of AdamW moves a singular value by about this much. Ours: no published figure.
LEARNING_RATE = 1e-3
# The longest gradient; what the training scripts of diffusers and kohya have by default.
CLIP_NORM = 1.0

C = TypeVar("C", bound=Choice)


def choice(kind: type[C], value: str) -> C:
    """Return the choice that a word is.

    Raises:
        OptionError: It is none of them.
    """
    try:
        return kind(value)
    except ValueError as error:
        fix = f"choose one of {', '.join(kind)}"
        raise OptionError(f"unknown {kind.__name__.lower()}", str(value), fix) from error


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """How an adapter is moved; the command line and the manifest of a migration are made of these fields.

    Choices may be given as their words.

    Attributes:
        method: See `lorax.transfer.methods`. `auto`: `orthogonal` for what is low-rank, `copy` (onto the paired layer)
            for what is not, `align` where the sizes differ; see docs/results.md.
        rank: Singular triplets of each weight that make its leading subspace (a smaller layer uses all that it has);
            None means 320, also for bases that have no layer of that size.
        threshold: A layer whose corrected similarity (the lower of both sides) is not above this gets no update.
        matching: How blocks of the two bases are paired; see `lorax.match_bases`. Not used where the pairs are given.
        lora_rank: Rank of the LoRA that an update of another kind (LoHa, LoKr, full difference, ...) becomes where it
            cannot be copied as it is.
        dora: `direction`: the update of a DoRA moves without its magnitude, which follows in its ratio to the weight's;
            `dense`: what the whole DoRA changes is moved, as a LoRA.
        format: `lora`: factors of the rank of the input; `lora-x`: singular values of the target.
        naming: How the result spells its layers; `keep`: as the input.
        dtype: Of the factors of the result; `keep` takes that of the input. Half precision rounds by 3e-4.
        fast: Find the subspaces that are only projected on about twice as fast; see `lorax.linalg.leading_subspace`.
        exact: Compare wide layers by their whole Gram matrices, not by sketches, which give estimates with a standard
            error; see `lorax.pair_scores`.
        strict: Fail unless all layers of the file arrive, those that could not be read too.

    Raises:
        OptionError: A choice is unknown, or a number out of range.
    """

    # The types are read as they stand (command line, manifest): no `from __future__ import annotations` here.
    method: Method = field(
        default=Method.auto, metadata={"help": "auto: orthogonal, and align where the size changes."}
    )
    rank: int | None = field(
        default=None,
        metadata={"help": "Singular directions that make a weight's leading subspace.", "shown": str(RANK)},
    )
    threshold: float = field(
        default=THRESHOLD, metadata={"help": "A layer gets an update above this corrected similarity."}
    )
    matching: Matching = field(
        default=Matching.auto,
        metadata={"help": "Pairing of blocks: auto goes by similarity, in order, where the bases differ in depth."},
    )
    lora_rank: int = field(
        default=LORA_RANK,
        metadata={"help": "Rank of the LoRA that another kind of update becomes, if it cannot be copied."},
    )
    dora: Dora = field(
        default=Dora.direction,
        metadata={"help": "Move a DoRA's direction and keep its magnitudes' ratio, or its dense update."},
    )
    format: Format = field(default=Format.lora, metadata={"help": "Form of the result."})
    naming: Naming = field(default=Naming.keep, metadata={"help": "Spelling of the layers in the result."})
    dtype: DType = field(default=DType.keep, metadata={"help": "Storage of the result."})
    fast: bool = field(
        default=False, metadata={"help": "Subspaces about twice as fast, the update right to about 1e-4."}
    )
    exact: bool = field(
        default=False, metadata={"help": "Compare wide layers exactly, which takes several times as long."}
    )
    strict: bool = field(default=False, metadata={"help": "Fail unless every layer of the file arrives."})

    def __post_init__(self) -> None:
        for option in fields(self):
            if isinstance(option.default, Choice):
                object.__setattr__(self, option.name, choice(type(option.default), getattr(self, option.name)))
        check_positive(self.lora_rank, "lora_rank")
        if self.rank is not None:
            check_positive(self.rank)
        if not (math.isfinite(self.threshold) and self.threshold < 1):
            raise OptionError("the threshold is out of range", str(self.threshold), "give a number below 1")

    @property
    def subspace_rank(self) -> int:
        """How many singular triplets make a leading subspace: `rank`, or its default."""
        return RANK if self.rank is None else self.rank

    @property
    def sketch(self) -> int | None:
        """How many columns the sketches have by which wide layers are compared; None: they are compared exactly."""
        return None if self.exact else SKETCH

    def changed(self, given: Mapping[str, object]) -> "TransferOptions":
        """Return them with others by name, each of the type of the option; a choice may be its word.

        Raises:
            OptionError: One does not exist, is of another type or out of range.
        """
        types = {option.name: option.type for option in fields(self)}
        for name, value in given.items():
            if name not in types:
                raise OptionError("an option that does not exist", name, f"known are {', '.join(types)}")
            wanted: Any = get_args(types[name]) or (types[name],)
            is_word = type(value) is str and issubclass(wanted[0], Choice)
            if not is_word and type(value) not in wanted and not (float in wanted and type(value) is int):
                got = f"{name} = {value!r}"
                raise OptionError("an option of the wrong type", got, "see lorax transfer --help")
        return replace(self, **given)  # pyright: ignore[reportArgumentType]


DEFAULTS = TransferOptions()
