"""Scoring pictures as the field does, with weights that the user has: HPSv2, LPIPS diversity, DINOv2 similarity.

These are the measures of LoRA-X (arXiv 2501.16559, tables 1 to 4). Nothing is downloaded, and only safetensors weights
are read. Needs the extra `evaluate`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import FileError, FormatError, MismatchError, OptionError
from .files.picturefile import ENDINGS, open_picture, read_caption
from .files.tensorfile import TensorFile

BATCH = 16
# The shorter side that AlexNet's layers leave something of.
SIDE = 31
EXTRA = "'comfyui-lora-x[evaluate]'"
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured; None: not asked for.

    Attributes:
        pictures: How many.
        hpsv2: Mean cosine similarity of picture and caption, as HPSv2 has it (arXiv 2306.09341): about 0.2 to 0.35.
        lpips_diversity: Mean LPIPS distance (arXiv 1801.03924) of all pairs of pictures with one caption.
        dinov2: Mean cosine similarity of the DINOv2 features (arXiv 2304.07193) to the picture of the same name in the
            reference.
    """

    pictures: int
    hpsv2: float | None = None
    lpips_diversity: float | None = None
    dinov2: float | None = None


def evaluate(
    folder: str | os.PathLike[str],
    *,
    hpsv2: str | os.PathLike[str] | None = None,
    lpips: str | os.PathLike[str] | None = None,
    dinov2: str | os.PathLike[str] | None = None,
    reference: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> Evaluation:
    """Score the pictures in a folder.

    The caption of `x.png` is in `x.txt` beside it, as training scripts have it. Where no picture has one, LPIPS takes
    all pictures as of one caption.

    Args:
        folder: PNG, JPEG or WebP files.
        hpsv2: Folder of a CLIP model of Hugging Face's form, such as HPSv2's; needs captions.
        lpips: AlexNet's weights (`features.0.weight`, ...), a safetensors file; LPIPS' own come with its package.
        dinov2: Folder of a DINOv2 model of Hugging Face's form; needs `reference`.
        reference: A folder of pictures of the same names, such as those of an adapter trained on the target.
        device: Where to compute.

    Raises:
        OptionError: Nothing is asked for, `dinov2` comes without `reference`, or the extra is not installed.
        FormatError: The folder has no picture, or weights are not what they should be.
        MismatchError: A caption, or a picture of the reference, is missing; LPIPS has pictures of two sizes to compare.
        FileError: The folder, a picture or a caption cannot be read (`open_picture`, `read_caption`).
    """
    if missing := [name for name in ("transformers", "lpips", "PIL") if find_spec(name) is None]:
        raise OptionError("scoring pictures needs more packages", f"no {missing[0]}", f"pip install {EXTRA}")
    if hpsv2 is None and lpips is None and (dinov2 is None or reference is None):
        fix = "give hpsv2, lpips, or dinov2 with a reference"
        raise OptionError("nothing to measure", "no weights", fix)
    paths = _pictures(Path(folder))
    with torch.inference_mode():
        return Evaluation(
            len(paths),
            None if hpsv2 is None else _hpsv2(paths, Path(hpsv2), device),
            None if lpips is None else _diversity(paths, Path(lpips), device),
            None if dinov2 is None or reference is None else _dinov2(paths, Path(reference), Path(dinov2), device),
        )


def _pictures(folder: Path) -> list[Path]:
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    except OSError as error:
        raise FileError("cannot read the folder of pictures", f"{folder}: {error}", "give a folder") from error
    if not paths:
        raise FormatError("no picture to score", str(folder), f"give a folder of {', '.join(sorted(ENDINGS))}")
    return paths


def _captions(paths: Sequence[Path], *, all_or_none: bool = False) -> list[str]:
    """Return the caption of each picture; empty ones where no picture has any, if that is allowed."""
    files = [path.with_suffix(".txt") for path in paths]
    there = [os.path.lexists(file) for file in files]
    if all_or_none and not any(there):
        return [""] * len(paths)
    if not all(there):
        missing = str(paths[there.index(False)])
        raise MismatchError("a picture has no caption", missing, "put it into a .txt file of the same name")
    return [read_caption(file) for file in files]


def _hpsv2(paths: Sequence[Path], weights: Path, device: str) -> float:
    from transformers import CLIPModel, CLIPProcessor

    captions = _captions(paths)
    model, processor = _loaded(CLIPModel, weights, device), _loaded(CLIPProcessor, weights)
    scores: list[Tensor] = []
    for texts, batch in zip(_batches(captions), _batches(paths), strict=True):
        given = processor(text=texts, return_tensors="pt", padding=True, truncation=True).to(device)
        out = model(**given, pixel_values=_prepared(processor, batch).to(device))
        scores.append(torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds))
    return float(torch.cat(scores).mean())


