"""The files of a base: found from a path, shards put together; what is never read is refused by name."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FileError, FormatError
from ..files.ggufile import GgufFile, open_tensors
from ..files.longpath import on_disk
from ..files.tensorfile import ADVICE, DTYPES, Entry, TensorFile, natural_order, read_json
from .layers import MAIN, Rows, unwrapped

if TYPE_CHECKING:
    from torch import Tensor

# Keys that only adapters have, among those that end like a weight of a base.
ADAPTER_KEY = re.compile(r"[._]lora[._]|\.(hada|lokr|oft|foura)_|\.dora_scale$|\.[ab][12]\.weight$|^\w+:\d+:(up|down)$")
# What a scaled fp8 weight has beside it: ComfyUI's two spellings.
SCALES = ("scale_weight", "weight_scale")
# What quantised weights have beside them, or in their place, by the program that writes it.
QUANTISED = {
    "4 bit by bitsandbytes (NF4, FP4)": re.compile(r"\.weight\.(absmax|quant_map|quant_state\.\w+)$"),
    "8 bit by bitsandbytes": re.compile(r"\.SCB$"),
    "SVDQuant, by nunchaku": re.compile(r"\.(wscales|smooth_factor|wtscale)$"),
    "GPTQ or AWQ": re.compile(r"\.(qweight|qzeros|g_idx)$"),
    "NVFP4": re.compile(r"\.weight_scale_2$"),
    "fp8 in blocks": re.compile(r"\.weight_scale_inv$"),
    "scaled by input": re.compile(r"\.pre_quant_scale$"),
    "quanto": re.compile(r"\.weight\._data$"),
    "torchao": re.compile(r"\._weight_qdata$"),
}
# Of a module whose weight is quantised by SDNQ; by itself it may be that of a norm.
SDNQ = "scale"
UNQUANTISED = "give the model in fp32, fp16, bf16, plain or scaled fp8, or GGUF"
# The ends of the names of files that are read; of those in a folder the first are taken.
KINDS = (".safetensors", ".gguf")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
INDEX = re.compile(r"(.+)\.safetensors\.index(\.\w+)?\.json")
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)((?:\.\w+)?)(\.safetensors|\.gguf)")
# As diffusers and transformers call the file of a model; of its variants those before the others.
NAMES = ("diffusion_pytorch_model", "model")
VARIANTS = ("", ".fp32", ".bf16", ".fp16")
PRECISION = re.compile(r"\.(fp32|bf16|fp16)$")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
NAMED = 5
# Characters of the names below a folder of diffusers: that of a component and that of a shard have up to 72.
BELOW = 100


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file, or some rows of it."""

    file: TensorFile
    key: str
    rows: Rows | None = None

    @property
    def entry(self) -> Entry:
        """The whole tensor, as the file's header describes it."""
        return self.file.entries[self.key]

    def read(self) -> Tensor:
        """Return the tensor in the dtype of the file; where a scale lies beside it, times that and in float32.

        Raises:
            FileError: It cannot be read, or its scale does not fit.
        """
        weight = self.file.tensor(self.key, self.rows)
        for scale in SCALES:
            beside = f"{self.key.removesuffix('weight')}{scale}"
            if beside in self.file.entries:
                return weight.float() * self._factor(beside)
        return weight

    def _factor(self, beside: str) -> Tensor:
        shape = self.entry.shape
        factor = self.file.tensor(beside).float()
        if factor.shape == shape[:1]:  # one for each row
            factor = factor.reshape(-1, *[1] * (len(shape) - 1))
        sizes = zip(reversed(factor.shape), reversed(shape), strict=False)
        if factor.dim() > len(shape) or any(ours not in (1, its) for ours, its in sizes):
            got = f"{beside} {list(factor.shape)} beside {list(shape)} in {self.file.path}"
            raise FileError("a scale that does not fit its weight", got, ADVICE)
        if self.rows is None or factor.dim() < len(shape) or factor.shape[0] == 1:
            return factor
        return factor[slice(*self.rows)]


Tensors = dict[str, Stored]
# The files of one model by name, each with the tensors that an index promises of it.
Files = dict[str, set[str]]


def open_components(path: Path) -> dict[str, Tensors]:
    """Find the tensors of a base.

    Args:
        path: A file, a shard or the index of a model, the folder of a diffusers pipeline, or that of one model.

    Returns:
        For each component of a pipeline its tensors by name; the tensors of a file or of the folder of one model under
        an empty name. What stands around modules while they are compiled or trained is not in the names.

    Raises:
        FileError: A file or a shard is missing or damaged, or is of a kind that is never read.
        FormatError: There is no model, or several.
    """
    path = on_disk(path, room=BELOW)
    if not os.path.isdir(path):
        return {"": _tensors(path.parent, _whole(path))}
    parts: dict[str, Tensors] = {}
    for component in (*MAIN, *TEXT_ENCODERS):
        if os.path.isdir(path / component) and (files := _chosen(path / component)):
            parts[component] = _tensors(path / component, files)
    if parts.keys() & set(MAIN):
        return parts
    if files := _chosen(path):
        return {"": _tensors(path, files)}
    inside = [name for name in _listed(path) if os.path.isdir(path / name) and _models(path / name)]
    fix = (
        f"give one of {', '.join(inside[:NAMED])}" if inside else "give a diffusers folder, that of a model, or a file"
    )
    raise FormatError("the folder holds no U-Net and no transformer", str(path), fix)


def is_adapter(file: TensorFile) -> bool:
    """Return whether a file holds updates of weights; SVDQuant bases hold some, and are none."""
    return any(ADAPTER_KEY.search(key) for key in file.entries) and not _quantised(file)


