"""`nodes/host/` and our adapters against ComfyUI's own library: the real ModelPatcher, LoRA loader and samplers.

The library is ComfyUI of November 2024 from the package registry. It has no server and no node API, so the pack's node
classes are not imported here.
"""

import re
import sys
import types
from dataclasses import replace

import pytest
import torch
from conftest import LIBRARY, ROOT
from load_pack import load_pack
from safetensors.torch import load_file, save_file

if not LIBRARY.is_dir():
    pytest.skip("ComfyUI's library is not installed (make install)", allow_module_level=True)

sys.path[:0] = [str(LIBRARY), str(ROOT)]

import comfy.cli_args

# On a GPU in single precision too, as on the CPU: what is compared is what was computed, not how it is rounded.
comfy.cli_args.args.cpu, comfy.cli_args.args.force_fp32 = not torch.cuda.is_available(), True

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.sd
import comfy.utils

from demo.synthetic import base_tensors
from lorax.models.families import families


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def pack():
    """The pack under another name, as the host loads it, without the node classes."""
    host, lorax = load_pack(ROOT)
    return types.SimpleNamespace(host=host, lorax=lorax)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small U-Net that the host detects as SD 1.5 (37 million parameters)."""
    family = families()["sd1"]
    small = {"channel_mult": (1, 1), "num_res_blocks": 1, "transformer_depth": (1, 1)}
    family = replace(family, unet=replace(family.unet, **small), text_encoders=())
    path = tmp_path_factory.mktemp("models") / "sd15.safetensors"
    save_file(base_tensors(family, 1), path)
    return path


@pytest.fixture
def model(checkpoint):
    loaded, *_ = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False, output_clip=False)
    return loaded


@pytest.fixture
def lora(pack, model, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(lora_tensors(pack.host.open_model(model)), path)
    return path


def lora_tensors(base, rank=4, alpha=2.0):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in base.layers.values():
        if layer.is_attention or layer.kind in ("conv1", "proj_in", "ff.net.proj"):
            module = "lora_unet_" + layer.path.replace(".", "_")
            tail = (1,) * len(layer.shape[2:])
            up = torch.randn(layer.shape[0], rank, *tail, generator=generator)
            tensors[f"{module}.lora_up.weight"] = 0.1 * up
            tensors[f"{module}.lora_down.weight"] = torch.randn(rank, *layer.shape[1:], generator=generator) * 0.05
            tensors[f"{module}.alpha"] = torch.tensor(alpha)
    return tensors


def sample(model):
    generator = torch.Generator().manual_seed(3)
    positive = [[torch.randn(1, 77, 768, generator=generator), {"pooled_output": torch.zeros(1, 1280)}]]
    negative = [[torch.zeros(1, 77, 768), {"pooled_output": torch.zeros(1, 1280)}]]
    latent = torch.zeros(1, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 1)
    options = {"denoise": 1.0, "seed": 1, "disable_pbar": True}
    return comfy.sample.sample(model, noise, 2, 2.0, "euler", "normal", positive, negative, latent, **options)


def state(model):
    return {key: value.to("cpu", copy=True) for key, value in model.model.state_dict().items()}


def stock(model, path, strength):
    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(path)), strength, 0)[0]


def test_a_model_is_the_base_that_its_file_is(pack, model, checkpoint):
    ours, file = pack.host.open_model(model), pack.lorax.open_base(checkpoint)
    assert dict(ours.layers) == dict(file.layers)
    assert ours.family == file.family
    for name in list(file.layers)[::7]:
        assert torch.equal(ours.weight(name), file.weight(name))
        assert ours.fingerprint(name) == file.fingerprint(name)


@pytest.mark.parametrize("loaded", [False, True], ids=["on the shelf", "loaded with patches in place"])
def test_effective_weights_have_the_patches_on_them(pack, model, lora, loaded):
    patched = stock(model, lora, 0.7)
    adapter = pack.lorax.load_adapter(lora, pack.host.open_model(model))
    before = {name: pack.host.open_model(model).weight(name) for name in adapter.layers}
    if loaded:
        sample(patched)
    for name, own in adapter.layers.items():
        expected = before[name] + 0.7 * own.delta_weight()
        torch.testing.assert_close(pack.host.open_model(patched).weight(name), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(pack.host.open_model(model).weight(name), before[name])


def test_reading_weights_loads_nothing_and_changes_nothing(pack, model, lora):
    patched = stock(model, lora, 1.0)
    before = state(patched)
    base = pack.host.open_model(patched)
    for name in base.layers:
        base.weight(name)
    after = state(patched)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not patched.backup


def test_apply_changes_the_picture_and_strength_0_does_not(pack, model, lora):
    adapter = pack.lorax.load_adapter(lora, pack.host.open_model(model))
    plain = sample(model)
    patched, _, missing = pack.host.apply_adapter(model, None, adapter, 1.0)
    assert not missing
    assert not torch.allclose(sample(patched), plain, atol=1e-3)
    off, _, _ = pack.host.apply_adapter(model, None, adapter, 0.0)
    assert torch.equal(sample(off), plain)


def test_apply_equals_the_stock_loader_and_strengths_add_up(pack, model, lora):
    adapter = pack.lorax.load_adapter(lora, pack.host.open_model(model))
    half, _, _ = pack.host.apply_adapter(model, None, adapter, 0.5)
    assert torch.equal(sample(half), sample(stock(model, lora, 0.5)))
    both, at_once = (pack.host.open_model(patched) for patched in (stock(half, lora, 0.25), stock(model, lora, 0.75)))
    for name in adapter.layers:
        torch.testing.assert_close(both.weight(name), at_once.weight(name), rtol=1e-6, atol=1e-7)


def test_unpatching_restores_the_model_bit_by_bit(pack, model, lora):
    before = state(model)
    adapter = pack.lorax.load_adapter(lora, pack.host.open_model(model))
    patched, _, _ = pack.host.apply_adapter(model, None, adapter, 1.0)
    # As the host does it; on a GPU the model lies there already, without patches.
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    changed = state(patched)
    assert not all(torch.equal(changed[key], before[key]) for key in before)
    comfy.model_management.unload_all_models()
    after = state(model)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("module", "m", "n", "words"),
    [
        ("input_blocks_4_1_transformer_blocks_0_attn2_to_k", 640, 2048, "different families"),
        ("down_blocks_3_attentions_0_transformer_blocks_0_attn1_to_q", 320, 320, "fits the model"),
    ],
    ids=["of another family", "fits nowhere"],
)
def test_an_adapter_that_does_not_fit_is_an_error_and_not_an_unpatched_model(
    pack, model, tmp_path, module, m, n, words
):
    module = f"lora_unet_{module}"
    tensors = {f"{module}.lora_up.weight": torch.ones(m, 2), f"{module}.lora_down.weight": torch.ones(2, n)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = pack.lorax.load_adapter(tmp_path / "a.safetensors")
    with pytest.raises(pack.lorax.MismatchError, match=words):
        pack.host.apply_adapter(model, None, adapter, 1.0)


def test_a_model_of_no_known_family_works_by_its_own_names(pack, tmp_path):
    """Two models that nobody has heard of; the adapter is spelled as the host's own list of keys spells them."""
    models = []
    for seed in (1, 2):
        module = torch.nn.Module()
        module.model_config = types.SimpleNamespace(unet_config={})
        torch.manual_seed(seed)
        speech = torch.nn.ModuleDict({"attn": torch.nn.Linear(8, 8), "mlp": torch.nn.Linear(8, 16)})
        module.diffusion_model = torch.nn.ModuleDict({"speech": torch.nn.ModuleList([speech])})
        models.append(comfy.model_patcher.ModelPatcher(module, torch.device("cpu"), torch.device("cpu")))
    source, target = map(pack.host.open_model, models)
    assert source.family.name == "unknown"
    tensors = {}
    for spelling, m in (("lora_unet_speech_0_attn", 8), ("diffusion_model.speech.0.mlp", 16)):
        tensors |= {f"{spelling}.lora_up.weight": torch.randn(m, 2), f"{spelling}.lora_down.weight": torch.randn(2, 8)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = pack.lorax.load_adapter(tmp_path / "a.safetensors", source)
    moved, report = pack.lorax.transfer_adapter(adapter, source, target, pack.lorax.TransferOptions(threshold=-9))
    assert report.arrived == len(report.rows) == 2
    patched, _, missing = pack.host.apply_adapter(models[1], None, moved, 1.0)
    assert not missing
    for name, own in moved.layers.items():
        change = pack.host.open_model(patched).weight(name) - target.weight(name)
        torch.testing.assert_close(change, own.delta_weight(), rtol=1e-4, atol=1e-5)


def test_float8_weights_are_read_layer_by_layer(pack, checkpoint):
    model = comfy.sd.load_diffusion_model(str(checkpoint), model_options={"dtype": torch.float8_e4m3fn})
    base, file = pack.host.open_model(model), pack.lorax.open_base(checkpoint)
    for name in list(file.layers)[3::11]:
        stored = file.weight(name).to(torch.float8_e4m3fn).float()
        assert torch.equal(base.weight(name), stored)


@pytest.mark.parametrize("packed", [torch.uint8, torch.int8])
def test_a_weight_that_is_no_numbers_is_named_with_what_to_do(pack, model, lora, packed):
    """As bitsandbytes keeps 4 bits, two in a byte, all in one column; and 8 bits."""
    adapter = pack.lorax.load_adapter(lora)
    layer = next(layer for layer in pack.host.open_model(model).layers.values() if layer.path.endswith("to_q"))
    module = model.model.diffusion_model.get_submodule(layer.original)
    shape = (layer.shape[0] * layer.shape[1] // 2, 1) if packed == torch.uint8 else layer.shape
    module.weight = torch.nn.Parameter(torch.zeros(shape, dtype=packed), requires_grad=False)
    words = f"{layer.original}.weight is {str(packed)[6:]} [{shape[0]}, {shape[1]}]; give the model in fp32, fp16"
    for work in (pack.host.open_model, lambda model: pack.host.apply_adapter(model, None, adapter, 1.0)):
        with pytest.raises(pack.lorax.FormatError, match=re.escape(words)):
            work(model)


def test_a_model_that_keeps_its_weights_under_other_names_is_named_with_what_to_do(pack, model):
    """As nunchaku's layers do."""
    layer = next(layer for layer in pack.host.open_model(model).layers.values() if layer.path.endswith("to_q"))
    module = model.model.diffusion_model.get_submodule(layer.original)
    del module.weight
    module.qweight = torch.nn.Parameter(torch.zeros(320, 160, dtype=torch.int8), requires_grad=False)
    module.wscales = torch.nn.Parameter(torch.ones(5, 320), requires_grad=False)
    with pytest.raises(pack.lorax.FormatError, match=rf"quantised.*{layer.original}\.(wscales|qweight), .*fp16"):
        pack.host.open_model(model)


KINDS = ["kohya", "diffusers by kohya", "transferred", "lora-x"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_update_is_the_one_that_the_host_computes(pack, model, lora, checkpoint, tmp_path, kind):
    """Oracle: the host's own `load_lora` and weight calculation, on weights of zero."""
    lorax, base = pack.lorax, pack.lorax.open_base(checkpoint)
    adapter = lorax.load_adapter(lora, base)
    if kind == "diffusers by kohya":
        lorax.save_adapter(adapter, tmp_path / "d.safetensors", naming="diffusers")
        adapter = lorax.load_adapter(tmp_path / "d.safetensors", base)
    elif kind == "transferred":
        adapter, _ = lorax.transfer_adapter(adapter, base, base, pack.lorax.TransferOptions(method="project", rank=100))
    elif kind == "lora-x":
        adapter = lorax.convert_to_lora(lorax.convert_to_lora_x(adapter, base, rank=32)[0], base)
    lorax.save_adapter(adapter, tmp_path / "out.safetensors", naming="kohya")
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(load_file(tmp_path / "out.safetensors"), keys)
    assert len(patches) == len(adapter.layers) > 60
    for name, own in adapter.layers.items():
        key = pack.host.model_key(base, base.layers[name])
        zero = torch.zeros(base.layers[name].shape)
        theirs = comfy.lora.calculate_weight([(1.0, patches[key], 1.0, None, None)], zero, key)
        expected = own.delta_weight().reshape(zero.shape)
        torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-5)


def test_out_of_gpu_memory_goes_on_with_the_cpu(pack, monkeypatch):
    """Without a GPU: the device is a name and the host's own error is raised on it."""
    management, devices = pack.host.run.management, []
    monkeypatch.setattr(management, "get_torch_device", lambda: torch.device("cuda:0"))
    monkeypatch.setattr(management, "free_memory", lambda size, device: None)  # asks the driver

    def work(engine, progress):
        devices.append(engine.device)
        progress(1, 2, "a layer")
        if engine.device != "cpu":
            raise management.OOM_EXCEPTION("no room")
        return "done"

    assert pack.host.compute(work, 2) == "done"
    assert devices == ["cuda:0", "cpu"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("is_full", [False, True])
def test_a_transfer_on_a_gpu_is_that_on_the_cpu(pack, model, lora, is_full):
    base, used = pack.host.open_model(model), []
    adapter = pack.lorax.load_adapter(lora, base)

    def work(engine, progress):
        used.append(engine.device)
        options = pack.lorax.TransferOptions(method="project", rank=64)
        return pack.lorax.transfer_adapter(adapter, base, base, options, engine=engine, progress=progress)[0]

    expected = work(pack.lorax.Engine(), lambda *_: None)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0 if is_full else 1.0)
    try:
        found = pack.host.compute(work, 2, cache=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert used == ["cpu", "cuda:0", "cpu"][: 3 if is_full else 2]
    for name, own in found.layers.items():
        torch.testing.assert_close(own.delta_weight(), expected.layers[name].delta_weight(), rtol=1e-3, atol=1e-5)


@pytest.fixture
def alone(monkeypatch):
    """DirectML, as the host calls what torch does not know, on a device without float64."""
    single = pytest.importorskip("single")
    if not single.is_possible:
        pytest.skip("this torch knows no devices made in Python")
    single.register()
    monkeypatch.setattr(comfy.model_management, "directml_enabled", True)
    monkeypatch.setattr(comfy.model_management, "directml_device", torch.device(single.NAME), raising=False)
    yield single
    single.failures.clear()


@pytest.mark.parametrize("method", ["auto", "project"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_work_of_the_nodes_on_a_device_without_float64(pack, model, lora, alone, fails, method, caplog):
    base, used = pack.host.open_model(model), []
    adapter = pack.lorax.load_adapter(lora, base)
    adapter = replace(adapter, layers=dict(list(adapter.layers.items())[::9]))

    def work(engine, progress):
        used.append(engine.device)
        moved, _ = pack.lorax.transfer_adapter(
            adapter, base, base, pack.lorax.TransferOptions(method=method, rank=64), engine=engine, progress=progress
        )
        if fails and engine.device != "cpu":
            alone.failures.append(RuntimeError("the driver is gone\nfor good"))
            torch.zeros(1, device=engine.device).add(1)
        return moved

    expected = work(pack.lorax.Engine(), lambda *_: None)
    found = pack.host.compute(work, 2, cache=False)
    assert used == ["cpu", alone.NAME, "cpu"][: 3 if fails else 2]
    assert [line for line in caplog.messages if "single" in line] == [
        "single failed, the CPU does the work instead: RuntimeError: the driver is gone"
    ] * fails
    for name, own in found.layers.items():
        torch.testing.assert_close(own.delta_weight(), expected.layers[name].delta_weight(), rtol=1e-4, atol=1e-5)


def test_cancel_on_a_device_is_not_taken_for_its_failure(pack, alone):
    management = pack.host.run.management
    used: list[str] = []

    def work(engine, progress):
        used.append(engine.device)
        management.interrupt_current_processing()
        progress(1, 2, "a layer")

    with pytest.raises(management.InterruptProcessingException):
        pack.host.compute(work, 2)
    assert used == [alone.NAME]


def test_the_nodes_use_the_cache_of_the_user_unless_told_not_to(pack, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path))
    assert pack.host.compute(lambda engine, progress: engine.cache.folder, 1) == tmp_path
    assert pack.host.compute(lambda engine, progress: engine.cache, 1, cache=False) is None


def test_cancel_stops_the_work(pack):
    management = pack.host.run.management
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        pack.host.compute(lambda engine, progress: progress(1, 2, "a layer"), 2)


WINDOWS = ["con", "a/NUL.txt/b", "com1", "a:b", "a/b?", "x ", "x./y", 'say "x"', "a|b", "<a>"]


@pytest.mark.parametrize("prefix", WINDOWS)
def test_names_that_windows_refuses_are_refused_there(pack, monkeypatch, prefix):
    pack.host.check_prefix(prefix)
    monkeypatch.setattr(pack.host.files.output, "WINDOWS", True)
    with pytest.raises(pack.lorax.LoraxError, match="refuses"):
        pack.host.check_prefix(prefix)
    pack.host.check_prefix("lorax\\console.v1")
    pack.host.check_prefix("a/b/../c")
