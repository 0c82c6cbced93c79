"""Mutations of safetensors files, as hypothesis strategies: of the bytes, of the header, and of the tensors."""

import json
import math
from typing import Any

from hypothesis import strategies as st

NAMES = (
    "", ".", "..", "__metadata__", "../../etc/passwd", "/etc/passwd", "\x1b[31mred\x1b[0m", "a\nb\rc\x07", "\u202eabc",
    "<script>alert(1)</script>", "[bold]x[/bold]", "unet:\u00b2:up", "unet:\u0663:down", "unet:99999999999999999999:up",
    "text_encoder:0:up", "lora_unet_", "lora_unet__.alpha", "unet.x.processor.to_q_lora.up.weight", "x" * 5000,
    "a." * 400 + "lora_up.weight", "9" * 400 + ".lora_up.weight", "unet.\u0661.delta", "lora_te_\ud800".encode(
        "utf-8", "replace").decode() + ".diff", "model.diffusion_model.x.1.weight", "first_stage_model.x.weight",
    "down_blocks.99999999999999999999.x.weight", "up_blocks.\u0662.attentions.0.x.weight", "blocks.0.0.weight",
    "lora_unet_weird\nthing.x.diff", "lora_unet_double_blocks_0_img_attn_qkv.diff", ".alpha", "alpha", ".delta",
)  # fmt: skip
ROLES = (
    "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale", "hada_w1_a", "hada_w1_b", "hada_t1",
    "hada_w2_a", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_t2", "a1.weight", "b2.weight",
    "oft_blocks", "rescale", "diff", "diff_b", "w_norm", "b_norm", "foura_gate", "delta", "reshape_weight",
    "lora_magnitude_vector", "lora_B.bias", "weight", "bias", "scale_weight", "weight_scale",
)  # fmt: skip
SIZES = (0, 1, 2, 3, 4, 7, 8, 16, 32, 36, 64, 320, 768, 3072)
WIDE = (*SIZES, -1, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30, 1.5, "2", None, True, [], {})
DTYPES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "BOOL": 1, "U16": 2, "U32": 4, "U64": 8, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
JSONS = (
    "", "null", "[]", "{}", "1", '"x"', "{", "[" * 2000, "[" * 100_000 + "]" * 100_000, '{"a":' * 5000, "NaN", "1e999",
    "9" * 5000, '{"r": 0, "lora_alpha": 1e308}', '{"r": "x"}', '{"lora_alpha": NaN}',
    '{"lora_alpha": Infinity, "r": 1}',
    '{"alpha_pattern": []}', '{"alpha_pattern": {"to_q": null}}', '{"rank_pattern": {"to_q": ' + "9" * 400 + "}}",
    '{"alpha_pattern": {"to_q": NaN}}', '{"rank_pattern": {"": 0}, "lora_alpha": 1}', '{"lora_alpha": [1]}',
    '{"use_rslora": {}, "lora_alpha": 1}', '{"unet.x": {"\\u001b[31m": "\\ud800"}}', '["\\u001b", 2, null]',
    '{"unet.down_blocks.0": 3}', "CrossAttention", "\x1b[2J", "<embed>", "2", "sd1", "flux", "no such family",
    '{"auto_mapping": {"base_model_class": "/etc/passwd"}, "base_model_name_or_path": "../../x", "r": 1}',
)  # fmt: skip
KNOWN_METADATA = (
    "lora_adapter_metadata", "fingerprints", "lorax_format_version", "base_family", "unet", "text_encoder", "format",
    "ss_tag_frequency", "unet:0:rank", "\x1b[31mkey",
)  # fmt: skip

Tensor = tuple[str, str, list[Any], bytes]  # name, dtype, shape, data


def parse(content: bytes) -> tuple[dict[str, Any], list[Tensor]]:
    """Return the metadata and the tensors of a sound file."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__", None) or {}
    return metadata, [(k, e["dtype"], list(e["shape"]), data[slice(*e["data_offsets"])]) for k, e in header.items()]


def build(metadata: dict[str, Any], tensors: list[Tensor]) -> bytes:
    """Return a file of these tensors; sound if they are."""
    parts, place = ([f'"__metadata__":{json.dumps(metadata)}'] if metadata else []), 0
    for name, dtype, shape, data in tensors:
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(data)]}
        parts.append(f"{json.dumps(name)}:{json.dumps(entry)}")
        place += len(data)
    text = ("{" + ",".join(parts) + "}").encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in tensors)


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a file that differs from a sound one in one to four places."""
    metadata, tensors = parse(content)
    for _ in range(draw(st.integers(1, 4))):
        tensors = draw(_of_tensors(tensors)) if tensors and draw(st.integers(0, 5)) else tensors
        if not draw(st.integers(0, 3)):
            metadata = {**metadata, draw(st.sampled_from(KNOWN_METADATA)): draw(st.sampled_from(JSONS))}
    made = build(metadata, tensors)
    way = draw(st.integers(0, 7))
    return draw(_of_header(made)) if way == 0 else draw(_of_bytes(made)) if way == 1 else made


