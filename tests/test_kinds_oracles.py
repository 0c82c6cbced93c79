"""Every kind of adapter layer against the programs that make such files: LyCORIS and PEFT."""

import pytest
import torch
from torch import nn

from lorax.adapters import (
    BoftLayer,
    DiffLayer,
    GloraLayer,
    LohaLayer,
    LokrLayer,
    LoraLayer,
    OftLayer,
    VectorLayer,
)
from lorax.models.layers import Layer
from tests.agreement import agree
from tests.tensors import randn

lycoris = pytest.importorskip("lycoris.modules")
peft = pytest.importorskip("peft")
LINEAR, CONV = (24, 16), (24, 16, 3, 3)


def base_layer(shape):
    layer = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2:])
    nn.init.normal_(layer.weight, std=0.3, generator=torch.Generator().manual_seed(5))
    return layer.double()


def effective(forward, shape, dtype=torch.float64):
    """Return the weight that a module acts with, from its answers to one input at a time."""
    count = torch.Size(shape[1:]).numel()
    inputs = torch.eye(count, dtype=dtype).reshape(count, *shape[1:])
    zero = torch.zeros_like(inputs[:1])
    with torch.no_grad():
        return (forward(inputs) - forward(zero)).reshape(count, shape[0]).T


# ---------------------------------------------------------------------------------------------------------- LyCORIS

WD = [{"weight_decompose": True, "wd_on_out": True}, {"weight_decompose": True, "wd_on_out": False}]
LYCORIS = [
    *((lycoris.LoConModule, LoraLayer, s, o) for s in (LINEAR, CONV) for o in [{}, *WD]),
    (lycoris.LoConModule, LoraLayer, CONV, {"use_tucker": True}),
    (lycoris.LoConModule, LoraLayer, CONV, {"use_tucker": True, **WD[0]}),
    (lycoris.LoConModule, LoraLayer, LINEAR, {"rs_lora": True}),
    *((lycoris.LohaModule, LohaLayer, s, o) for s in (LINEAR, CONV) for o in [{}, *WD]),
    (lycoris.LohaModule, LohaLayer, CONV, {"use_tucker": True}),
    *((lycoris.LokrModule, LokrLayer, s, {"factor": 4, **o}) for s in (LINEAR, CONV) for o in [{}, *WD]),
    (lycoris.LokrModule, LokrLayer, LINEAR, {"factor": 4, "full_matrix": True}),
    (lycoris.LokrModule, LokrLayer, CONV, {"factor": 4, "full_matrix": True}),
    (lycoris.LokrModule, LokrLayer, LINEAR, {"factor": 8, "decompose_both": True, "lora_dim": 1}),
    (lycoris.LokrModule, LokrLayer, CONV, {"factor": 4, "decompose_both": True, "lora_dim": 1}),
    (lycoris.LokrModule, LokrLayer, CONV, {"factor": 4, "use_tucker": True}),
    (lycoris.LokrModule, LokrLayer, LINEAR, {"factor": 4, "unbalanced_factorization": True}),
    *((lycoris.GLoRAModule, GloraLayer, s, {}) for s in (LINEAR, CONV)),
    *(
        (module, layer, s, {"lora_dim": 4, **o})
        for module, layer in ((lycoris.DiagOFTModule, OftLayer), (lycoris.ButterflyOFTModule, BoftLayer))
        for s in (LINEAR, CONV)
        for o in ({}, {"rescaled": True}, {"constraint": 0.01})
    ),
    (lycoris.FullModule, DiffLayer, LINEAR, {}),
    (lycoris.FullModule, DiffLayer, CONV, {}),
]


def named(case):
    module, _, shape, options = case
    return " ".join([module.name, "conv" if len(shape) == 4 else "linear", *(k for k, v in options.items() if v)])


