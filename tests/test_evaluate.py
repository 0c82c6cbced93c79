"""Scores of pictures, against the formulas written out over the very models of transformers, torchvision and lpips."""

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from itertools import combinations

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lorax import FileError, FormatError, MismatchError, OptionError
from lorax.evaluate import evaluate
from tests.commands import FORBIDDEN, ROOT, RUN

pytestmark = pytest.mark.slow  # each loads models

lpips = pytest.importorskip("lpips")
torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

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
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=small | {"vocab_size": 8}, vision_config=small | {"image_size": 32, "patch_size": 8}
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPModel(config).save_pretrained(folder / "hpsv2")
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder / "hpsv2")
    transformers.Dinov2Model(transformers.Dinov2Config(**small, image_size=32, patch_size=8)).save_pretrained(
        folder / "dinov2"
    )
    transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "dinov2"
    )
    save_file(torchvision.models.AlexNet().state_dict(), folder / "alexnet.safetensors")
    return folder


def opened(folder):
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]


def test_hpsv2_is_the_cosine_of_picture_and_caption(pictures, weights):
    model, processor = (
        kind.from_pretrained(weights / "hpsv2") for kind in (transformers.CLIPModel, transformers.CLIPProcessor)
    )
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
        transformers.Dinov2Model.from_pretrained(weights / "dinov2"),
        transformers.BitImageProcessor.from_pretrained(weights / "dinov2"),
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


@pytest.fixture
def alexnet(weights):
    return {"lpips": weights / "alexnet.safetensors"}


def drawn(folder, **sizes):
    """Fill a folder with pictures of a name and a size."""
    for name, size in sizes.items():
        Image.effect_noise(size, 50).convert("RGB").save(folder / f"{name}.png")


def test_pictures_that_lpips_cannot_compare(weights, alexnet, tmp_path):
    drawn(tmp_path, a=(64, 64), b=(64, 48))
    with pytest.raises(MismatchError, match=r"two sizes: .*a\.png has 64 x 64, .*b\.png has 64 x 48"):
        evaluate(tmp_path, **alexnet)
    drawn(tmp_path, a=(1, 1), b=(1, 1))
    with pytest.raises(MismatchError, match=r"too small for LPIPS: .*a\.png has 1 x 1"):
        evaluate(tmp_path, **alexnet)
    assert evaluate(tmp_path, dinov2=weights / "dinov2", reference=tmp_path).dinov2 == pytest.approx(1, abs=1e-5)
    drawn(tmp_path, a=(31, 40), b=(31, 40))
    assert evaluate(tmp_path, **alexnet).lpips_diversity > 0
    drawn(tmp_path, a=(30, 40), b=(30, 40))
    with pytest.raises(MismatchError, match="too small"):
        evaluate(tmp_path, **alexnet)


def test_captions_that_are_not_what_they_should_be(weights, alexnet, tmp_path):
    drawn(tmp_path, a=(64, 64), b=(64, 64))
    (tmp_path / "a.txt").write_text("a cat")
    for measure in (alexnet, {"hpsv2": weights / "hpsv2"}):
        with pytest.raises(MismatchError, match=r"no caption: .*b\.png"):
            evaluate(tmp_path, **measure)
        (tmp_path / "b.txt").write_bytes("ébahi".encode("cp1252"))
        with pytest.raises(FileError, match=r"b\.txt.*UTF-8"):
            evaluate(tmp_path, **measure)
        (tmp_path / "b.txt").unlink()
        (tmp_path / "b.txt").symlink_to("nowhere")
        with pytest.raises(FileError, match=r"no regular file: .*b\.txt"):
            evaluate(tmp_path, **measure)
        (tmp_path / "b.txt").unlink()
    assert evaluate(tmp_path, dinov2=weights / "dinov2", reference=tmp_path).pictures == 2


def test_a_folder_that_is_none(alexnet, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "nowhere"):
        with pytest.raises(FileError, match="cannot read the folder"):
            evaluate(tmp_path / name, **alexnet)
    (tmp_path / "x.png").mkdir()
    with pytest.raises(MismatchError, match="one caption"):
        evaluate(tmp_path, **alexnet)
    (tmp_path / "y.png").mkdir()
    with pytest.raises(FileError, match=r"no regular file: .*x\.png"):
        evaluate(tmp_path, **alexnet)


def test_no_weight_stays_at_random(pictures, weights, tmp_path):
    shutil.copytree(weights / "dinov2", tmp_path / "half")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    del tensors[next(key for key in sorted(tensors) if key.startswith("encoder.layer.0.") and "weight" in key)]
    save_file(tensors, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"half has no encoder\.layer\.0\."):
        evaluate(pictures[0], dinov2=tmp_path / "half", reference=pictures[1])


BROKEN = ["[]", "{}", '{"model_type": 5, "hidden_size": "x"}', "[" * 10_000]


@pytest.mark.parametrize("text", BROKEN)
@pytest.mark.parametrize("kind", ["hpsv2", "dinov2"])
def test_a_configuration_that_is_none(pictures, weights, tmp_path, kind, text):
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        if not (weights / kind / name).is_file():
            continue
        folder = tmp_path / name
        shutil.copytree(weights / kind, folder)
        (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        with suppress(FormatError):  # some of it has defaults
            evaluate(pictures[0], **{kind: folder}, reference=pictures[1])


def test_no_network_no_pickle_no_other_program_and_no_code_of_a_folder(pictures, weights, tmp_path):
    """The command under a hook of the interpreter that ends it at the first forbidden thing."""
    folder = tmp_path / "code"
    shutil.copytree(weights / "dinov2", folder)
    for name in ("config.json", "preprocessor_config.json"):
        held = json.loads((folder / name).read_text())
        mapped = {"AutoImageProcessor": "own.Own", "AutoModel": "own.Own", "AutoConfig": "own.Own"}
        (folder / name).write_text(json.dumps(held | {"auto_map": mapped, "image_processor_type": "Own"}))
    (folder / "own.py").write_text("import os\nos.system('true')\n")
    shutil.copytree(pictures[0], tmp_path / "evil")
    (tmp_path / "evil" / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n%%EOF\n")
    every = ["--hpsv2", weights / "hpsv2", "--lpips", weights / "alexnet.safetensors", "--dinov2", weights / "dinov2"]
    commands = [
        (0, "evaluate", pictures[0], *every, "--reference", pictures[1]),
        (1, "evaluate", pictures[0], "--dinov2", folder, "--reference", pictures[1]),
        *((1, "evaluate", tmp_path / "evil", *every[i : i + 2], "--reference", pictures[1]) for i in (0, 2, 4)),
    ]
    words = json.dumps([[status, [*map(str, words)]] for status, *words in commands])
    code = "import transformers, lpips, torchvision, regex" + FORBIDDEN + RUN
    done = subprocess.run([sys.executable, "-c", code, words], input="y\n", capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("=== ") == len(commands)
    assert done.stderr.count("cannot read a picture") == 3


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
