"""Every kind of adapter as our save writes it, loaded and applied by ComfyUI's own code, against our `delta_weight`.

`LORAX_FIGURES=file.json` writes the largest relative difference of each kind.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import LIBRARY, ROOT, comfyui
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT))

from lorax.adapters import (
    Adapter,
    BoftLayer,
    DiffLayer,
    FouraLayer,
    GloraLayer,
    LohaLayer,
    LokrLayer,
    LoraLayer,
    LoraXLayer,
    OftLayer,
    VectorLayer,
    expand,
    load_adapter,
    save_adapter,
)
from lorax.models.base import Base
from lorax.models.families import UNKNOWN
from lorax.models.layers import Layer, LayerTable

LINEAR, CONV, SQUARE = (
    Layer("unet.linear", (32, 16)),
    Layer("unet.conv", (32, 16, 3, 3)),
    Layer("unet.square", (16, 16)),
)
LIMIT, TINY = 1e-5, 1e-30


def random(*shape, seed=0):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape)))


BASE = {
    **{f"{layer.path}.weight": random(*layer.shape, seed=50) for layer in (LINEAR, CONV, SQUARE)},
    "linear.bias": random(32, seed=51),
    "norm.weight": 1 + random(32, seed=52),
    "norm.bias": random(32, seed=53),
}
LORA = LoraLayer(LINEAR, random(32, 4), random(4, 16, seed=1), 2.0)
LORA_CONV = LoraLayer(CONV, random(32, 4, 1, 1), random(4, 16, 3, 3, seed=1), 2.0)
HADA = [random(32, 4), random(4, 16, seed=1), random(32, 4, seed=2), random(4, 16, seed=3)]
HADA_CONV = [random(32, 4), random(4, 144, seed=1), random(32, 4, seed=2), random(4, 144, seed=3)]
HADA_CP = [random(4, 32), random(4, 16, seed=1), random(4, 32, seed=2), random(4, 16, seed=3)]
CORE = random(4, 4, 3, 3, seed=4)
W1, W1_A, W1_B = random(4, 2), random(4, 2, seed=1), random(2, 2, seed=2)
W2, W2_A, W2_B = random(8, 8, seed=3), random(8, 2, seed=4), random(2, 8, seed=5)
W2_CONV, W2_B_CONV = random(8, 8, 3, 3, seed=3), random(2, 72, seed=5)
GLORA = [random(16, 4), random(4, 16, seed=1), random(32, 4, seed=2), random(4, 16, seed=3)]
EARLY = [random(4, 16), random(16, 4, seed=1), random(4, 16, seed=2), random(32, 4, seed=3)]
GLORA_CONV = [
    random(16, 4, 1, 1), random(4, 16, 1, 1, seed=1), random(32, 4, 1, 1, seed=2), random(4, 16, 3, 3, seed=3),
]  # fmt: skip
FOURA = FouraLayer(LINEAR, random(32, 4), random(4, 16, seed=1), 1 + random(4, seed=2), 2.0)
INPUTS, INPUTS_CONV = 1 + random(1, 16), 1 + random(1, 16, 1, 1)
OUTPUTS, OUTPUTS_CONV = 1 + random(32, 1), 1 + random(32, 1, 1, 1)


SOURCE = Base("made", UNKNOWN, LayerTable([LINEAR]), lambda layer: BASE[f"{layer.path}.weight"], LayerTable([]))
LORA_X = LoraXLayer(LINEAR, random(16), SOURCE.fingerprint(LINEAR.name))


def as_lora(own):
    B, A = expand(own, SOURCE)
    return LoraLayer(own.layer, B, A)


CASES = {
    "lora linear": LORA,
    "lora linear without alpha": replace(LORA, alpha=None),
    "lora linear alpha 0": replace(LORA, alpha=0.0),
    "lora conv": LORA_CONV,
    "lora conv mid": LoraLayer(CONV, random(32, 4, 1, 1), random(4, 16, 1, 1, seed=1), 2.0, CORE),
    "lora float8": LORA.moved(LINEAR, torch.float8_e4m3fn),
    "lora bfloat16": LORA.moved(LINEAR, torch.bfloat16),
    "dora linear by input": replace(LORA, dora_scale=INPUTS),
    "dora conv by input": replace(LORA_CONV, dora_scale=INPUTS_CONV),
    "loha linear": LohaLayer(LINEAR, *HADA, 2.0),
    "loha conv": LohaLayer(CONV, *HADA_CONV, 2.0),
    "loha conv tucker": LohaLayer(CONV, *HADA_CP, 2.0, CORE, CORE.flip(0)),
    "dora-loha linear by input": LohaLayer(LINEAR, *HADA, 2.0, dora_scale=INPUTS),
    "lokr linear whole": LokrLayer(LINEAR, 1.0, lokr_w1=W1, lokr_w2=W2[:, :8]),
    "lokr linear w2": LokrLayer(LINEAR, 3.0, lokr_w1=W1, lokr_w2_a=W2_A, lokr_w2_b=W2_B),
    "lokr linear w1": LokrLayer(LINEAR, 3.0, lokr_w1_a=W1_A, lokr_w1_b=W1_B, lokr_w2=W2),
    "lokr linear both": LokrLayer(LINEAR, 3.0, lokr_w1_a=W1_A, lokr_w1_b=W1_B, lokr_w2_a=W2_A, lokr_w2_b=W2_B),
    "lokr conv whole": LokrLayer(CONV, 1.0, lokr_w1=W1, lokr_w2=W2_CONV),
    "lokr conv w2": LokrLayer(CONV, 3.0, lokr_w1=W1, lokr_w2_a=W2_A, lokr_w2_b=W2_B_CONV),
    "dora-lokr linear by input": LokrLayer(LINEAR, 3.0, lokr_w1=W1, lokr_w2=W2, dora_scale=INPUTS),
    "glora linear": GloraLayer(LINEAR, *GLORA, 2.0),
    "glora linear early": GloraLayer(LINEAR, *EARLY, 2.0),
    "glora square": GloraLayer(SQUARE, *[part[:16] for part in GLORA], 2.0),
    "glora conv": GloraLayer(CONV, *GLORA_CONV, 2.0),
    "oft linear": OftLayer(LINEAR, random(8, 4, 4), 0.0),
    "oft linear without alpha": OftLayer(LINEAR, random(8, 4, 4)),
    "oft conv": OftLayer(CONV, random(8, 4, 4), 0.0),
    "boft linear": BoftLayer(LINEAR, random(3, 8, 4, 4), 0.0),
    "boft linear without alpha": BoftLayer(LINEAR, random(3, 8, 4, 4)),
    "boft linear rescaled": BoftLayer(LINEAR, random(3, 8, 4, 4), 0.0, 1 + random(32, 1)),
    "boft conv rescaled": BoftLayer(CONV, random(2, 8, 4, 4), 0.0, 1 + random(32, 1, 1, 1)),
    "diff linear": DiffLayer(LINEAR, random(32, 16)),
    "diff conv": DiffLayer(CONV, random(32, 16, 3, 3)),
    "vector diff_b": VectorLayer(Layer("unet.linear.bias", (32,)), random(32), "diff_b"),
    "vector w_norm": VectorLayer(Layer("unet.norm.weight", (32,)), random(32), "w_norm"),
    "vector diff": VectorLayer(Layer("unet.norm.weight", (32,)), random(32), "diff"),
    "vector b_norm": VectorLayer(Layer("unet.norm.bias", (32,)), random(32), "b_norm"),
    "foura linear": as_lora(FOURA),
    "lora-x linear": as_lora(LORA_X),
}
# Where ComfyUI departs from the program that trained the file, whose reading is ours.
DEPARTS = {
    "dora linear by output": replace(LORA, dora_scale=OUTPUTS),
    "dora conv by output": replace(LORA_CONV, dora_scale=OUTPUTS_CONV),
    "dora-loha linear by output": LohaLayer(LINEAR, *HADA, 2.0, dora_scale=OUTPUTS),
    "dora-lokr linear by output": LokrLayer(LINEAR, 3.0, lokr_w1=W1, lokr_w2=W2, dora_scale=OUTPUTS),
    "lokr conv tucker": LokrLayer(
        CONV, 3.0, lokr_w1=W1, lokr_w2_a=random(4, 8), lokr_w2_b=random(4, 8, seed=1), lokr_t2=CORE
    ),
    "oft linear rescaled": OftLayer(LINEAR, random(8, 4, 4), 0.0, 1 + random(32, 1)),
    "oft linear constrained": OftLayer(LINEAR, random(8, 4, 4), 0.5),
    "boft linear constrained": BoftLayer(LINEAR, random(3, 8, 4, 4), 0.5),
}
FIGURES: dict[str, float] = {}


def hosts():
    found = {"notcomfy 0.1.0": (LIBRARY, Path(sys.executable))} if LIBRARY.is_dir() else {}
    if real := comfyui():
        show = "from comfyui_version import __version__ as v; print(v)"
        version = subprocess.check_output([real[1], "-c", show], cwd=real[0], text=True).strip()
        found[f"comfyui {version}"] = real
    return found


@pytest.fixture(scope="module", params=hosts().items() or [None], ids=lambda host: host[0] if host else "none")
def host(request, tmp_path_factory):
    """Save every case, let the host apply them all, and return its name, our updates' files and its updates."""
    if request.param is None:
        pytest.skip("no ComfyUI at all (make install, or set COMFYUI_PATH and COMFYUI_PYTHON)")
    name, (path, python) = request.param
    folder = tmp_path_factory.mktemp("kinds")
    save_file(BASE, folder / "base.safetensors")
    for case, own in (CASES | DEPARTS).items():
        save_adapter(Adapter("a", None, "kohya", {own.layer.name: own}), folder / f"{case}.adapter.safetensors")
    script = [python, Path(__file__).with_name("apply_kinds.py"), folder]
    done = subprocess.run(script, cwd=path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    applied = load_file(folder / "applied.safetensors")
    yield name, folder, {case: applied.get(f"{case}:{parameter(own)}") for case, own in (CASES | DEPARTS).items()}
    if figures := os.environ.get("LORAX_FIGURES"):
        kept = json.loads(Path(figures).read_text()) if Path(figures).exists() else {}
        Path(figures).write_text(json.dumps(dict(sorted((kept | FIGURES).items())), indent=1) + "\n")


def parameter(own):
    return own.layer.path if isinstance(own, VectorLayer) else f"{own.layer.path}.weight"


def compare(own, theirs):
    """Return the difference of the two updates relative to the host's, whose new weight is rounded to float32."""
    weight = BASE[parameter(own)]
    ours = own.delta_weight(weight).reshape(weight.shape)
    change = theirs.double() - weight.double()
    return float((ours.double() - change).norm() / max(float(change.norm()), TINY))


def knows(host, own):
    """The library of 2024 knows neither rotations nor float8 that is saved like this."""
    return not host.startswith("notcomfy") or not isinstance(own, OftLayer)


@pytest.mark.parametrize("case", CASES)
def test_the_host_applies_our_update(host, case):
    name, _, applied = host
    own = CASES[case]
    if not knows(name, own):
        pytest.skip(f"{name} knows no {own.kind}")
    assert applied[case] is not None, "the host did not load the file"
    difference = compare(own, applied[case])
    kind = f"{name} {case.split()[0]}"
    FIGURES[kind] = max(FIGURES.get(kind, 0.0), difference)
    assert difference < LIMIT
    if case != "lora linear alpha 0":
        assert not torch.equal(applied[case], BASE[parameter(own)])


def test_what_was_saved_is_read_again(host):
    _, folder, _ = host
    for case, own in (CASES | DEPARTS).items():
        (again,) = load_adapter(folder / f"{case}.adapter.safetensors").layers.values()
        assert again.kind == own.kind, case
        for name, part in own.parts().items():
            assert torch.equal(again.parts()[name].double(), part.double().reshape(again.parts()[name].shape)), case


def host_reading(own):
    """What ComfyUI makes of the cases where it departs, in float64."""
    weight = BASE[parameter(own)].double()
    if isinstance(own, OftLayer):
        ratio = 1 / weight.shape[0] if own.alpha else 1.0  # the constraint taken for the whole
        read = replace(own, alpha=own.alpha * ratio, rescale=own.rescale if isinstance(own, BoftLayer) else None)
        return read.delta_weight(weight).reshape(weight.shape)
    if isinstance(own, LokrLayer) and own.lokr_t2 is not None:
        return torch.zeros_like(weight)  # it fails, logs an error and goes on
    update = replace(own, dora_scale=None).delta_weight(weight).reshape(weight.shape)
    norms = weight.flatten(1).norm(dim=1).reshape(own.dora_scale.shape)  # of the unchanged weight
    return (weight + update) * own.dora_scale.double() / norms - weight


@pytest.mark.parametrize("case", DEPARTS)
def test_where_the_host_departs_from_the_trainer_it_does_so_as_we_say(host, case):
    name, _, applied = host
    own = DEPARTS[case]
    if name.startswith("notcomfy"):
        pytest.skip("that version is too old")
    weight = BASE[parameter(own)].double()
    change = applied[case].double() - weight
    assert float((host_reading(own) - change).norm() / weight.norm()) < LIMIT
    ours = own.delta_weight(weight).reshape(weight.shape)
    departure = float((ours - change).norm() / ours.norm())
    FIGURES[f"{name} departs, {case}"] = departure
    assert departure > 100 * LIMIT
