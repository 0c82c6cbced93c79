"""Scoring pictures as the field does, with weights that the user has: HPSv2, LPIPS diversity, DINOv2 similarity.

These are the measures of LoRA-X (arXiv 2501.16559, tables 1 to 4). Nothing is downloaded, and only safetensors weights
are read. Needs the extra `evaluate`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import FileError, FormatError, MismatchError, OptionError
from .tensorfile import TensorFile

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
BATCH = 16
EXTRA = "'comfyui-lora-x[evaluate]'"


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

    The caption of `x.png` is in `x.txt` beside it, as training scripts have it; without any, LPIPS takes all pictures
    as of one caption.

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
        MismatchError: A caption, or a picture of the reference, is missing.
        FileError: A picture cannot be read.
    """
    if missing := [name for name in ("transformers", "lpips", "PIL") if find_spec(name) is None]:
        raise OptionError("scoring pictures needs more packages", f"no {missing[0]}", f"pip install {EXTRA}")
    if hpsv2 is None and lpips is None and (dinov2 is None or reference is None):
        fix = "give hpsv2, lpips, or dinov2 with a reference"
        raise OptionError("nothing to measure", "no weights", fix)
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in PICTURES)
    if not paths:
        raise FormatError("no picture to score", str(folder), f"give a folder of {', '.join(sorted(PICTURES))}")
    captions = {path: path.with_suffix(".txt") for path in paths}
    told = {path: text.read_text(encoding="utf-8").strip() for path, text in captions.items() if text.is_file()}
    with torch.inference_mode():
        return Evaluation(
            len(paths),
            None if hpsv2 is None else _hpsv2(paths, told, Path(hpsv2), device),
            None if lpips is None else _diversity(paths, told, Path(lpips), device),
            None if dinov2 is None or reference is None else _dinov2(paths, Path(reference), Path(dinov2), device),
        )


def _hpsv2(paths: Sequence[Path], captions: dict[Path, str], weights: Path, device: str) -> float:
    from transformers import CLIPModel, CLIPProcessor

    if missing := [path for path in paths if path not in captions]:
        raise MismatchError("a picture has no caption", str(missing[0]), "put it into a .txt file of the same name")
    model, processor = _loaded(CLIPModel, weights, device), _loaded(CLIPProcessor, weights)
    scores: list[Tensor] = []
    for batch in _batches(paths):
        texts = [captions[path] for path in batch]
        pictures = [_opened(path) for path in batch]
        given = processor(text=texts, images=pictures, return_tensors="pt", padding=True, truncation=True)
        out = model(**given.to(device))
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
        given = processor(images=[_opened(path) for path in batch], return_tensors="pt").to(device)
        return model(**given).pooler_output

    parts = zip(_batches(paths), _batches(others), strict=True)
    return float(torch.cat([torch.nn.functional.cosine_similarity(features(a), features(b)) for a, b in parts]).mean())


def _diversity(paths: Sequence[Path], captions: dict[Path, str], weights: Path, device: str) -> float:
    from lpips import LPIPS

    model = LPIPS(net="alex", pnet_rand=True, verbose=False).to(device)
    file = TensorFile(weights)
    for name, parameter in model.net.named_parameters():
        key = "features." + name.partition(".")[2]
        if key not in file.entries or file.entries[key].shape != tuple(parameter.shape):
            raise FormatError("not the weights of AlexNet", f"{weights} at {key}", "give those of torchvision")
        parameter.copy_(file.tensor(key))
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(captions.get(path, ""), []).append(path)
    pairs = [pair for group in groups.values() for pair in combinations(group, 2)]
    if not pairs:
        raise MismatchError("diversity needs pictures of one caption", f"{len(paths)} captions", "draw two of each")
    return sum(float(model(*(_pixels(path).to(device) for path in pair))) for pair in pairs) / len(pairs)


def _loaded(kind: Any, folder: Path, device: str | None = None) -> Any:
    """Return a model (or its processor, without `device`) of a folder; nothing is fetched and nothing unpickled."""
    words = {} if device is None else {"use_safetensors": True}
    try:
        found = kind.from_pretrained(str(folder), local_files_only=True, **words)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        what = f"not a {kind.__name__} of Hugging Face's form"
        raise FormatError(what, f"{folder}: {reason}", "give its folder, with safetensors weights") from error
    return found if device is None else found.eval().to(device)


def _opened(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise FileError("cannot read a picture", f"{path}: {error}", "take it out of the folder") from error


def _pixels(path: Path) -> Tensor:
    """Return `[1, 3, h, w]` in -1 to 1."""
    picture = _opened(path)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def _batches(paths: Sequence[Path]) -> list[Sequence[Path]]:
    return [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
