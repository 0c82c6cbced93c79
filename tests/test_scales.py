"""The scale of an update where no tensor says it: PEFT's configuration, diffusers' metadata, the header of the file."""

import json
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorax import Adapter, FormatError, LoraLayer, load_adapter, save_adapter
from lorax.adapters.config import HEADER_ALPHA
from lorax.adapters.lora import fuse
from lorax.adapters.pattern import Pattern, Patterns
from lorax.models.layers import Layer
from tests.tensors import randn, same

PATHS = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.10.attn.to_q",
    "transformer_blocks.10.ff.net.0.proj",
    "single_transformer_blocks.0.attn.to_k",
    "text_model.encoder.layers.3.self_attn.q_proj",
    "proj_out",
]
PATTERNS = [
    r"to_q",
    r"attn.to_q",
    r"transformer_blocks\.\d+\.attn\.to_q",
    r".*\.attn\.(to_q|to_k)$",
    r"^transformer_blocks.*",
    r".*\.layers\.3\..*(q_proj|k_proj|v_proj)$",
    r"(?:single_)?transformer_blocks\.[0-4]\.attn\.to_[qk]",
    r"transformer_blocks\.\d{2}\..*",
    r"[^.]+",
    r"(a|b*)c|proj_out",
    r"(ff|attn)\.(net\.\d+\.)?proj",
]


def spelled(prefix="base_model.model.", paths=PATHS, rank=4):
    """Return a LoRA of rank `rank` for each of these modules."""
    g = torch.Generator().manual_seed(0)
    tensors = {f"{prefix}{path}.lora_A.weight": torch.randn(rank, 8, generator=g) for path in paths}
    return tensors | {f"{prefix}{path}.lora_B.weight": torch.randn(8, rank, generator=g) for path in paths}