def quantised_name(names: Collection[str]) -> str:
    """Return a name that only parameters of a quantised model have, and how that is quantised; empty: there is none."""
    for kind, pattern in QUANTISED.items():
        if name := next(filter(pattern.search, names), ""):
            return f"{name}, {kind}"
    return ""


def _tensors(folder: Path, files: Files) -> Tensors:
    """Return the tensors of a model by name, in natural order, whichever file each lies in."""
    missing = [name for name in files if not os.path.isfile(folder / name)]
    if len(files) > 1 and missing:
        got = f"{folder} without {', '.join(missing[:NAMED])}"
        raise FileError("a part of the model is missing", got, "download the whole model")
    found: Tensors = {}
    for name, promised in files.items():
        file = open_tensors(folder / name)
        if quantised := _quantised(file):
            raise FileError("quantised weights are not read", f"{file.path}: {quantised}", UNQUANTISED)
        if absent := sorted(promised - file.entries.keys()):
            got = f"{absent[0]} is not in {file.path}"
            raise FileError("a file that does not fit the index beside it", got, "download the whole model")
        found |= {unwrapped(key): Stored(file, key) for key in file.entries}
    return found if len(files) == 1 else {name: found[name] for name in sorted(found, key=natural_order)}


def _quantised(file: TensorFile) -> str:
    """Return how the weights of a file are quantised, with a key; empty: they are not, or in a way that is read."""
    if isinstance(file, GgufFile):
        return ""
    if found := quantised_name(file.entries):
        return found
    for key, entry in file.entries.items():
        if key.endswith(".weight") and len(entry.shape) > 1:
            if entry.dtype not in DTYPES:
                return f"{key} is {entry.dtype}"
            if f"{key.removesuffix('weight')}{SDNQ}" in file.entries:
                return f"{key} with a {SDNQ}"
    return ""


def _whole(path: Path) -> Files:
    """Return all files of the model that a file, a shard or an index belongs to."""
    _refuse(path)
    if INDEX.fullmatch(path.name):
        return _indexed(path)
    if not os.path.isfile(path) or not os.access(path.parent, os.R_OK):
        return {path.name: set()}
    names = _listed(path.parent)
    for name in filter(INDEX.fullmatch, names):
        if path.name in (files := _indexed(path.parent / name)):
            return files
    shard = SHARD.fullmatch(path.name)
    return _numbered(shard, names) if shard else {path.name: set()}


def _chosen(folder: Path) -> Files:
    """Return the files of the model in a folder that may hold it in several precisions; none if it holds no weights."""
    models = _models(folder)
    best: dict[str, Files] = {}
    for variant in VARIANTS:
        for label, files in models.items():
            if label == PRECISION.sub("", label) + variant:
                best.setdefault(PRECISION.sub("", label), files)
    found = [best[name] for name in NAMES if name in best][:1] or list(best.values())
    bases = [files for files in found if not _is_adapter_in(folder, files)]
    if len(bases) > 1:
        got = f"{folder} has {', '.join(next(iter(files)) for files in bases[:NAMED])}"
        raise FormatError("several models in one folder", got, "give the file of one")
    if bases:
        return bases[0]
    for name in _listed(folder):
        _refuse(folder / name)
    if found:
        raise FormatError("an adapter where a base model is wanted", str(folder), "give a checkpoint")
    return {}


def _refuse(path: Path) -> None:
    """Refuse a file of weights by the end of its name."""
    if path.suffix.lower() in PICKLES:
        raise FileError("pickle files are never read, they can run code", str(path), "convert it to safetensors first")


def _is_adapter_in(folder: Path, files: Files) -> bool:
    return any(is_adapter(open_tensors(folder / name)) for name in islice(files, 1) if os.path.isfile(folder / name))


def _models(folder: Path) -> dict[str, Files]:
    """Return the models in a folder, each by the name that its file has without its end, or would have whole."""
    names = _listed(folder)
    indexes = {
        index[1] + (index[2] or ""): _indexed(folder / index[0]) for index in map(INDEX.fullmatch, names) if index
    }
    found = {label: files for label, files in indexes.items() if set(names) & set(files)}
    known = {name for files in found.values() for name in files}
    for kind in KINDS:
        for name in names:
            if name.lower().endswith(kind) and name not in known:
                shard = SHARD.fullmatch(name)
                label = shard[1] + shard[4] if shard else name[: -len(kind)]
                found.setdefault(label, _numbered(shard, names) if shard else {name: set()})
        if found:
            break
    return found or indexes


def _listed(folder: Path) -> list[str]:
    """Return the names in a folder in order, without hidden ones: systems and programs put theirs there."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise FileError("cannot read a folder", f"{folder}: {error.strerror}", "check the path") from error


def _indexed(index: Path) -> Files:
    """Return what an index of shards says."""
    files: Files = {}
    try:
        for key, name in read_json(index)["weight_map"].items():
            if os.path.basename(name) != name or "\\" in name:
                raise ValueError(f"{name} is no file beside it")
            files.setdefault(name, set()).add(key)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise FileError("an index of shards that cannot be read", f"{index}: {error}", ADVICE) from error
    return files


def _numbered(shard: re.Match[str], names: Iterable[str]) -> Files:
    """Return the shards that belong with one: those that are there, and the first of those that are not."""
    stem, number, count, variant, kind = shard.groups()
    found = filter(None, map(SHARD.fullmatch, names))
    there = {int(m[2]): m[0] for m in found if (m[1], *m.groups()[2:]) == (stem, count, variant, kind)}
    lost = (i for i in range(1, int(count) + 1) if i not in there)
    lost = islice(lost, max(0, min(NAMED, int(count) - len(there))))
    missing = [f"{stem}-{i:0{len(number)}}-of-{count}{variant}{kind}" for i in lost]
    return {name: set() for name in sorted([*there.values(), *missing])}
