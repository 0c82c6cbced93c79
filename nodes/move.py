"""The node that takes the place of a LoRA loader."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch.nn import Module

from ..lorax.adapters import Adapter, load_adapter
from ..lorax.models.base import Base, open_base
from ..lorax.transfer.report import TransferReport
from ..lorax.transfer.run import transfer_adapter
from . import host
from .convert import as_lora, has_lora_x
from .host import io
from .transfer import SEARCHED, summary
from .types import CATEGORY, lora_input, node_schema, strength_input

# Module of a MODEL -> node -> (what it was made of, the adapter for this MODEL, the report).
_remembered: WeakKeyDictionary[Module, dict[str, tuple[object, Adapter, TransferReport]]] = WeakKeyDictionary()


class LoraXMove(io.ComfyNode):
    """Load a LoRA of another base model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return node_schema(
            node_id="LoraXMove",
            display_name="Move LoRA",
            category=CATEGORY,
            description="Loads a LoRA that was made for another base model: moves it to this one and applies it. In place of "
            "a LoRA loader; several in a row add up.",
            search_aliases=[*SEARCHED, "load lora of another model"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the LoRA shall work on."),
                lora_input(),
                io.Combo.Input(
                    "base_name",
                    options=host.base_files(),
                    tooltip="The base model that the LoRA was made for. It is read a layer at a time and never loaded.",
                ),
                strength_input(),
                io.Clip.Input("clip", optional=True, tooltip="Text encoder, for a LoRA that has layers for it."),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The patched model, for a sampler or the next LoRA."),
                io.Clip.Output(display_name="CLIP", tooltip="The patched text encoder; nothing if none was given."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, base_name: str, **_: object) -> str:
        """Read the files again when one changed."""
        return f"{host.file_state(host.adapter_path(lora_name))} {open_base(host.base_path(base_name)).state}"

    @classmethod
    def execute(
        cls,
        model: host.Model,
        lora_name: str,
        base_name: str,
        strength: float,
        clip: host.Clip | None = None,
    ) -> io.NodeOutput:
        """Move it and apply it."""
        path, source = host.adapter_path(lora_name), open_base(host.base_path(base_name))
        plain, plain_clip = host.without_moved(model, clip)
        made_of = (path, host.file_state(path), source.state, host.state_of(plain, plain_clip))
        nodes = _remembered.setdefault(model.model, {})
        known = nodes.get(cls.hidden.unique_id)
        if known is None or known[0] != made_of:
            target = host.open_model(plain, plain_clip, host.file_of(cls.hidden, "model"))
            known = (made_of, *_moved(load_adapter(path, source), source, target))
            nodes[cls.hidden.unique_id] = known
        _, moved, report = known
        patched, patched_clip = host.apply_moved(model, clip, moved, strength)
        said = host.shown(cls.hidden, summary(report), lorax_report=report.to_json())
        return io.NodeOutput(patched, patched_clip, ui=said)


def _moved(adapter: Adapter, source: Base, target: Base) -> tuple[Adapter, TransferReport]:
    """Return the adapter for the target, without layers that need a base to be read, and the report."""
    moved, report = host.compute(
        lambda engine, progress: transfer_adapter(adapter, source, target, engine=engine, progress=progress),
        len(adapter.layers),
    )
    return (as_lora(moved, target) if has_lora_x(moved) else moved), report