@st.composite
def _of_tensors(draw: st.DrawFn, tensors: list[Tensor]) -> list[Tensor]:
    """Change one tensor; the file stays sound, so that it comes past the checks of the header."""
    tensors = list(tensors)
    place, other = (draw(st.integers(0, len(tensors) - 1)) for _ in range(2))
    name, dtype, shape, data = tensors[place]
    way = draw(st.sampled_from(("drop", "rename", "role", "copy", "swap", "shape", "reshape", "dtype", "values")))
    if way == "drop":
        del tensors[place]
    elif way == "rename":
        tensors[place] = (draw(st.sampled_from(NAMES)), dtype, shape, data)
    elif way in ("role", "copy"):
        role = f"{name.partition('.')[0]}.{draw(st.sampled_from(ROLES))}"
        tensors[place : place + (way == "role")] = [(role, dtype, shape, data)]
    elif way == "swap":
        tensors[place], tensors[other] = (name, *tensors[other][1:]), (tensors[other][0], dtype, shape, data)
    else:
        tensors[place] = draw(_of_content(tensors[place], way))
    return tensors


@st.composite
def _of_content(draw: st.DrawFn, tensor: Tensor, way: str) -> Tensor:
    """Change the shape, the dtype or the numbers of a tensor, its data to fit."""
    name, dtype, shape, data = tensor
    if way == "shape":
        shape = draw(st.lists(st.sampled_from(SIZES), max_size=5).filter(lambda shape: math.prod(shape) <= 2**16))
    elif way == "reshape":
        shape = draw(st.permutations(shape))
        cut = draw(st.integers(0, len(shape)))
        shape = [*shape[:cut], 1, *shape[cut:]] if draw(st.booleans()) else shape
    elif way == "dtype":
        dtype = draw(st.sampled_from(sorted(DTYPES)))
    else:
        pattern = draw(
            st.sampled_from((b"\0", b"\xff", b"\x7f", b"\x00\x00\x80\x7f", b"\x01\x00", b"\x00\x00\x80\xff"))
        )
        start = draw(st.integers(0, len(data)))
        data = (data[:start] + pattern * len(data))[: len(data)]
    size = math.prod(shape) * DTYPES[dtype]
    return name, dtype, shape, ((data or b"\0") * (size // max(1, len(data)) + 1))[:size]


@st.composite
def _of_header(draw: st.DrawFn, content: bytes) -> bytes:
    """Write something into the header that does not fit the data."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    keys = [key for key in header if key != "__metadata__"]
    way = draw(st.sampled_from(("shape", "dtype", "offsets", "entry", "metadata", "twice", "deep")))
    entry = header[draw(st.sampled_from(keys))] if keys else {}
    if way == "shape":
        entry["shape"] = draw(st.lists(st.sampled_from(WIDE), max_size=9))
    elif way == "dtype":
        entry["dtype"] = draw(st.sampled_from(("F32", "F16", "X", "", None, 3, "f32", "F4")))
    elif way == "offsets":
        entry["data_offsets"] = draw(st.lists(st.sampled_from(WIDE), max_size=3))
    elif way == "entry":
        header["odd"] = draw(st.sampled_from((None, [], "x", 1, {}, {"dtype": "F32"}, [[[]]])))
    elif way == "metadata":
        header["__metadata__"] = draw(st.sampled_from((None, [], "x", 1, {"a": 1}, {"a": {"b": []}}, {"a": None})))
    text = json.dumps(header)
    if way == "twice" and keys:
        text = text[:-1] + f", {json.dumps(keys[0])}: {json.dumps(entry)}}}"
    if way == "deep":
        text = text[:-1] + ', "deep": ' + "[" * draw(st.sampled_from((50, 500, 50_000))) + "}"
    return len(text).to_bytes(8, "little") + text.encode() + data


@st.composite
def _of_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Flip bits, cut, insert, or lie about the length of the header."""
    way = draw(st.sampled_from(("flip", "cut", "insert", "length")))
    length = int.from_bytes(content[:8], "little")
    if way == "length":
        size = draw(st.sampled_from((0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1)))
        return size.to_bytes(8, "little") + content[8:]
    place = draw(st.one_of(st.integers(0, min(len(content), 8 + length)), st.integers(0, len(content))))
    if way == "cut":
        return content[:place]
    if way == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=20)) + content[place:]
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 8))):
        changed[draw(st.integers(0, min(len(content), 8 + length) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


@st.composite
def documents(draw: st.DrawFn, seeds: tuple[str, ...]) -> str:
    """Draw a JSON document: one of the odd ones, or a sound one with some characters changed."""
    if draw(st.booleans()):
        return draw(st.sampled_from((*JSONS, *seeds)))
    text = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 5))):
        place = draw(st.integers(0, len(text)))
        end = place + draw(st.integers(0, 8))
        text = (
            text[:place]
            + draw(st.sampled_from(("", "null", "[]", "{}", '"', "9" * 30, "\x1b", "-1", "\x00")))
            + text[end:]
        )
    return text
