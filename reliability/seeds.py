"""Sound files to start from: an adapter of every kind, and base models, all small."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from demo.synthetic import base_tensors
from lorax.models.families import families
from lorax.models.family import Family
from lorax.models.unet import UNetConfig
from lorax.train.state import Checkpoint

TINY = UNetConfig(
    model_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    transformer_depth=(1,),
    transformer_depth_middle=1,
    context_dim=768,
)
QUERY = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
KEY = "mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
CONV = "down_blocks_0_resnets_0_conv1"
DOTTED = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PEFT = f"base_model.model.{DOTTED}"


def tiny_family() -> Family:
    """SD 1.x with one level of 32 channels and a text encoder of one layer."""
    family = families()["sd1"]
    encoders = tuple(replace(encoder, width=32, inner=64, depth=1) for encoder in family.text_encoders)
    return replace(family, unet=TINY, text_encoders=encoders)


def base_file(path: Path, seed: int = 1, change: float = 0.0) -> Path:
    """Write a small checkpoint."""
    save_file(base_tensors(tiny_family(), seed, change=change, dtype=torch.float32), path)
    return path


def base_folder(path: Path) -> Path:
    """Write a small diffusers folder, its U-Net in two shards with an index."""
    from lorax import open_base

    whole = base_file(path.with_suffix(".whole"))
    base = open_base(whole)
    tensors = {f"{layer.path}.weight": base.read(layer) for layer in base.layers.values() if layer.is_main}
    names = sorted(tensors)
    (path / "unet").mkdir(parents=True)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: tensors[name] for name in part}, path / "unet" / shard(number))
    whole.unlink()
    return path


def shard(number: int) -> str:
    """Return the name of one of the two shards."""
    return f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"


def adapters() -> dict[str, bytes]:
    """Return a file of every kind of adapter, and of every naming that is read otherwise, by a name for it."""
    return {name: save(tensors, metadata) for name, (tensors, metadata) in _adapters().items()}


def _adapters() -> dict[str, tuple[dict[str, Tensor], dict[str, str] | None]]:
    g = torch.Generator().manual_seed(3)

    def n(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=g)

    def kohya(module: str, alpha: float | None = 2.0, **parts: Tensor) -> dict[str, Tensor]:
        tensors = {f"lora_unet_{module}.{name.replace('__', '.')}": part for name, part in parts.items()}
        return tensors if alpha is None else tensors | {f"lora_unet_{module}.alpha": torch.tensor(alpha)}

    lora = kohya(QUERY, lora_up__weight=n(32, 2), lora_down__weight=n(2, 32))
    conv = kohya(CONV, lora_up__weight=n(32, 2, 1, 1), lora_down__weight=n(2, 32, 3, 3))
    key = kohya(KEY, lora_up__weight=n(32, 2), lora_down__weight=n(2, 768))
    loha = {f"hada_w{i}_{side}": n(32, 2) if side == "a" else n(2, 32) for i in "12" for side in "ab"}
    tucker = {f"hada_w{i}_{side}": n(2, 32) for i in "12" for side in "ab"} | {
        f"hada_t{i}": n(2, 2, 3, 3) for i in "12"
    }
    peft = {
        f"{PEFT}.lora_A.weight": n(2, 32),
        f"{PEFT}.lora_B.weight": n(32, 2),
        f"{PEFT}.lora_magnitude_vector": n(32),
    }
    flux = "diffusion_model.double_blocks.0.img_attn.qkv"
    return {
        "lora": (lora | conv | key, {"ss_network_dim": "2", "ss_tag_frequency": '{"a": {"b": 1}}'}),
        "lora with a middle": (
            kohya(
                CONV, lora_up__weight=n(32, 2, 1, 1), lora_down__weight=n(2, 32, 1, 1), lora_mid__weight=n(2, 2, 3, 3)
            ),
            None,
        ),
        "dora": (kohya(QUERY, lora_up__weight=n(32, 2), lora_down__weight=n(2, 32), dora_scale=n(32, 1)), None),
        "peft": (
            peft,
            {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {"to_q": 2}}'},
        ),
        "loha": (kohya(QUERY, 2.0, **loha), None),
        "loha with a middle": (kohya(CONV, 2.0, **tucker), None),
        "lokr": (kohya(QUERY, lokr_w1=n(4, 4), lokr_w2_a=n(8, 2), lokr_w2_b=n(2, 8)), None),
        "lokr with a middle": (
            kohya(CONV, lokr_w1=n(4, 4), lokr_w2_a=n(2, 8), lokr_w2_b=n(2, 8), lokr_t2=n(2, 2, 3, 3)),
            None,
        ),
        "lokr whole": (kohya(QUERY, lokr_w1=n(4, 4), lokr_w2=n(8, 8)), None),
        "glora": (
            kohya(QUERY, a1__weight=n(32, 2), a2__weight=n(2, 32), b1__weight=n(32, 2), b2__weight=n(2, 32)),
            None,
        ),
        "oft": (kohya(QUERY, 0.1, oft_blocks=n(8, 4, 4), rescale=n(32, 1)), None),
        "boft": (kohya(QUERY, 0.1, oft_blocks=n(3, 8, 4, 4)), None),
        "diff": (
            kohya(QUERY, None, diff=n(32, 32), diff_b=n(32)) | kohya("conv_norm_out", None, w_norm=n(32), b_norm=n(32)),
            None,
        ),
        "foura": (kohya(QUERY, foura_up__weight=n(32, 2), foura_down__weight=n(2, 32), foura_gate=n(2)), None),
        "lora-x": (
            {f"unet.{DOTTED}.delta": n(8)},
            {
                "lorax_format_version": "1",
                "base_family": "sd1",
                "fingerprints": f'{{"unet.{DOTTED}": "0123456789abcdef"}}',
            },
        ),
        "indexed": (
            {"unet:0:up": n(320, 2), "unet:0:down": n(2, 320), "text_encoder:1:up": n(768, 2)}
            | {"text_encoder:1:down": n(2, 768)},
            {"unet": '["CrossAttention"]', "unet:0:rank": "2"},
        ),
        "flux": (
            {f"{flux}.lora_A.weight": n(2, 3072), f"{flux}.lora_B.weight": n(9216, 2)}
            | {"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": n(4096, 1)}
            | {"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": n(1, 4096)},
            None,
        ),
    }


def training() -> Checkpoint:
    """Return a training of two parameters after one step."""
    parameters = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    torch.stack([part.square().sum() for part in parameters]).sum().backward()
    optimizer.step()
    return Checkpoint(["a", "b"], parameters, optimizer, [1.0])
