"""Numbers that the tests share: random ones, spectra, updates as they act, and what counts as the same."""

import zlib

import torch

# How far a result may be from the naive one, in parts of the norm: what one rounding of the dtype makes (2^-53, 2^-24,
# 2^-11), times the few hundred roundings of a decomposition and of the products around it; factors that are stored in
# half precision are rounded once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3}


def same(ours, expected, dtype=torch.float32, limit=None):
    """Assert that two tensors are the same, to what the dtype can tell that ours was computed in, or a stated bound."""
    assert ours.shape == expected.shape
    limit = limit or TOLERANCE[dtype]
    ours, expected = ours.detach().cpu().double(), expected.detach().cpu().double()
    difference, size = float((ours - expected).norm()), float(expected.norm())
    assert difference <= limit * size, f"{difference / size if size else difference:.2g} is more than {limit:g}"


def randn(*shape, seed=0):
    """Random numbers in float32; each shape has its own, so that no two factors are made of the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {shape}".encode())))


def orthogonal(rows, columns, seed=0):
    """Orthonormal columns, in float64."""
    return torch.linalg.qr(randn(rows, columns, seed=seed).double())[0]


def with_spectrum(m, n, values, seed=0):
    """A matrix of these singular values, in float64."""
    p = len(values)
    S = torch.as_tensor(values, dtype=torch.float64)
    return (orthogonal(m, p, seed) * S) @ orthogonal(n, p, seed + 1).T


def falling(m, n, seed=0):
    """A matrix whose singular values fall as those of trained weights do."""
    return with_spectrum(m, n, [i**-0.7 for i in range(1, min(m, n) + 1)], seed)


def dense(update, base):
    """All that an update changes of the weight of its base, in float64."""
    return update.delta_weight(base.weight(update.layer.name) if update.needs_weight else None).double()


def lora_tensors(base, rank=4, seed=0, alpha=2.0):
    """A LoRA in kohya naming for every attention layer and every 3x3 convolution of a base."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in base.layers.values():
        if layer.is_attention or layer.kind in ("conv1", "ff.net.proj", "proj_in"):
            prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[layer.component]
            module = prefix + layer.path.replace(".", "_")
            tail = (1,) * len(layer.shape[2:])
            tensors[f"{module}.lora_up.weight"] = torch.randn(layer.shape[0], rank, *tail, generator=generator)
            tensors[f"{module}.lora_down.weight"] = torch.randn(rank, *layer.shape[1:], generator=generator)
            tensors[f"{module}.alpha"] = torch.tensor(alpha)
    return tensors
