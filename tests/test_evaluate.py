"""Scores of pictures, against the formulas written out over the very models of transformers, torchvision and lpips."""

import json
from itertools import combinations

import lpips
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from lorax import FileError, FormatError, MismatchError, OptionError
from lorax.evaluate import evaluate

SIDE = 64


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two folders of five pictures of the same names, the first with captions, three of them equal."""
    folders = [tmp_path_factory.mktemp(name) for name in ("pictures", "reference")]
    for number in range(5):
        for seed, folder in enumerate(folders):
            noise = torch.randint(256, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(10 * seed + number))
            torchvision.transforms.functional.to_pil_image(noise.byte()).save(folder / f"{number}.png")
        (folders[0] / f"{number}.txt").write_text("a cat" if number < 3 else "a dog")
    return folders


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Models of the real classes, small, with random weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    words = {
        word: number for number, word in enumerate(["<|startoftext|>", "<|endoftext|>", "a</w>", "c", "a", "t</w>"])
    }
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small | {"vocab_size": 8}, vision_config=small | {"image_size": 32, "patch_size": 8}
    )
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPModel(config).save_pretrained(folder / "hpsv2")
    CLIPProcessor(images, tokenizer).save_pretrained(folder / "hpsv2")
    Dinov2Model(Dinov2Config(**small, image_size=32, patch_size=8)).save_pretrained(folder / "dinov2")
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "dinov2"
    )
    save_file(torchvision.models.AlexNet().state_dict(), folder / "alexnet.safetensors")
    return folder


def opened(folder):
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]


def test_hpsv2_is_the_cosine_of_picture_and_caption(pictures, weights):
    model, processor = (kind.from_pretrained(weights / "hpsv2") for kind in (CLIPModel, CLIPProcessor))
    scores = []
    for number, picture in enumerate(opened(pictures[0])):
        text = "a cat" if number < 3 else "a dog"
        with torch.no_grad():
            out = model(**processor(text=[text], images=picture, return_tensors="pt"))
            scores.append(float(out.logits_per_image / model.logit_scale.exp()))
    found = evaluate(pictures[0], hpsv2=weights / "hpsv2")
    assert found.hpsv2 == pytest.approx(sum(scores) / 5, abs=1e-5)
    assert (found.pictures, found.dinov2, found.lpips_diversity) == (5, None, None)


def test_dinov2_compares_pictures_of_one_name(pictures, weights):
    model, processor = (
        Dinov2Model.from_pretrained(weights / "dinov2"),
        BitImageProcessor.from_pretrained(weights / "dinov2"),
    )
    scores = []
    for pair in zip(*map(opened, pictures), strict=True):
        with torch.no_grad():
            a, b = (model(**processor(picture, return_tensors="pt")).last_hidden_state[0, 0] for picture in pair)
        scores.append(float(a @ b / a.norm() / b.norm()))
    found = evaluate(pictures[0], dinov2=weights / "dinov2", reference=pictures[1])
    assert found.dinov2 == pytest.approx(sum(scores) / 5, abs=1e-5)
    assert evaluate(pictures[0], dinov2=weights / "dinov2", reference=pictures[0]).dinov2 == pytest.approx(1, abs=1e-5)


def test_diversity_is_lpips_of_all_pairs_of_one_caption(pictures, weights):
    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    alexnet = torchvision.models.AlexNet()
    from safetensors.torch import load_file

    alexnet.load_state_dict(load_file(weights / "alexnet.safetensors"))
    for part in range(1, 6):
        for name, module in getattr(model.net, f"slice{part}").named_children():
            if isinstance(module, torch.nn.Conv2d):
                module.load_state_dict(alexnet.features[int(name)].state_dict())
    tensors = [torchvision.transforms.functional.to_tensor(picture)[None] * 2 - 1 for picture in opened(pictures[0])]
    pairs = [*combinations(range(3), 2), (3, 4)]
    with torch.no_grad():
        expected = sum(float(model(tensors[a], tensors[b])) for a, b in pairs) / len(pairs)
    assert evaluate(pictures[0], lpips=weights / "alexnet.safetensors").lpips_diversity == pytest.approx(
        expected, rel=1e-4
    )


def test_what_is_wrong_is_said(pictures, weights, tmp_path, run):
    with pytest.raises(OptionError, match="nothing to measure"):
        evaluate(pictures[0], dinov2=weights / "dinov2")
    with pytest.raises(FormatError, match="no picture"):
        evaluate(tmp_path, lpips=weights / "alexnet.safetensors")
    with pytest.raises(MismatchError, match="no caption"):
        evaluate(pictures[1], hpsv2=weights / "hpsv2")
    for given in ({"hpsv2": weights / "dinov2"}, {"dinov2": tmp_path, "reference": pictures[1]}):
        with pytest.raises(FormatError, match="Hugging Face"):
            evaluate(pictures[0], **given)
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="AlexNet"):
        evaluate(pictures[0], lpips=tmp_path / "a.safetensors")
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(MismatchError, match="lacks a picture"):
        evaluate(pictures[0], dinov2=weights / "dinov2", reference=tmp_path)
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(FileError, match="cannot read a picture"):
        evaluate(tmp_path, lpips=weights / "alexnet.safetensors")
    out, _ = run("evaluate", pictures[0], "--lpips", weights / "alexnet.safetensors", "--json")
    assert json.loads(out)["pictures"] == 5
    assert "pictures" in run("evaluate", pictures[0], "--lpips", weights / "alexnet.safetensors")[0]
