"""The words of the page, and its columns."""

# Every measured difference has to stay below this.
BOUND = 1e-5
GROUPS = {
    "U-Nets": {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL", "sdxl SSD-1B": "SSD-1B"},
    "Transformers for pictures": {
        "sd3": "SD 3",
        "flux": "FLUX.1",
        "flux2": "FLUX.2",
        "chroma": "Chroma",
        "anima": "Anima",
        "krea2": "Krea 2",
        "lumina2": "Lumina 2",
        "z_image": "Z-Image",
        "qwen_image": "Qwen-Image",
    },
    "Transformers for video": {
        "ltx": "LTX-Video",
        "wan": "Wan",
        "hunyuan_video": "HunyuanVideo",
        "hunyuan_video_15": "HunyuanVideo 1.5",
    },
}
COLUMNS = {name: label for group in GROUPS.values() for name, label in group.items()}
# Why a cell is empty: mark -> reason.
EMPTY = {
    "(a)": "this version of ComfyUI has no such model.",
    "(b)": "the family has no 3x3 convolutions.",
    "(c)": "the blocks have no norm and no bias that adapter files have a key for: norms are called `scale` there.",
}
NOTES = {
    "DoRA, per output": "ComfyUI divides the magnitude by the norm of the unchanged weight, trainers and this package "
    "by that of the changed one. The figure of **a** compares with ComfyUI's rule.",
    "DoRA, per input": "On a fused weight it is copied whole; projected, what the whole DoRA changes is moved, as a "
    "LoRA, for a column of a fused weight has one norm over all of its layers. ComfyUI adds 1.2e-7 to the norms.",
    "FouRA": "Unknown to ComfyUI. Copied it stays a FouRA, which `nodes/host/` applies as the LoRA that it is; "
    "projected it becomes a LoRA, which the stock loader reads.",
    "LoRA-X": "Unknown to ComfyUI. The transfer makes it a LoRA, which the stock loader reads; kept as LoRA-X, it is "
    "made a LoRA by `lorax.adapters.convert.convert_to_lora` and applied by `nodes/host/`. Both are measured.",
}
STOCK = "stock loader"
INTRODUCTION = """# Adapters and base models

Which kind of adapter can be read, transferred, written and applied in ComfyUI on which family of base models, and how
exactly. This page is written by `tests/host/test_adapters_and_bases.py` (`LORAX_WRITE_TABLE=1`), which otherwise checks
that it still holds.

Measured in ComfyUI {version}, whose own classes built the models, with float32 files. The models are reduced copies
(few blocks, small widths; names and proportions of the layers are the true ones), since those of full size do not fit a
test: a source with random weights, and a target that is the source with 10 % of noise. Each adapter sits on one
attention and feed-forward layer of each sort that the family has, fused weights included.

- **r** read: `load_adapter` gives the update that the formula of the kind gives in float64.
- **t** transferred to the target: copied it is the formula on the target's weights (a DoRA keeps the ratio of its
  magnitudes to the weights), and projected on half of the width it is `U_t U_t^T dW V_t V_t^T`.
- **w** written: `save_adapter` in kohya's naming, and read again the same.
- **a** applied: ComfyUI's LoRA loader reads that file with its own key map, and its patched weight less the weight is
  the transferred update.

A mark stands where every layer, in both ways of transfer, differs by less than {bound} of the norm of the update. The
number is the largest difference of **a**. The last row tells whether ComfyUI's stock loader applies every file of the
column by itself: no key left over ("lora key not loaded"), no patch without a weight.
"""
STEPS = """The largest relative difference over all families: reading and transfer against the formulas, what is read
again and what ComfyUI applies against what was transferred.
"""
