"""A coverage-guided fuzzer (atheris, libFuzzer) on our own parsers: `python -m reliability.fuzz TARGET [-runs=N]`.

Targets: `header` (bytes of a safetensors file), `adapter` (names and shapes of an adapter's tensors), `base` (of a
checkpoint's), `keys` (names alone), `documents` (assignment, configuration). An input that ends otherwise than in a
result or a `LoraxError` is written to a file `crash-...` and ends the run.
"""

# The types that typeshed has of atheris lack most of it, and atheris is an extra.
# pyright: reportAttributeAccessIssue=false, reportMissingModuleSource=false

import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import atheris

with atheris.instrument_imports(include=["lorax"]):
    from lorax import load_adapter, load_assignment, open_base
    from lorax.adapters.keys import parse, why_unknown
    from lorax.errors import LoraxError
    from lorax.files.tensorfile import parse_json
    from lorax.inspect import describe
    from lorax.models.families import families, recognise

from . import seeds
from .mutations import DTYPES, KNOWN_METADATA, ROLES, SIZES, build

T = TypeVar("T")
# Pieces of names, so that the fuzzer need not find them letter by letter.
WORDS = (
    "lora_unet_", "lora_te_", "lora_te2_", "lora_te3_", "unet.", "transformer.", "diffusion_model.",
    "base_model.model.", "model.diffusion_model.", "text_encoders.clip_l.transformer.", "text_model.", "unet:",
    "text_encoder:", "lycoris_", "down_blocks", "up_blocks", "mid_block", "attentions", "transformer_blocks",
    "resnets", "input_blocks", "output_blocks", "double_blocks", "single_blocks", "img_attn", "qkv", "attn1",
    "attn2", "to_q", "to_k", "to_out", "ff.net", "proj", "linear1", "layers", "blocks", "norm", "processor",
    "encoder", "self_attn", "q_proj", "conv_in", "conv1", "middle_block", "label_emb", ".", "_", ":", "0", "1",
    "12", "\xb2", "\u0663", "\x1b", "\n", "..", "/",
)  # fmt: skip


def _pick(data: atheris.FuzzedDataProvider, values: Sequence[T]) -> T:
    return values[data.ConsumeIntInRange(0, len(values) - 1)]


def _name(data: atheris.FuzzedDataProvider) -> str:
    parts = [_pick(data, WORDS) for _ in range(data.ConsumeIntInRange(0, 8))]
    return "".join(parts) + data.ConsumeUnicodeNoSurrogates(data.ConsumeIntInRange(0, 6))


def _tensors(data: atheris.FuzzedDataProvider, roles: tuple[str, ...]) -> bytes:
    """Return a sound file whose names, shapes, dtypes and metadata the fuzzer chooses."""
    tensors: dict[str, tuple[str, str, list[int], bytes]] = {}
    name, left = _name(data), 2**16
    for _ in range(data.ConsumeIntInRange(1, 8)):
        name = name if data.ConsumeBool() else _name(data)
        key = f"{name}.{_pick(data, roles)}" if data.ConsumeIntInRange(0, 7) else name
        dtype = _pick(data, sorted(DTYPES)) if not data.ConsumeIntInRange(0, 7) else "F16"
        shape, count = [], 1
        for _ in range(data.ConsumeIntInRange(0, 5)):
            size = _pick(data, SIZES)
            if count * size * DTYPES[dtype] <= left:
                shape.append(size)
                count *= size
        left -= count * DTYPES[dtype]
        if key != "__metadata__" and left >= 0:
            tensors[key] = (key, dtype, shape, bytes([data.ConsumeIntInRange(0, 60)]) * (count * DTYPES[dtype]))
    metadata = {}
    while data.ConsumeBool() and len(metadata) < 4:
        metadata[_pick(data, KNOWN_METADATA)] = data.ConsumeUnicodeNoSurrogates(40)
    return build(metadata, list(tensors.values()))


