"""The only file that knows ComfyUI: its models, devices, folders, progress and cancel button."""

import functools
import os
import posixpath
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import comfy.lora
import comfy.model_management as management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from ..lorax.adapters import Adapter, AdapterLayer, FouraLayer, LoraLayer, LoraXLayer, VectorLayer
from ..lorax.compute.cache import open_cache
from ..lorax.compute.engine import Engine, or_on_cpu
from ..lorax.errors import FormatError, MismatchError, OptionError, OutputError, printable
from ..lorax.files import output
from ..lorax.files.longpath import on_disk
from ..lorax.models.base import Base, loaded_base
from ..lorax.models.layers import Layer
from ..lorax.progress import Progress

UNET = "diffusion_model."
# Where the host keeps the text encoders that we know, by kind.
TEXT_ENCODERS = {kind: f"{kind}.transformer." for kind in ("clip_l", "clip_h", "clip_g", "t5xxl")}
# Room to make on the GPU for one layer: the largest weight of SDXL, 10240 x 1280, in float64, six times.
WORKSPACE_BYTES = 640 * 2**20

# The prefixes that the host's key lists put before a module path.
SPELLED = re.compile(
    r"^(lora_unet_|lora_transformer_|lycoris_|diffusion_model\.|transformer\.|unet\.|base_model\.model\.)"
)

# What makes a conditioning more than a caption of a whole picture.
REGIONAL = {"control", "gligen", "hooks", "area", "mask", "start_percent", "end_percent"}
# Asks the host for all of the device.
ALL_MEMORY = 1e20

# Of the name of a saved file: with a number and an ending its parts stay within the 255 bytes of file systems.
NAME_BYTES = 200
PREFIX_CHARACTERS = 1000

# A parameter of the host's model; with (dimension, start, length) for a part of it.
Key = str | tuple[str, tuple[int, int, int]]
REPORT = "report this with the ComfyUI version"
Result = TypeVar("Result")
Learning = TypeVar("Learning", bound=nn.Module)


def __getattr__(name: str) -> Any:
    """Give the node API (`io`, `ui`, `ComfyExtension`) on demand: hosts of before 2025 have none."""
    if name in ("io", "ui", "ComfyExtension"):
        from comfy_api import latest

        return getattr(latest, name)
    raise AttributeError(name)


def weight_of(patcher: Any, key: str) -> Tensor:
    """Return the weight that the sampler would use: dequantised, with its patches, a float32 copy on the CPU.

    Args:
        patcher: A MODEL, or the patcher of a CLIP.
        key: Name of a parameter of `patcher.model`.
    """
    weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    # While a model is loaded with patches, its own weights wait in a backup.
    if (backup := patcher.backup.get(key)) is not None:
        weight = backup.weight
    if (backup := getattr(patcher, "hook_backup", {}).get(key)) is not None:
        weight = backup[0]
    if hasattr(weight, "layout_cls") or type(weight).__name__ == "QuantizedTensor":
        weight = weight.detach().to("cpu").dequantize().to(torch.float32)
    else:
        weight = management.cast_to_device(weight.detach(), torch.device("cpu"), torch.float32, copy=True)
        if convert is not None:
            weight = convert(weight, inplace=True)
    patches = patcher.patches.get(key)
    return comfy.lora.calculate_weight(patches, weight, key, intermediate_dtype=torch.float32) if patches else weight


def open_model(model: Any, clip: Any = None) -> Base:
    """Return a MODEL, and a CLIP if there is one, as a base whose weights are read one at a time.

    The layers of a MODEL of no known family have the names that the host's own LoRA loader gives them.
    """
    name = type(getattr(model.model, "model_config", model.model)).__name__
    parameters = _parameters(model, UNET)
    encoders = {kind: _text_modules(clip, prefix) for kind, prefix in TEXT_ENCODERS.items()} if clip is not None else {}
    base = loaded_base(name, parameters, encoders, lambda layer: read(layer), lambda: _spellings(model))
    kinds = {encoder.component: TEXT_ENCODERS[encoder.kind] for encoder in base.family.text_encoders}

    def read(layer: Layer) -> Tensor:
        if not layer.is_main:
            return weight_of(clip.patcher, f"{kinds[layer.component]}{layer.path}.weight")
        weight = weight_of(model, f"{UNET}{layer.original}.weight")
        return weight if layer.rows is None else weight[slice(*layer.rows)]

    return base


