"""Nodes that read and write adapter files."""

from __future__ import annotations

from ..lorax.adapters import Adapter, load_adapter, save_adapter
from ..lorax.errors import OptionError, OutputError
from ..lorax.models.base import Base
from . import host
from .convert import as_lora, has_lora_x
from .host import io
from .types import CATEGORY, SHOWN_AGAIN, AdapterPort, base_input, lora_input, node_schema

FORMS = ("LoRA, kohya names", "LoRA, diffusers names", "LoRA-X")


class LoraXLoader(io.ComfyNode):
    """Read an adapter file."""

    HAS_INTERMEDIATE_OUTPUT = SHOWN_AGAIN

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return node_schema(
            node_id="LoraXLoader",
            display_name="LoRA-X Loader",
            category=CATEGORY,
            search_aliases=["load lora file", "inspect lora", "lora info", "load lora-x"],
            description="Reads a LoRA or LoRA-X file so that it can be moved to another base model.",
            inputs=[
                lora_input(),
            ],
            outputs=[
                AdapterPort.Output(display_name="adapter", tooltip="The adapter, not yet applied to anything."),
                io.String.Output(
                    display_name="summary", tooltip="Format, base family, layers, ranks, what is not used."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str) -> str:
        """Read the file again when it changed."""
        return host.file_state(host.adapter_path(lora_name))

    @classmethod
    def execute(cls, lora_name: str) -> io.NodeOutput:
        """Read it."""
        adapter = load_adapter(host.adapter_path(lora_name))
        text = summary(adapter)
        return io.NodeOutput(adapter, text, ui=host.shown(cls.hidden, text))


class LoraXSave(io.ComfyNode):
    """Write an adapter file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return node_schema(
            node_id="LoraXSave",
            display_name="Save LoRA-X",
            category=CATEGORY,
            search_aliases=["export lora", "save lora", "write lora file", "lora to kohya", "lora to diffusers"],
            description="Writes an adapter as a file that every LoRA loader reads, or as LoRA-X. Never over another file.",
            inputs=[
                AdapterPort.Input("adapter", tooltip="The adapter to write."),
                io.String.Input(
                    "filename_prefix",
                    default="lorax/adapter",
                    tooltip="Name below the folder, with subfolders if wanted. A number is added.",
                ),
                io.Combo.Input(
                    "form",
                    options=list(FORMS),
                    default=FORMS[0],
                    tooltip="kohya names: for ComfyUI, A1111, Forge. diffusers names: for diffusers and PEFT. LoRA-X: singular "
                    "values only, which means something only with its own base model.",
                ),
                io.Combo.Input(
                    "folder", options=["loras", "output"], default="loras", tooltip="The host's folder to write below."
                ),
                base_input(
                    "model",
                    "The adapter's own base model; needed only to write a LoRA-X adapter as a LoRA.",
                    optional=True,
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file was written.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        """Refuse a name that cannot be written before the graph runs; one that a link gives is not known yet."""
        try:
            if filename_prefix is not None:
                host.check_prefix(filename_prefix)
        except OutputError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, adapter: Adapter, filename_prefix: str, form: str, folder: str, model: host.Model | Base | None = None
    ) -> io.NodeOutput:
        """Write it."""
        if form not in FORMS:
            raise OptionError("unknown form of file", str(form), f"choose one of {'; '.join(FORMS)}")
        if form == FORMS[2] and adapter.kind != "lora-x":
            raise OptionError("this adapter is not a LoRA-X", adapter.name, "put Convert to LoRA-X before this node")
        if form != FORMS[2] and has_lora_x(adapter):
            if model is None:
                message = "a LoRA-X needs its base model to become a LoRA"
                raise OptionError(message, adapter.name, "connect the model input")
            adapter = as_lora(adapter, host.open_model(model))
        naming = "diffusers" if form == FORMS[1] else "kohya"
        path, name = host.free_path(folder, filename_prefix)
        save_adapter(adapter, path, naming=naming, overwrite=False)
        return io.NodeOutput(path, ui=host.shown(cls.hidden, name))


def summary(adapter: Adapter) -> str:
    """Return what there is to know about an adapter, in a few lines."""
    family = adapter.family_label or "unknown base family"
    ranks = ", ".join(f"{rank} ({count} layers)" for rank, count in sorted(adapter.ranks.items()))
    lines = [f"{adapter.name}: {adapter.kind}, {adapter.naming} names, {family}", f"rank {ranks}"]
    if len(adapter.families) != 1:
        lines.append("which layers are meant, its base model tells when it is connected")
    if adapter.unused:
        key, why = next(iter(adapter.unused.items()))
        lines.append(f"not used: {len(adapter.unused)} tensors, the first {key}: {why}")
    if has_lora_x(adapter):
        lines.append("needs its own base model as source")
    return "\n".join(lines)