def written(folder, tensors, config=None, metadata=None, name="adapter_model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name, metadata)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / name


def scales(path):
    return {name.partition(".")[2]: own.scale for name, own in load_adapter(path).layers.items()}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_means_what_it_means_in_peft(pattern):
    oracle = pytest.importorskip("peft.utils.other")
    for path in PATHS:
        assert Pattern(pattern).matches(path)[0] == (oracle.get_pattern_key([pattern], path) == pattern)


@pytest.mark.parametrize("order", [PATTERNS, PATTERNS[::-1]])
def test_the_first_pattern_that_matches_counts_as_in_peft(order):
    oracle = pytest.importorskip("peft.utils.other")
    values = {pattern: float(number) for number, pattern in enumerate(order)}
    for path in PATHS:
        assert Patterns(values).value(path, -1.0) == values.get(oracle.get_pattern_key(order, path), -1.0)


PIECES = st.recursive(
    st.sampled_from(["a", "b", "c", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "^", "$", ""]),
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map("({0[0]}|{0[1]})".format)
        | st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{0}", "{1,2}", "{,1}", "{2,}"])).map(
            "(?:{0[0]}){0[1]}".format
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(PIECES, st.text("abc.1", max_size=8))
def test_any_pattern_means_what_it_means_in_python(pattern, path):
    assert Pattern(pattern).matches(path)[0] == bool(re.match(rf"(.*\.)?({pattern})$", path))


@pytest.mark.parametrize(
    "pattern", ["(a", "a)", "*a", "a**", r"(a)\1", "(?=a)b", r"a\b", "a{3,2}", "[a", "a\\", "(" * 200, "(a{99}){99}"]
)
def test_a_pattern_that_is_not_understood_is_refused(tmp_path, pattern):
    path = written(tmp_path, spelled(), {"lora_alpha": 8, "alpha_pattern": {pattern: 2}})
    with pytest.raises(FormatError, match="configuration is not readable"):
        load_adapter(path)


def test_a_hostile_pattern_does_not_hang(tmp_path, monkeypatch):
    hostile = ["(a*)*b", "(a|a)*b", "(.*.*)*b", "(([a-z])+.)+[A-Z]([a-z])+$"]
    paths = ["a" * 900, *PATHS]
    path = written(tmp_path, spelled(paths=paths), {"lora_alpha": 8, "alpha_pattern": dict.fromkeys(hostile, 2)})
    start = time.perf_counter()
    assert set(scales(path).values()) == {2.0}
    assert time.perf_counter() - start < 5
    monkeypatch.setattr("lorax.adapters.pattern.STEPS", 200_000)
    values = Patterns({f"({number}|.?){{100}}z": 1.0 for number in range(50)})
    with pytest.raises(FormatError, match="too long"):
        values.value("a" * 400, 1.0)


def test_each_component_has_its_own_configuration(tmp_path):
    """As diffusers writes it; where it says nothing of a component, diffusers takes a scale of 1."""
    q = "text_model.encoder.layers.0.self_attn.q_proj"
    tensors = spelled("transformer.", PATHS[:1]) | spelled("text_encoder.", [q]) | spelled("text_encoder_2.", [q])

    def read(config):
        path = written(tmp_path, tensors, metadata={"lora_adapter_metadata": json.dumps(config)}, name="a.safetensors")
        return {name.partition(".")[0]: own.scale for name, own in load_adapter(path).layers.items()}

    both = {"transformer.r": 4, "transformer.lora_alpha": 8, "text_encoder.r": 4, "text_encoder.lora_alpha": 2}
    assert read(both) == {"transformer": 2.0, "text_encoder": 0.5, "text_encoder_2": 1.0}
    assert read({"text_encoder.lora_alpha": 8, "text_encoder.use_rslora": True}) == {
        "transformer": 1.0, "text_encoder": 4.0, "text_encoder_2": 1.0,
    }  # fmt: skip
    assert read({"lora_alpha": 8, "r": 4}) == {"transformer": 2.0, "text_encoder": 1.0, "text_encoder_2": 1.0}


@pytest.mark.parametrize("name", HEADER_ALPHA)
def test_an_alpha_in_the_header_counts_where_no_tensor_is_one(tmp_path, name):
    assert set(scales(written(tmp_path, spelled(), metadata={name: "2"}, name="a.safetensors")).values()) == {0.5}
    with_tensor = spelled() | {"base_model.model.proj_out.alpha": torch.tensor(4.0)}
    assert set(scales(written(tmp_path, with_tensor, metadata={name: "2"}, name="a.safetensors")).values()) == {1.0}


@pytest.mark.parametrize("text", ["auto", "", "0", "-1", "nan", "inf"])
def test_a_header_that_holds_no_alpha_is_none(tmp_path, text):
    assert set(scales(written(tmp_path, spelled(), metadata={"alpha": text})).values()) == {1.0}


def test_what_kohya_noted_of_the_training_is_no_scale(tmp_path):
    """Converters put the scale into the factors and keep the note; nobody reads it."""
    assert set(scales(written(tmp_path, spelled(), metadata={"ss_network_alpha": "1"})).values()) == {1.0}


def test_two_alphas_in_the_header_are_refused(tmp_path):
    path = written(tmp_path, spelled(), metadata={"alpha": "2", "lora_alpha": "8"})
    with pytest.raises(FormatError, match="lora_alpha 8 and alpha 2"):
        load_adapter(path)


def test_a_configuration_scales_no_other_file_beside_it(tmp_path):
    config = {"r": 4, "lora_alpha": 128}
    assert set(scales(written(tmp_path, spelled(), config)).values()) == {32.0}
    for name in ("other.safetensors", "pytorch_lora_weights.safetensors"):
        assert set(scales(written(tmp_path, spelled(), name=name)).values()) == {1.0}
    assert set(scales(written(tmp_path, spelled("transformer."))).values()) == {1.0}


@pytest.mark.parametrize("naming", ["keep", "kohya", "diffusers", "original"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "moved.safetensors"])
@pytest.mark.parametrize(
    ("config", "metadata"),
    [
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, None),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {r".*\.to_[qk]": 3}}, None),
        (None, {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 8})}),
        (None, {"alpha": "8"}),
    ],
)
def test_what_is_written_beside_a_configuration_is_not_scaled_again(tmp_path, naming, name, config, metadata):
    adapter = load_adapter(written(tmp_path / "from", spelled(paths=PATHS[:3]), config, metadata))
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "adapter_config.json").write_text(json.dumps(config or {"r": 4, "lora_alpha": 8}))
    save_adapter(adapter, tmp_path / "to" / name, naming=naming)
    again = load_adapter(tmp_path / "to" / name)
    assert again.layers.keys() >= adapter.layers.keys()
    for layer, own in again.layers.items():  # a fused weight is written whole, with zeros for what is not in the file
        expected = (
            adapter.layers[layer].delta_weight() if layer in adapter.layers else torch.zeros(own.layer.matrix_shape)
        )
        same(own.delta_weight(), expected)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6], ids="{:g}".format)