def model_key(base: Base, layer: Layer) -> Key:
    """Return the name of a layer's weight in the host's MODEL or CLIP; with (dimension, start, length) for a part."""
    if not layer.is_main:
        kind = next(encoder.kind for encoder in base.family.text_encoders if encoder.component == layer.component)
        return f"{TEXT_ENCODERS[kind]}{layer.path}.weight"
    key = f"{UNET}{layer.original}.weight"
    return key if layer.rows is None else (key, (0, layer.rows[0], layer.rows[1] - layer.rows[0]))


def _spellings(model: Any) -> dict[str, tuple[str, tuple[int, int] | None]]:
    """Return what the host's own LoRA loader calls the modules of a model, for families that we do not know."""
    found: dict[str, tuple[str, tuple[int, int] | None]] = {}
    for name, target in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        key, part = (target, None) if isinstance(target, str) else target[:2]
        if key.startswith(UNET) and key.endswith(".weight") and (part is None or part[0] == 0):
            rows = None if part is None else (part[1], part[1] + part[2])
            found[SPELLED.sub("", name)] = (key.removeprefix(UNET).removesuffix(".weight"), rows)
    return found


def _parameters(patcher: Any, prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        name.removeprefix(prefix): tuple(value.shape)
        for name, value in patcher.model.named_parameters()
        if name.startswith(prefix)
    }


def _text_modules(clip: Any, prefix: str) -> dict[str, tuple[int, ...]]:
    inner = ("text_model.encoder.layers.", "encoder.block.")
    return {
        name.removesuffix(".weight"): shape
        for name, shape in _parameters(clip.patcher, prefix).items()
        if name.startswith(inner) and name.endswith(".weight")
    }


def apply_adapter(model: Any, clip: Any, adapter: Adapter, strength: float) -> tuple[Any, Any, list[str]]:
    """Return copies of MODEL and CLIP with the adapter as patches of the host's own kind.

    Strengths add up with other LoRA nodes, saving bakes the patches, unloading takes them off.

    Args:
        model: MODEL.
        clip: CLIP or None.
        adapter: Layers of any kind but LoRA-X, which must be expanded before.
        strength: Factor of the update.

    Returns:
        Patched MODEL, patched CLIP (or None), and the names of the layers that found no place.

    Raises:
        MismatchError: Not one layer found its place.
    """
    base = open_model(model, clip)
    tensors: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
    keys: dict[bool, dict[str, Key]] = {True: {}, False: {}}
    missing: list[str] = []
    for name, own in adapter.resolved(base).layers.items():
        key = _patched_key(base, own)
        if key is None:
            missing.append(name)
            continue
        keys[own.layer.is_main][name] = key
        parts = _known(own).tensors()
        tensors[own.layer.is_main] |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    patched = model.clone()
    done = _patch(patched, tensors[True], keys[True], strength)
    patched_clip = clip.clone() if clip is not None else None
    if patched_clip is not None:
        done += _patch(patched_clip, tensors[False], keys[False], strength)
    if not done:
        first = next(iter(adapter.layers), "nothing")
        got = f"{adapter.name} with layers such as {first} on {base.name} ({base.family.label})"
        raise MismatchError("no layer of the adapter fits the model", got, "transfer it to this model first")
    return patched, patched_clip, missing


def _patched_key(base: Base, own: AdapterLayer) -> Key | None:
    """Return the weight that a layer updates, or the weight beside the norm or bias; None if it has no place."""
    name, shape = own.layer.name, own.layer.shape
    if isinstance(own, LoraXLayer):
        return None
    if isinstance(own, VectorLayer):
        vector = base.vectors.get(name)
        return f"{UNET}{vector.original.rpartition('.')[0]}.weight" if vector and vector.shape == shape else None
    layer = base.layers.get(name)
    if layer is not None:
        return model_key(base, layer) if layer.matrix_shape == own.layer.matrix_shape else None
    parts = base.layers.find(own.layer.component, own.layer.original) if own.layer.original else []
    return f"{UNET}{own.layer.original}.weight" if sum(part.shape[0] for part in parts) == shape[0] else None


def _known(own: AdapterLayer) -> AdapterLayer:
    """Return an update as one of a kind that the host knows: FouRA as the LoRA that it is."""
    return LoraLayer(own.layer, *own.factors()) if isinstance(own, FouraLayer) else own


def _patch(target: Any, tensors: Mapping[str, Tensor], keys: Mapping[str, Key], strength: float) -> int:
    if not keys:
        return 0
    patches = comfy.lora.load_lora(dict(tensors), dict(keys))
    applied = set(target.add_patches(patches, strength))
    if lost := set(patches) - applied:
        raise MismatchError("the host did not take a patch", str(sorted(map(str, lost))[0]), REPORT)
    if len(patches) < len(keys):
        raise MismatchError("the host did not read an update", f"{len(keys) - len(patches)} of {len(keys)}", REPORT)
    return len(applied)


