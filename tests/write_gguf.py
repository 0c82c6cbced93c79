"""Writes a model as a GGUF file, as the programs that make them for ComfyUI do."""

import sys
from pathlib import Path

import gguf  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file

PREFIX = "model.diffusion_model."
# Layers that stay in 16 bits, as some do in most files.
EXACT = ".attn2.to_v."


def write_gguf(tensors, path, arch, kind=gguf.GGMLQuantizationType.Q8_0, quantize=gguf.quants.quantize):
    """Write the tensors of a model, most weights quantised.

    A convolution of 256 k numbers is stored as rows of 256, its shape beside it: quantised numbers lie in rows.

    Args:
        tensors: Name -> tensor.
        path: The file.
        arch: The kind of model, as ComfyUI-GGUF calls it.
        kind: How the weights are stored.
        quantize: Makes an array one of that kind.
    """
    writer = gguf.GGUFWriter(path=None, arch=arch)
    for key, tensor in tensors.items():
        data = tensor.float().numpy()
        if data.ndim == 1 or data.size % 256 or EXACT in key:
            writer.add_tensor(key, data.astype("float32" if data.ndim == 1 else "float16"))
            continue
        if data.shape[-1] % 256:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", tuple(map(int, data.shape)))
            data = data.reshape(-1, 256)
        writer.add_tensor(key, quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    source, path, arch = sys.argv[1:]
    tensors = load_file(source)
    write_gguf({key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}, Path(path), arch)
