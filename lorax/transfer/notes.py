"""What a report tells beyond its numbers: codes with values. The sentences are here, translations in `locales/`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, unique
from typing import Any, Union

# A number, a name or a reason as it is, another note, or how many there are of each outcome.
Value = Union[int, float, str, "Note", Mapping[str, int]]


@unique
class Code(Enum):
    """What can be told: the code is the name in lower case, the value its sentence in English."""

    ADAPTER_SIZE = "adapter {adapter}, source {source}"
    VECTOR_SIZE = "a norm or bias can only be copied, source {source}, target {target}"
    NEEDS_EQUAL_SIZES = "{method} needs equal sizes, source {source}, target {target}"
    FIRST_CHANNELS = "the first {channels} input channels, source {source}, target {target}"
    BOTH_RESIZED = "both sides change size: matched by index, the weakest kind"
    WHOLE_OUTPUT = "the subspace is all of the output side: no projection there"
    WHOLE_INPUT = "the subspace is all of the input side: no projection there"
    WHOLE_BOTH = "the subspace is all of the output and the input side: no projection there"
    MADE_LORA = "{kind} made a LoRA of rank {rank}"
    FED_ALREADY = "another layer feeds the same"
    NOT_IN_BOTH = "{component} is not in both bases"
    UNREAD = "{why}"

    WEAK = "weak effect: only {percent}% of the update's norm arrives; try {advice}"
    WEAK_OR_STRENGTH = (
        "weak effect: only {percent}% of the update's norm arrives; try {advice}, or a strength of about {strength}"
    )
    TRY_METHOD = "the method copy or a higher rank"
    TRY_THRESHOLD = "a lower threshold or a target closer to the source"
    TRY_TARGET = "a target closer to the source"
    MISSING = "{missing} of {layers} layers get no update: {outcomes}"
    MANY_RESIZED = "{count} layers change both sizes, the weakest kind of transfer: check the pictures"
    UNUSED = "{count} tensors of the file are not used, the first {first}: {why}"


@dataclass(frozen=True, slots=True)
class Note:
    """A code and its values; as text it is the sentence in English."""

    code: Code
    values: Mapping[str, Value] = field(default_factory=dict[str, Value])

    @classmethod
    def of(cls, code: Code, **values: Value) -> "Note":
        """Return a note of a code, with a value for each name in its sentence."""
        return cls(code, values)

    def __str__(self) -> str:
        return self.code.value.format(**{name: _text(value) for name, value in self.values.items()})

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data: `code`, `values`, and `text` for who does not know the code."""
        return {
            "code": self.code.name.lower(),
            "values": {name: _plain(value) for name, value in self.values.items()},
            "text": str(self),
        }


def counted(words: Mapping[Any, int]) -> str:
    """Return how many there are of each word: `3 not in target, 1 below threshold`."""
    return ", ".join(f"{count} {word}" for word, count in words.items())


def _text(value: Value) -> str:
    return counted(value) if isinstance(value, Mapping) else str(value)


def _plain(value: Value) -> Any:
    if isinstance(value, Note):
        return value.to_json()
    return dict(value) if isinstance(value, Mapping) else value