@pytest.mark.parametrize("case", LYCORIS, ids=map(named, LYCORIS))
def test_lycoris_acts_with_our_update(case):
    module_class, kind, shape, options = case
    shape = (shape[0] * 4 // 3, *shape[1:]) if module_class is lycoris.ButterflyOFTModule else shape  # a power of 2
    # Its rotations are inverted in float32 and go with nothing else.
    dtype = torch.float32 if kind in (OftLayer, BoftLayer) else torch.float64
    org = base_layer(shape).to(dtype)
    weight = org.weight.detach().clone()
    module = module_class("x", org, **({"lora_dim": 2, "alpha": 1.5} | options)).to(dtype).eval()
    if module_class is lycoris.FullModule:
        module.apply_to()
    for number, parameter in enumerate(module.parameters()):
        change = (0.3 * randn(*parameter.shape, seed=number)).to(dtype)
        parameter.data += change if not number % 2 else change.abs()
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    layer = Layer("unet.x", shape)
    parts, alpha = as_parts(state, kind)
    ours = kind.read(layer, parts, alpha)
    theirs = effective(module.forward, shape, dtype) - weight.reshape(shape[0], -1)
    name = f"lycoris {ours.kind}"
    agree(name, ours.delta_weight(weight), theirs)
    assert ours.needs_weight == (kind in (GloraLayer, OftLayer, BoftLayer) or "weight_decompose" in options)
    if not ours.needs_weight:
        agree(name, ours.delta_weight(), theirs)
    written = ours.tensors()
    assert {key: tuple(tensor.shape) for key, tensor in written.items() if key != "alpha"} == {
        key: tuple(tensor.shape) for key, tensor in state.items() if key not in ("alpha", "diff_b")
    }
    assert all(torch.equal(written[key].double(), state[key].double()) for key in written if key != "alpha")
    assert "alpha" not in state or float(written["alpha"]) == pytest.approx(float(state["alpha"]))


def as_parts(state, kind):
    """Name the tensors of one module by field, as the loader does."""
    spelled = {kind.KEYS.get(name, name): name for name in kind.REQUIRED | kind.OPTIONAL}
    parts = {spelled[key]: tensor for key, tensor in state.items() if key in spelled}
    return parts, float(state["alpha"]) if "alpha" in state else None


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.GroupNorm(2, 8)], ids=["LayerNorm", "GroupNorm"])
def test_lycoris_norm_is_a_vector(norm):
    module = lycoris.NormModule("x", norm)
    module.w_norm.data += randn(8)
    module.b_norm.data += randn(8, seed=1)
    weight, bias = module.get_diff_weight()
    for role, theirs in (("w_norm", weight), ("b_norm", bias)):
        ours = VectorLayer(Layer("unet.norm.weight", (8,)), module.state_dict()[role], role)
        agree("lycoris vector", ours.delta_weight(), theirs.detach())
        assert ours.tensors().keys() == {role}


# -------------------------------------------------------------------------------------------------------------- PEFT


class Model(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.x = base_layer(shape)

    def forward(self, x):
        return self.x(x)


PEFT = [
    *(
        (peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, target_modules=["x"], **options), LoraLayer, shape)
        for shape in (LINEAR, CONV)
        for options in ({}, {"use_dora": True}, {"use_rslora": True})
    ),
    *(
        (peft.LoHaConfig(r=2, alpha=5, init_weights=False, target_modules=["x"], **options), LohaLayer, shape)
        for shape, options in ((LINEAR, {}), (CONV, {}), (CONV, {"use_effective_conv2d": True}))
    ),
    *(
        (peft.LoKrConfig(**({"r": 2} | options), alpha=5, init_weights=False, target_modules=["x"]), LokrLayer, shape)
        for shape, options in (
            (LINEAR, {}),
            (LINEAR, {"decompose_both": True, "r": 1}),
            (CONV, {}),
            (CONV, {"use_effective_conv2d": True}),
        )
    ),
]
PEFT_FIELDS = {"lora_A.weight": "lora_down", "lora_B.weight": "lora_up", "lora_magnitude_vector": "dora_scale"}


@pytest.mark.parametrize("case", PEFT, ids=lambda case: f"{case[1].KIND} {len(case[2])}D")
def test_peft_acts_with_our_update(case):
    config, kind, shape = case
    torch.manual_seed(3)
    model = peft.get_peft_model(Model(shape), config).eval().double()
    weight = model.base_model.model.x.get_base_layer().weight.detach().clone()
    if getattr(config, "use_dora", False):
        vector = model.base_model.model.x.lora_magnitude_vector["default"].weight
        vector.data *= 1 + 0.2 * randn(*vector.shape)
    parts = {}
    for key, tensor in peft.get_peft_model_state_dict(model).items():
        name = key.removeprefix("base_model.model.x.")
        parts[PEFT_FIELDS.get(name, name)] = tensor.detach()
    alpha = config.lora_alpha if kind is LoraLayer else config.alpha
    alpha = alpha * config.r**0.5 if getattr(config, "use_rslora", False) else alpha
    ours = kind.read(Layer("unet.x", shape), parts, alpha)
    theirs = effective(model.forward, shape) - weight.reshape(shape[0], -1)
    agree(f"peft {ours.kind}", ours.delta_weight(weight), theirs)