def _dinov2(paths: Sequence[Path], reference: Path, weights: Path, device: str) -> float:
    from transformers import AutoImageProcessor, Dinov2Model

    others = [reference / path.name for path in paths]
    if missing := [path for path in others if not path.is_file()]:
        fix = "draw the same prompts with both adapters"
        raise MismatchError("the reference lacks a picture", str(missing[0]), fix)
    model, processor = _loaded(Dinov2Model, weights, device), _loaded(AutoImageProcessor, weights)

    def features(batch: Sequence[Path]) -> Tensor:
        return model(_prepared(processor, batch).to(device)).pooler_output

    parts = zip(_batches(paths), _batches(others), strict=True)
    return float(torch.cat([torch.nn.functional.cosine_similarity(features(a), features(b)) for a, b in parts]).mean())


def _prepared(processor: Any, paths: Sequence[Path]) -> Tensor:
    """Return pictures as a model takes them, `[n, 3, h, w]`; one at a time is open."""
    return torch.cat([processor(images=open_picture(path), return_tensors="pt").pixel_values for path in paths])


def _diversity(paths: Sequence[Path], weights: Path, device: str) -> float:
    from lpips import LPIPS

    groups: dict[str, list[Path]] = {}
    for path, caption in zip(paths, _captions(paths, all_or_none=True), strict=True):
        groups.setdefault(caption, []).append(path)
    count = sum(comb(len(group), 2) for group in groups.values())
    if not count:
        raise MismatchError("diversity needs pictures of one caption", f"{len(paths)} captions", "draw two of each")
    for group in groups.values():
        _check_comparable(group)
    model = LPIPS(net="alex", pnet_rand=True, verbose=False).to(device)
    file = TensorFile(weights)
    for name, parameter in model.net.named_parameters():
        key = "features." + name.partition(".")[2]
        if key not in file.entries or file.entries[key].shape != tuple(parameter.shape):
            raise FormatError("not the weights of AlexNet", f"{weights} at {key}", "give those of torchvision")
        parameter.copy_(file.tensor(key))
    pairs = (pair for group in groups.values() for pair in combinations(group, 2))
    return sum(float(model(*(_pixels(path).to(device) for path in pair))) for pair in pairs) / count


def _check_comparable(paths: Sequence[Path]) -> None:
    """Raise unless LPIPS can compare the pictures pixel by pixel."""
    sizes = {path: open_picture(path).size for path in paths}
    first = paths[0]
    for path, (width, height) in sizes.items():
        if min(width, height) < SIDE:
            got = f"{path} has {width} x {height}"
            raise MismatchError("a picture that is too small for LPIPS", got, f"give {SIDE} x {SIDE} pixels or more")
        if sizes[path] != sizes[first]:
            got = f"{first} has {sizes[first][0]} x {sizes[first][1]}, {path} has {width} x {height}"
            raise MismatchError("pictures of one caption have two sizes", got, "draw them in one size")


def _loaded(kind: Any, folder: Path, device: str | None = None) -> Any:
    """Return a model (or its processor, without `device`) of a folder.

    Nothing is fetched, nothing unpickled, no code of the folder runs, and no weight stays at random.
    """
    what, fix = f"not a {kind.__name__} of Hugging Face's form", "give its folder, with safetensors weights"
    words = {} if device is None else {"use_safetensors": True, "output_loading_info": True}
    try:
        found = kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **words)
    except Exception as error:  # what a folder holds that is none raises anything
        raise FormatError(what, f"{folder}: {str(error).partition(chr(10))[0]}", fix) from error
    if device is None:
        return found
    model, loading = found
    if missing := sorted(map(str, loading["missing_keys"])):
        raise FormatError(what, f"{folder} has no {missing[0]}", fix)
    return model.eval().to(device)


def _pixels(path: Path) -> Tensor:
    """Return `[1, 3, h, w]` in -1 to 1."""
    picture = open_picture(path)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def _batches(values: Sequence[Item]) -> list[Sequence[Item]]:
    return [values[start : start + BATCH] for start in range(0, len(values), BATCH)]