@pytest.mark.parametrize(("alpha", "rank"), [(1.0, 128), (3.0, 128), (16.0, 6), (0.0, 4), (2.0**12, 4), (-1.0, 8)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_a_scale_within_the_factors_is_exact(size, alpha, rank, dtype):
    own = LoraLayer(Layer("x", (32, 16)), (randn(32, rank) * size).to(dtype), randn(rank, 16, seed=1).to(dtype), alpha)
    scaled = own.scaled()
    assert scaled.scale == 1
    expected = own.lora_up.double() @ own.lora_down.double() * (alpha / rank)
    got = scaled.lora_up.double() @ scaled.lora_down.double()
    same(got, expected)
    is_power = alpha == 0 or (alpha / rank) in {2.0**k for k in range(-20, 20)}
    if is_power and size > 1e-6 and dtype != torch.float8_e4m3fn:
        assert scaled.lora_up.dtype == scaled.lora_down.dtype == dtype


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = torch.nn.Linear(16, 32)
        self.to_k = torch.nn.Linear(16, 32)


@pytest.mark.parametrize("naming", ["diffusers", "kohya", "original"])
@pytest.mark.parametrize("stored", [None, torch.float16], ids=str)
@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_what_is_written_in_half_precision_has_the_update_of_float64(tmp_path, naming, stored, alpha):
    """Alpha 1 and rank 128 put small factors below what half precision holds."""
    layers = {}
    for seed, name in enumerate(("to_q", "to_k")):
        up, down = (randn(32, 128, seed=seed) * 1e-4).half(), randn(128, 16, seed=9 + seed).half()
        layers[f"transformer.{name}"] = LoraLayer(Layer(f"transformer.{name}", (32, 16)), up, down, alpha)
    adapter = Adapter("a", None, "kohya", layers)
    save_adapter(adapter, tmp_path / "a.safetensors", naming=naming, dtype=stored)
    tensors = load_file(tmp_path / "a.safetensors")
    assert stored is None or {t.dtype for key, t in tensors.items() if not key.endswith("alpha")} == {stored}
    for name in ("to_q", "to_k"):
        own = layers[f"transformer.{name}"]
        expected = own.lora_up.double() @ own.lora_down.double() * (alpha / 128)
        if naming == "diffusers":
            peft = pytest.importorskip("peft")
            keys = {key.replace("transformer.", ""): value for key, value in tensors.items()}
            model = peft.inject_adapter_in_model(peft.LoraConfig(r=128, lora_alpha=128, target_modules=[name]), Small())
            peft.set_peft_model_state_dict(model, {f"base_model.model.{key}": value for key, value in keys.items()})
            got = getattr(model, name).get_delta_weight("default").detach().double()
        else:
            prefix = "lora_unet_" if naming == "kohya" else "diffusion_model."
            ends = ("lora_up", "lora_down") if naming == "kohya" else ("lora_B", "lora_A")
            up, down = (tensors[f"{prefix}{name}.{end}.weight"].double() for end in ends)
            got = up @ down * (float(tensors[f"{prefix}{name}.alpha"]) / 128)
        bound = 1e-6 if stored is None or alpha == 1 else 1e-3
        assert float((got - expected).norm() / expected.norm()) < bound


def test_parts_of_unequal_scales_are_fused_exactly():
    parts = [
        LoraLayer(Layer(f"x.{i}", (8, 16)), (randn(8, 4, seed=i) * 1e-4).half(), randn(4, 16).half(), alpha)
        for i, alpha in enumerate((1 / 64, 0.3))
    ]
    whole = fuse(parts, Layer("x", (16, 16)))
    expected = torch.cat([part.lora_up.double() @ part.lora_down.double() * part.scale for part in parts])
    same(whole.delta_weight(torch.zeros(16, 16).double()), expected)