def compute(work: Callable[[Engine, Progress], Result], steps: int, *, cache: bool = True) -> Result:
    """Run `work(engine, progress)` on the host's device, with its progress bar and its cancel button.

    Where the device fails, out of memory or otherwise, the work is done again on the CPU; a line in the log says so.

    Args:
        work: Computes something; calls `progress` often.
        steps: How many steps there will be, about.
        cache: Take subspaces and scores from the user's cache, and keep new ones there.
    """
    bar = comfy.utils.ProgressBar(steps)

    def progress(done: int, total: int, what: str) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    device = management.get_torch_device()

    def begun(engine: Engine) -> Result:
        if engine.device != "cpu":
            management.free_memory(WORKSPACE_BYTES, device)
        return work(engine, progress)

    try:
        return or_on_cpu(begun, Engine(str(device), cache=open_cache() if cache else None))
    finally:
        with suppress(RuntimeError):  # a device that failed may not even let go of its memory
            management.soft_empty_cache()


@contextmanager
def training(
    model: Any,
    pictures: Sequence[tuple[Tensor, Any]],
    attach: Callable[[nn.Module], Learning],
    *,
    dtype: torch.dtype,
    gradient_checkpointing: bool,
) -> Generator[tuple[Learning, Callable[[Sequence[int]], Tensor]]]:
    """Load a MODEL whole, attach to it what shall learn, and let it take part in backward passes.

    Args:
        model: MODEL; the copy that is trained has its patches.
        pictures: A latent `[1, ...]` as the VAE gives it, and an entry of a CONDITIONING, each.
        attach: Called with the module that denoises; what it returns is detached at the end, as a context.
        dtype: To compute in.
        gradient_checkpointing: Whether to compute each block again in the backward pass instead of keeping its inside.

    Yields:
        What `attach` returned, and a function that returns the loss of some of the pictures, by number, all of one
        size: the mean square error of what this model predicts (noise, velocity or flow), at random times of its own
        noise schedule.

    Raises:
        OptionError: A conditioning has areas, masks, times, or a ControlNet.
    """
    _teach_rotations()
    with torch.inference_mode(False), ExitStack() as stack:
        patcher = model.clone()
        patcher.set_model_compute_dtype(dtype)
        stack.callback(management.soft_empty_cache)
        management.load_models_gpu([patcher], memory_required=ALL_MEMORY, force_full_load=True)
        patcher.pre_run()
        stack.callback(patcher.cleanup)
        stack.enter_context(_differentiable(patcher.model))
        layers = stack.enter_context(attach(patcher.model.diffusion_model))
        saved = _copies([patcher.model, layers])
        if gradient_checkpointing:
            stack.enter_context(_checkpointed(patcher.model.diffusion_model, saved))
        data = [_picture(patcher, latent, entry) for latent, entry in pictures]

        def loss(chosen: Sequence[int]) -> Tensor:
            with saved():
                return _loss(patcher, [data[i] for i in chosen], dtype)

        yield layers, loss


def _picture(patcher: Any, latent: Tensor, entry: Any) -> tuple[Tensor, Any]:
    """Return a latent as the model sees it, `[1, ...]`, and its conditioning as the model reads it."""
    if strange := sorted(REGIONAL & entry[1].keys()):
        raise OptionError("a picture to train on has one plain caption", ", ".join(strange), "connect a plain prompt")
    latent = patcher.model.process_latent_in(latent.clone().to(patcher.load_device, torch.float32))
    conds = {"positive": comfy.sampler_helpers.convert_cond([_cloned(entry)])}
    noise = torch.zeros_like(latent)
    conds = comfy.samplers.process_conds(patcher.model, noise, conds, patcher.load_device, latent_image=latent, seed=0)
    return latent, conds["positive"][0]


