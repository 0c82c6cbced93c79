"""What judges the pictures: a small convolutional network that learnt vendor and caption, apart from all else.

It stands in for the published measures, which need weights of their own: style for HPSv2, the distance of pictures
of one prompt for LPIPS diversity, the features of its last layer for DINOv2.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from lorax.train import train

from . import DEVICE, MODELS, weights
from .data import STYLES, load

EPOCHS, BATCH = 10, 64


@dataclass(frozen=True, slots=True)
class Measures:
    """Of pictures, two of each prompt.

    Attributes:
        style: Mean probability that a picture has the style.
        prompt: Mean cosine similarity between the caption's sentence and what is read from the picture.
        diversity: Mean distance of the two pictures of a prompt: 0 for equal ones.
        feature: Mean cosine similarity to the pictures that the adapter trained on the target draws of the same noise.
    """

    style: float
    prompt: float
    diversity: float
    feature: float


class Scorer(nn.Module):
    """Style (one of STYLES) and sentence `[384]` of pictures `[b, 3, side, side]`."""

    def __init__(self) -> None:
        super().__init__()

        def level(n: int, m: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(n, m, 3, 2, 1), nn.GroupNorm(8, m), nn.SiLU())

        self.levels = nn.ModuleList([level(3, 32), level(32, 64), level(64, 128)])
        self.last = nn.Sequential(nn.Flatten(), nn.Linear(128 * (MODELS.pixels // 8) ** 2, 256), nn.SiLU())
        self.style, self.sentence = nn.Linear(256, len(STYLES)), nn.Linear(256, 384)

    def features(self, pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the features of each level and those of the last layer."""
        x, levels = pictures, []
        for level in self.levels:
            x = level(x)
            levels.append(x)
        return levels, self.last(x)

    @torch.no_grad()
    def measure(self, pictures: Tensor, sentences: Tensor, style: str, reference: Tensor | None) -> Measures:
        """Measure pictures: the first half of them, and the second of the same prompts from other noise."""
        levels, last = self.features(pictures)
        probability = self.style(last).softmax(1)[:, STYLES.index(style)]
        read = nn.functional.cosine_similarity(self.sentence(last), sentences)
        apart = sum(_distance(*level.chunk(2)) for level in levels) / len(levels)
        like = float("nan")
        if reference is not None:
            like = float(nn.functional.cosine_similarity(last, self.features(reference)[1]).mean())
        return Measures(float(probability.mean()), float(read.mean()), float(apart), like)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared distance of features normalised at each place, as LPIPS has it (arXiv 1801.03924)."""
    return (nn.functional.normalize(a, dim=1) - nn.functional.normalize(b, dim=1)).square().sum(1).mean()


def scorer() -> Scorer:
    """Return the judge; trained on the first call."""
    model = Scorer().to(DEVICE)
    model.load_state_dict(weights("scorer", lambda: _trained().state_dict()))
    return model.eval()


def _trained() -> Scorer:
    torch.manual_seed(1 + MODELS.seed)
    model, data = Scorer().to(DEVICE), load()
    pictures = torch.cat([data.pictures[style] for style in STYLES])
    styles = torch.arange(len(STYLES), device=DEVICE).repeat_interleave(len(data.captions))
    sentences = data.sentences.repeat(len(STYLES), 1)

    def loss(call: int) -> Tensor:
        chosen = torch.randint(len(pictures), (BATCH,))
        # Shifts and noise, so that what diffusion models get a little wrong does not count.
        shifted = torch.roll(pictures[chosen], tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
        last = model.features(shifted + 0.1 * torch.rand(1, device=DEVICE) * torch.randn_like(shifted))[1]
        told = nn.functional.cosine_similarity(model.sentence(last), sentences[chosen])
        return nn.functional.cross_entropy(model.style(last), styles[chosen]) + (1 - told).mean()

    train(model, loss, EPOCHS * len(pictures) // BATCH, learning_rate=1e-3, seed=1 + MODELS.seed)
    return model.eval()


def plain(measures: Measures) -> dict[str, float]:
    """Return them as plain data, rounded."""
    return {name: round(value, 5) for name, value in asdict(measures).items()}
