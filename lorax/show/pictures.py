"""Pictures of a similarity, of a transfer and of a training. Needs Pillow, which ComfyUI ships."""

import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..compare.scores import ScoreTable
from ..compare.similarity import Similarity
from ..errors import printable
from ..transfer.report import ARRIVED, TransferReport

INK, FAINT, PAPER, EMPTY = (30, 30, 30), (150, 150, 150), (255, 255, 255), (225, 225, 225)
ARRIVED_INK, LOST_INK = (33, 145, 140), (204, 102, 51)
# Nine points of matplotlib's viridis: even in lightness, and readable for colour-blind people.
VIRIDIS = np.array(
    [
        (68, 1, 84),
        (72, 40, 120),
        (62, 74, 137),
        (49, 104, 142),
        (38, 130, 142),
        (31, 158, 137),
        (53, 183, 121),
        (144, 215, 67),
        (253, 231, 37),
    ],
    dtype=np.float64,
)


def colours(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the colour `[..., 3]` of each value: viridis from 0 to 1, light grey where there is none (NaN)."""
    place = np.clip(np.nan_to_num(values), 0, 1) * (len(VIRIDIS) - 1)
    steps = np.arange(len(VIRIDIS))
    mixed = np.stack([np.interp(place, steps, VIRIDIS[:, channel]) for channel in range(3)], axis=-1)
    return np.where(np.isnan(values)[..., None], EMPTY, mixed.round()).astype(np.uint8)


def similarity_picture(similarity: Similarity) -> Image.Image:
    """Draw a heat map of corrected values for each kind of layer and side: source layers down, target layers across."""
    side, gap, left, top, columns = 150, 44, 20, 64, 4
    panels = [
        (f"{kind.kind.split(':')[1]} {name}", scores)
        for kind in similarity.kinds
        for name, scores in (("out", kind.left), ("in", kind.right))
    ]
    rows = math.ceil(len(panels) / columns)
    size = (left * 2 + columns * (side + gap) - gap, top + rows * (side + gap) + 50)
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    rank = "full rank" if similarity.rank is None else f"rank {similarity.rank}"
    _text(draw, (left, 10), f"Subspace similarity, {rank}, chance taken off", 17)
    _text(draw, (left, 34), f"down: {_short(similarity.source)}   across: {_short(similarity.target)}", 13, FAINT)
    for i, (title, scores) in enumerate(panels):
        x, y = left + i % columns * (side + gap), top + i // columns * (side + gap) + 20
        _text(draw, (x, y - 18), title, 13)
        image.paste(_heat_map(scores, side), (x, y))
    x, y = left, size[1] - 40
    ramp = colours(np.tile(np.linspace(0, 1, 240), (12, 1)))
    image.paste(Image.fromarray(ramp), (x, y))
    _text(draw, (x, y + 14), "0: chance", 12)
    _text(draw, (x + 240, y + 14), "1: equal", 12, anchor="ra")
    draw.rectangle((x + 280, y, x + 292, y + 12), fill=EMPTY)
    _text(draw, (x + 298, y - 2), "other size, no value", 12)
    return image


def retained_picture(report: TransferReport) -> Image.Image:
    """Draw what each layer kept of its update: a bar for each row of the report, in the order of the source."""
    bar, height, left, top = max(2, min(12, 1200 // max(1, len(report.rows)))), 220, 60, 64
    plot = max(bar * len(report.rows), 420)
    image = Image.new("RGB", (left + plot + 20, top + height + 74), PAPER)
    draw = ImageDraw.Draw(image)
    total = f"{report.retained_norm:.0%}" if math.isfinite(report.retained_norm) else "nothing"
    _text(draw, (20, 10), f"{_short(report.adapter)}: {total} of the update's norm arrives", 17)
    _text(draw, (20, 34), f"{_short(report.source)} to {_short(report.target)}, method {report.method}", 13, FAINT)
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = top + height - round(share * height)
        draw.line((left, y, left + plot, y), fill=EMPTY)
        _text(draw, (left - 8, y), f"{share:.0%}", 12, anchor="rm")
    stage, free = "", left
    for i, row in enumerate(report.rows):
        x = left + i * bar
        kept = min(row.retained_norm, 1) if math.isfinite(row.retained_norm) else 0
        ink = ARRIVED_INK if row.outcome in ARRIVED else LOST_INK
        tall = round(kept * height) if row.outcome in ARRIVED else height // 40
        draw.rectangle((x, top + height - tall, x + bar - 1, top + height), fill=ink)
        now = re.sub(r"^unet\.(\w+?(_blocks\.\d+|_block)?)\..*|^(\w+)\..*", r"\1\3", row.source)
        if now != stage:
            stage = now
            draw.line((x, top + height, x, top + height + 6), fill=INK)
            if x >= free:
                _text(draw, (x, top + height + 8), now, 11)
                free = x + 8 + round(draw.textlength(printable(now), ImageFont.load_default(11)))
    y = top + height + 46
    for x, ink, words in ((left, ARRIVED_INK, "kept by the layer"), (left + 180, LOST_INK, "no update")):
        draw.rectangle((x, y, x + 12, y + 12), fill=ink)
        _text(draw, (x + 18, y - 1), words, 12)
    return image


def loss_picture(losses: Sequence[float]) -> Image.Image:
    """Draw the loss of each step: faint as it is, and its running mean over a twentieth of the steps."""
    width, height, left, top = 640, 260, 70, 50
    image = Image.new("RGB", (left + width + 20, top + height + 40), PAPER)
    draw = ImageDraw.Draw(image)
    values = np.asarray(losses, dtype=np.float64)
    span = max(1, len(values) // 20)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - span, 0)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    low, high = float(values.min()), float(values.max())
    room = (high - low) or 1.0
    _text(draw, (20, 10), f"Loss {means[-1]:.4g} after {len(values)} steps", 17)
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = top + height - round(share * height)
        draw.line((left, y, left + width, y), fill=EMPTY)
        _text(draw, (left - 8, y), f"{low + share * room:.3g}", 12, anchor="rm")
        step = 1 + round(share * (len(values) - 1))
        _text(draw, (left + round(share * width), top + height + 8), str(step), 12, anchor="ma")
    for line, ink, thick in ((values, FAINT, 1), (means, ARRIVED_INK, 3)):
        xs = left + np.arange(len(line)) / max(1, len(line) - 1) * width
        ys = top + height - (line - low) / room * height
        points = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
        draw.line(points if len(points) > 1 else points * 2, fill=ink, width=thick, joint="curve")
    return image


def _heat_map(scores: ScoreTable, side: int) -> Image.Image:
    values = scores.corrected
    image = Image.fromarray(colours(values))
    grow = side / max(values.shape)
    size = (max(1, round(values.shape[1] * grow)), max(1, round(values.shape[0] * grow)))
    return image.resize(size, Image.Resampling.NEAREST if grow >= 1 else Image.Resampling.BOX)


def _text(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    words: str,
    size: int,
    ink: tuple[int, int, int] = INK,
    anchor: str = "la",
) -> None:
    draw.text(place, printable(words), font=ImageFont.load_default(size), fill=ink, anchor=anchor)


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:18]}...{name[-18:]}"