def _cloned(value: Any) -> Any:
    """Return a copy of a conditioning whose tensors may take part in a backward pass."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(part) for key, part in value.items()}
    return type(value)(map(_cloned, value)) if type(value) in (list, tuple) else value


def _loss(patcher: Any, pictures: Sequence[tuple[Tensor, Any]], dtype: torch.dtype) -> Tensor:
    sampling = patcher.model.model_sampling
    latent = torch.cat([latent for latent, _ in pictures])
    times = torch.rand(len(pictures))
    sigma = torch.tensor([float(sampling.percent_to_sigma(float(time))) for time in times])
    sigma = sigma.clamp(float(sampling.sigma_min), float(sampling.sigma_max)).to(latent)
    noisy = sampling.noise_scaling(sigma, torch.randn(latent.shape).to(latent), latent, False)
    with _computing_in(dtype, latent.device.type):
        denoised = _denoised(patcher, noisy, sigma, [cond for _, cond in pictures])
    # What a prediction of 1 changes: the error of the denoised latent, divided by it, is that of the prediction.
    one = torch.ones_like(latent[:, :1])
    slope = sampling.calculate_denoised(sigma, one, one * 0) - sampling.calculate_denoised(sigma, one * 0, one * 0)
    return ((denoised - latent) / slope).square().mean()


def _denoised(patcher: Any, noisy: Tensor, sigma: Tensor, conds: Sequence[Any]) -> Tensor:
    """Return what the model makes of noisy latents, each with its own conditioning; what fits together at once."""
    parts = [comfy.samplers.get_area_and_mult(cond, noisy[i : i + 1], sigma[i : i + 1]) for i, cond in enumerate(conds)]
    found: dict[int, Tensor] = {}
    while waiting := [i for i in range(len(parts)) if i not in found]:
        some = [i for i in waiting if comfy.samplers.can_concat_cond(parts[waiting[0]], parts[i])]
        options = dict(patcher.model_options.get("transformer_options", {}))
        options |= {"cond_or_uncond": [0] * len(some), "uuids": [parts[i].uuid for i in some], "sigmas": sigma[some]}
        cond = comfy.samplers.cond_cat([parts[i].conditioning for i in some])
        out = patcher.model.apply_model(noisy[some], sigma[some], transformer_options=options, **cond)
        found |= {i: out[place] for place, i in enumerate(some)}
    return torch.stack([found[i] for i in range(len(parts))])


def _computing_in(dtype: torch.dtype, device: str) -> AbstractContextManager[Any]:
    """Return a context that casts to a dtype; where the device has none, what the host itself casts must do."""
    casts = dtype != torch.float32 and torch.amp.is_autocast_available(device)
    return torch.autocast(device, dtype) if casts else nullcontext()


@contextmanager
def _differentiable(model: nn.Module) -> Generator[None]:
    """Put views of the same memory in the place of weights that the host loaded in inference mode."""
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, held in table.items():
                    if held is not None and held.is_inference() and type(held.data) is Tensor:
                        kept.append((table, name, held))
                        view = torch.empty(0, dtype=held.dtype, device=held.device)
                        view.set_(held.untyped_storage(), held.storage_offset(), held.shape, held.stride())
                        table[name] = nn.Parameter(view, False) if table is module._parameters else view
        yield
    finally:
        for table, name, held in kept:
            table[name] = held


@functools.cache
def _teach_rotations() -> None:
    """Give the host's own kernels for rotary embeddings, which have none, their gradient: the rotation backwards."""
    kernels = getattr(torch.ops, "comfy_kitchen", None)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[-1])

    def back(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (turns,) = ctx.saved_tensors
        turns = turns.transpose(-1, -2)
        return *(kernels.apply_rope1(gradient.contiguous(), turns) for gradient in gradients), None

    for name in ("apply_rope", "apply_rope1"):
        if hasattr(kernels, name):
            torch.library.register_autograd(f"comfy_kitchen::{name}", back, setup_context=keep)


def _copies(frozen: Sequence[nn.Module]) -> Callable[[], saved_tensors_hooks]:
    """Return a context that keeps copies for the backward pass: models of the host add to their tensors in place.

    What `frozen` holds does not change and is kept as it is.
    """
    tensors = [tensor for module in frozen for tensor in (*module.parameters(), *module.buffers())]
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors if type(tensor.data) is Tensor}

    def pack(tensor: Tensor) -> Tensor:
        return tensor if tensor.untyped_storage().data_ptr() in known else tensor.clone()

    return lambda: saved_tensors_hooks(pack, lambda tensor: tensor)


@contextmanager
def _checkpointed(model: nn.Module, saved: Callable[[], saved_tensors_hooks]) -> Generator[None]:
    """Let each block of a model be computed again in the backward pass."""
    blocks = list(_blocks(model))
    kept = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = functools.partial(_recomputed, block.forward, saved)
        yield
    finally:
        for block, before in zip(blocks, kept, strict=True):
            del block.forward
            if before is not None:
                block.forward = before


