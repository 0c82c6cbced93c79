"""Prompts for a real server, from the small models of `make_models.py`."""


def transfer(strength=1.0, family="sd15", method="auto", source=None, target=None, adapter=None, rank=320):
    """A prompt that moves a LoRA, samples two steps with it, and saves it and the latent."""
    xl = family == "sdxl"
    source = source or ("sdxl-base" if xl else "sd15-base")
    target = target or ("ssd-1b" if xl else "sd15-tuned")
    load = {"adapter": ["3", 0], "source": ["1", 0], "target": ["2", 0]}
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=f"{source}.safetensors"),
        "2": node("CheckpointLoaderSimple", ckpt_name=f"{target}.safetensors"),
        "3": node("LoraXLoader", lora_name=f"{adapter or family + '-style'}.safetensors"),
        "4": node("LoraXTransfer", method=method, rank=rank, threshold=0.0, **load),
        "5": node("LoraXApply", model=["2", 0], adapter=["4", 0], strength=strength),
        **sampling("5", xl),
    }


def sampling(model, xl=False):
    return {
        "10": node("LoraXTestConditioning", seed=5, width=2048 if xl else 768),
        "11": node("ConditioningZeroOut", conditioning=["10", 0]),
        "12": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "13": node(
            "KSampler",
            model=[model, 0],
            positive=["10", 0],
            negative=["11", 0],
            latent_image=["12", 0],
            seed=1,
            steps=2,
            cfg=2.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "14": node("SaveLatent", samples=["13", 0], filename_prefix="test/latent"),
    }


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def save(**options):
    return node(
        "LoraXSave", **({"filename_prefix": "test/moved", "form": "LoRA, kohya names", "folder": "loras"} | options)
    )
