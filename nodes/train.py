"""The node that trains a LoRA-X adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..lorax.adapters import Adapter
from ..lorax.checks import highest_rank
from ..lorax.compute.cache import open_cache
from ..lorax.compute.engine import Engine
from ..lorax.errors import MismatchError, OptionError
from ..lorax.options import LEARNING_RATE
from ..lorax.show.pictures import loss_picture
from ..lorax.train import LoraXLayers, attach, thinned, train
from . import host
from .host import io
from .types import CATEGORY, AdapterPort, node_schema, rank_input

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EVENT, POINTS, SECONDS = "lorax.loss", 500, 0.3


class LoraXTrain(io.ComfyNode):
    """Train a LoRA-X adapter on pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return node_schema(
            node_id="LoraXTrain",
            display_name="Train LoRA-X",
            category=CATEGORY,
            search_aliases=["train lora", "lora training", "finetune lora", "fine-tune on pictures"],
            advanced=["grad_accumulation_steps", "training_dtype", "gradient_checkpointing"],
            description="Trains a LoRA-X on pictures: the leading singular values of the model's attention layers learn, "
            "nothing else. The result fits this very model; LoRA-X Transfer moves it to others.",
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to train on. It is not changed."),
                io.Latent.Input("latents", tooltip="The pictures: a batch, or a list of batches of any sizes."),
                io.Conditioning.Input("positive", tooltip="One caption for all of the pictures, or one for each."),
                io.Int.Input("batch_size", default=1, min=1, max=10000, tooltip="Pictures at a time; all of one size."),
                io.Int.Input(
                    "grad_accumulation_steps",
                    default=1,
                    min=1,
                    max=1024,
                    tooltip="Batches that make one step: a larger batch, in more time and not in more memory.",
                ),
                io.Int.Input("steps", default=16, min=1, max=100000, tooltip="Steps of the optimizer (AdamW)."),
                io.Float.Input(
                    "learning_rate",
                    default=LEARNING_RATE,
                    min=0.0000001,
                    max=1.0,
                    step=0.0000001,
                    tooltip="How far a singular value may move in one step, about.",
                ),
                rank_input("Singular values that learn in each layer. A smaller layer uses all it has."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the choice of pictures, times and noise.",
                ),
                io.Combo.Input(
                    "training_dtype",
                    options=list(DTYPES),
                    default="bf16",
                    tooltip="To compute in. What learns is always fp32.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=True,
                    tooltip="Much less memory, about a third more time.",
                ),
                AdapterPort.Input(
                    "existing_adapter",
                    optional=True,
                    tooltip="A LoRA-X of this model to train on; its layers and ranks count then, not the rank above.",
                ),
            ],
            outputs=[
                AdapterPort.Output(display_name="adapter", tooltip="For Save LoRA-X, Apply on this model, Transfer."),
                io.Image.Output(display_name="loss_graph", tooltip="The loss of each step."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: list[host.Model],
        latents: list[host.Latent],
        positive: list[host.Conditioning],
        batch_size: list[int],
        grad_accumulation_steps: list[int],
        steps: list[int],
        learning_rate: list[float],
        rank: list[int],
        seed: list[int],
        training_dtype: list[str],
        gradient_checkpointing: list[bool],
        existing_adapter: Sequence[Adapter | None] = (None,),
    ) -> io.NodeOutput:
        """Train it; the host gives every input as a list."""
        if training_dtype[0] not in DTYPES:
            raise OptionError("unknown dtype", str(training_dtype[0]), f"choose one of {', '.join(DTYPES)}")
        pictures = paired(latents, positive)
        curve = Curve(cls.hidden.unique_id, steps[0])
        run = partial(
            train,
            steps=steps[0],
            learning_rate=learning_rate[0],
            grad_accumulation_steps=grad_accumulation_steps[0],
            seed=seed[0],
            on_step=curve.add,
        )
        adapter = trained(
            model[0],
            pictures,
            run,
            rank[0],
            existing_adapter[0],
            batch_size[0],
            dtype=DTYPES[training_dtype[0]],
            gradient_checkpointing=gradient_checkpointing[0],
        )
        image = torch.from_numpy(np.asarray(loss_picture(curve.losses), dtype=np.float32) / 255)[None]
        return io.NodeOutput(adapter, image, ui=host.shown(cls.hidden, curve.words(), lorax_loss=curve.points()))


def paired(latents: Sequence[host.Latent], positive: Sequence[host.Conditioning]) -> list[tuple[Tensor, host.Caption]]:
    """Return each picture, a latent `[1, ...]`, with its caption, an entry of a CONDITIONING.

    Raises:
        MismatchError: There is neither one caption nor one for each picture.
    """
    singles = [latent for batch in latents for latent in batch["samples"].split(1)]
    captions = [caption for conditioning in positive for caption in conditioning]
    if len(captions) not in (1, len(singles)):
        got = f"{len(captions)} captions, {len(singles)} pictures"
        raise MismatchError("each picture needs its caption", got, "give one for all, or one for each")
    return list(zip(singles, captions * (len(singles) if len(captions) == 1 else 1), strict=True))


def trained(
    model: host.Model,
    pictures: Sequence[tuple[Tensor, host.Caption]],
    run: Callable[[LoraXLayers, Callable[[int], Tensor]], object],
    rank: int,
    existing: Adapter | None,
    batch_size: int,
    *,
    dtype: torch.dtype,
    gradient_checkpointing: bool,
) -> Adapter:
    """Train on pictures by `run(layers, loss)`; each batch is of pictures of one size, drawn at random."""
    base = host.open_model(model)
    most = highest_rank(layer for layer in base.layers.values() if layer.is_attention)
    sizes = [latent.shape for latent, _ in pictures]

    def batch() -> list[int]:
        size = sizes[int(torch.randint(len(sizes), ()))]
        alike = [i for i, other in enumerate(sizes) if other == size]
        return [alike[i] for i in torch.randperm(len(alike))[:batch_size].tolist()]

    count = host.counted(len(base.layers))

    def added(module: torch.nn.Module) -> LoraXLayers:
        return attach(
            module,
            base=base,
            rank=min(rank, most) if existing is None else None,
            start=existing,
            engine=Engine(str(next(module.parameters()).device), cache=open_cache()),
            dtype=dtype,
            progress=lambda done, total, what: count(done),
        )

    with host.training(model, pictures, added, dtype=dtype, gradient_checkpointing=gradient_checkpointing) as (
        layers,
        loss,
    ):
        run(layers, lambda call: loss(batch()))
        return layers.adapter("trained")


class Curve:
    """The loss of each step so far, shown while the training runs.

    Args:
        node: The id of the node.
        steps: How many there will be.
    """

    def __init__(self, node: str | None, steps: int) -> None:
        self.losses: list[float] = []
        self._node, self._steps = node, steps
        self._count, self._sent = host.counted(steps), 0.0

    def add(self, step: int, loss: float) -> None:
        """Take the loss of a step; show it a few times a second."""
        self.losses.append(loss)
        self._count(step)
        if time.monotonic() - self._sent > SECONDS:
            self._sent = time.monotonic()
            host.send(EVENT, {"node": self._node, **self.points()})
            host.show(self.words(), self._node)

    def points(self) -> dict[str, object]:
        """Return the steps and their losses, evenly thinned to at most `POINTS`, the last among them."""
        steps = thinned(len(self.losses), POINTS)
        return {"steps": steps, "losses": [self.losses[step - 1] for step in steps], "total": self._steps}

    def words(self) -> str:
        """Return how far it is."""
        return f"step {len(self.losses)} of {self._steps}, loss {self.losses[-1]:.4f}"