def _recomputed(
    forward: Callable[..., Any], saved: Callable[[], saved_tensors_hooks], *args: Any, **kwargs: Any
) -> Any:
    """Call `forward` and keep only its inputs for the backward pass, as copies.

    What torch's newer checkpoints keep is not protected from changes in place, and its older ones take no keywords.
    """
    leaves, form = tree_flatten((args, kwargs))
    if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
        return forward(*args, **kwargs)  # nothing before it learns, and the older checkpoints would cut it off
    forms: list[Any] = []

    def run(*leaves: Any) -> tuple[Any, ...]:
        with saved():
            copies = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(copies, form)
            results, result_form = tree_flatten(forward(*args, **kwargs))
        forms.append(result_form)
        return tuple(results)

    results = checkpoint(run, *leaves, use_reentrant=True, preserve_rng_state=False)
    return tree_unflatten(list(results), forms[0])


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules below `module` that are not mere lists of modules."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            yield from _blocks(child)
        else:
            yield child


def counted(steps: int) -> Callable[[int], None]:
    """Return a function that shows how many steps are done in the host's bar, and ends where the user cancels."""
    bar = comfy.utils.ProgressBar(steps)

    def count(done: int) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, steps)

    return count


def adapter_files() -> list[str]:
    """Return the names of the files in the host's `loras` folders."""
    import folder_paths

    return folder_paths.get_filename_list("loras")


def adapter_path(name: str) -> str:
    """Return the path of a file in the host's `loras` folders.

    Raises:
        FormatError: There is no such file.
    """
    import folder_paths

    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise FormatError("no such file in the loras folders", name, "refresh the node list (R) and choose again")
    return path


def check_prefix(prefix: str) -> None:
    """Check the name that a file shall be saved under, before any work is done.

    Raises:
        OutputError: It is empty, too long, leads out of its folder, or has characters or names that the system refuses.
    """
    plain = prefix.replace("\\", "/")
    parts = posixpath.normpath(plain).split("/")
    windows = output.UNNAMEABLE.fullmatch if output.WINDOWS else lambda _: None
    wrong = next((part for part in parts if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", part) or windows(part)), None)
    if parts[0] == "..":
        raise OutputError("a name outside the host's folders", prefix[:200], "give a name without ..")
    if plain.rpartition("/")[2] in ("", ".", ".."):
        raise OutputError("a name of no file", prefix[:200] or "nothing", "give a name such as lorax/adapter")
    if wrong is not None:
        raise OutputError("a name that the system refuses", wrong[:200], "use letters, digits, - and _")
    if len(prefix) > PREFIX_CHARACTERS or max(len(part.encode()) for part in parts) > NAME_BYTES:
        got = f"{prefix[:40]}... has {len(prefix)} characters in {len(parts)} parts"
        raise OutputError("a name that is too long", got, f"give at most {NAME_BYTES} bytes for each part")


def free_path(folder: str, prefix: str) -> tuple[str, str]:
    """Return a path that does not exist yet, `<prefix>_00001_.safetensors`, and its name below a folder of the host.

    Args:
        folder: `output` or `loras`.
        prefix: Name, with subfolders if wanted; never outside the folder.

    Raises:
        OutputError: The name is none (`check_prefix`), leads outside the folder, or the folder cannot be written.
    """
    import folder_paths

    check_prefix(prefix)
    root = folder_paths.get_output_directory() if folder == "output" else folder_paths.get_folder_paths("loras")[0]
    inside, name = os.path.realpath(root), os.path.realpath(os.path.join(root, prefix))
    if not Path(name).is_relative_to(inside):
        raise OutputError("a name outside the host's folders", prefix, f"give a name below {folder}")
    output.make_folder(Path(name).parent)
    count = 1
    while os.path.exists(on_disk(path := f"{name}_{count:05}_.safetensors")):
        count += 1
    return path, os.path.relpath(path, inside)


def show(text: str, node_id: str | None) -> None:
    """Show text on the face of a node while the graph runs; names in it come from files, and are shown as they are."""
    from server import PromptServer

    if node_id is not None:
        PromptServer.instance.send_progress_text(as_text(text), node_id)


def as_text(text: str) -> str:
    """Return text so that a page shows it as it is, whether it takes it for HTML or for Markdown.

    The host's classic canvas takes it for HTML and makes links of addresses and of `[[words|address]]`, its Vue nodes
    take it for Markdown, of which an image is fetched. A sign that is written by its number means nothing in either; two
    blanks end a line in Markdown.
    """
    lines = (printable(line).strip() for line in text.split("\n"))
    return "  \n".join("".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in line) for line in lines)


def send(event: str, data: Mapping[str, Any]) -> None:
    """Send an event to the browser that runs the graph."""
    from server import PromptServer

    PromptServer.instance.send_sync(event, dict(data), PromptServer.instance.client_id)
