"""The choices and defaults of a transfer and of training, each with its source."""

from enum import Enum


class Choice(str, Enum):
    """Words to choose from, each the text that it is (`enum.StrEnum`, which Python 3.10 does not have)."""

    __str__ = str.__str__


class Method(Choice):
    """How an update is moved; the formulas are in `lorax.transfer.methods`."""

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


METHODS = tuple(map(str, Method))
MATCHINGS = tuple(map(str, Matching))
DORA = tuple(map(str, Dora))
FORMATS = tuple(map(str, Format))
NAMINGS = tuple(map(str, Naming))
DTYPES = tuple(map(str, DType))
RUNS = tuple(map(str, Run))
# The paper's setting for every pair of bases (arXiv 2501.16559, section 5).
RANK = 320
# Of a LoRA that is made of an update of another kind. Ours: no published rule; the report shows what it keeps.
LORA_RANK = 64
# What unrelated layers score after the correction: a layer that is no better than chance gets no update.
THRESHOLD = 0.0
# A step of AdamW moves a singular value by about this much. Ours: no published figure.
LEARNING_RATE = 1e-3
# The longest gradient; what the training scripts of diffusers and kohya have by default.
CLIP_NORM = 1.0