class Targets:
    """What is fuzzed: each method takes the bytes that the fuzzer made."""

    def __init__(self, folder: Path) -> None:
        self.path, self.documents_at = folder / "x.safetensors", folder / "beside"
        self.pair = [open_base(seeds.base_file(folder / f"{i}.safetensors")) for i in range(2)]
        self.documents_at.mkdir()
        up, down = (f"{seeds.PEFT}.lora_{side}.weight" for side in "BA")
        self.peft = self.documents_at / "adapter_model.safetensors"
        self.peft.write_bytes(build({}, [(up, "F32", [32, 1], bytes(128)), (down, "F32", [1, 32], bytes(128))]))

    def header(self, content: bytes) -> None:
        """Bytes of a header."""
        ends = [int(end) for end in re.findall(rb"offsets\":\[\d+, *(\d{1,6})\]", content)]
        data = bytes(min(2**16, max(ends, default=0)))  # as much as it says there is
        self.path.write_bytes(len(content).to_bytes(8, "little") + content + data)
        tried(lambda: describe(self.path), lambda: open_base(self.path), lambda: load_adapter(self.path))

    def adapter(self, content: bytes) -> None:
        """An adapter of any names and shapes."""
        self.path.write_bytes(_tensors(atheris.FuzzedDataProvider(content), ROLES))
        tried(lambda: describe(self.path), lambda: load_adapter(self.path, self.pair[0]))

    def base(self, content: bytes) -> None:
        """A base of any names and shapes."""
        self.path.write_bytes(_tensors(atheris.FuzzedDataProvider(content), ("weight", "bias", "scale_weight")))
        tried(
            lambda: describe(self.path), lambda: [open_base(self.path).weight(n) for n in open_base(self.path).layers]
        )

    def keys(self, content: bytes) -> None:
        """Names alone."""
        data = atheris.FuzzedDataProvider(content)
        names = [f"{_name(data)}.{_pick(data, ROLES)}" for _ in range(data.ConsumeIntInRange(1, 4))]
        recognise({name: (32, 32) for name in names})
        for name in names:
            if (key := parse(name)) is None:
                assert why_unknown(name)
            else:
                for family in families().values():
                    family.find(key.component, key.path, (_pick(data, SIZES), 32))

    def documents(self, content: bytes) -> None:
        """An assignment, and the configuration beside an adapter."""
        document = self.documents_at / "pairs.json"
        for path in (document, self.documents_at / "adapter_config.json"):
            path.write_bytes(content)
        tried(lambda: load_assignment(document, *self.pair), lambda: load_adapter(self.peft))
        with suppress(ValueError):
            parse_json(content)


def tried(*calls: Callable[[], object]) -> None:
    """Call each; a `LoraxError` with words for the screen is as good as a result."""
    for call in calls:
        try:
            call()
        except LoraxError as error:
            if not str(error).isprintable():
                raise ValueError("an error that a terminal would obey") from error


def corpus(name: str, folder: Path) -> list[str]:
    """Write sound inputs for the fuzzer to start from; return their folder as an argument, if there are any."""
    contents: list[bytes] = []
    if name == "header":
        contents = [whole[8 : 8 + int.from_bytes(whole[:8], "little")] for whole in seeds.adapters().values()]
    if name == "documents":
        configuration = {
            "r": 2,
            "lora_alpha": 4,
            "use_rslora": True,
            "rank_pattern": {"to_q": 2},
            "alpha_pattern": {"a": 1},
        }
        assignment = {
            "schema": "lorax-assignment",
            "schema_version": 1,
            "matching": "order",
            "pairs": {"unet.conv_in": ""},
        }
        contents = [json.dumps(each).encode() for each in (configuration, assignment, {"assignment": assignment})]
    for number, content in enumerate(contents):
        (folder / str(number)).write_bytes(content)
    return [str(folder)] if contents else []


def main() -> None:
    """Fuzz one target; what follows its name goes to libFuzzer."""
    name, *words = sys.argv[1:]
    folder, begin = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    atheris.Setup([sys.argv[0], *words, *corpus(name, begin)], getattr(Targets(folder), name))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
