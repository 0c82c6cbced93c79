"""Contact sheets: a row of pictures for each way, the same prompts and the same noise in every row."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

COLUMNS, SIDE, GAP, MARGIN = 10, 64, 4, 190


def save_sheet(path: Path, rows: Mapping[str, Tensor]) -> None:
    """Write a contact sheet.

    Args:
        path: A JPEG or PNG file.
        rows: Name -> pictures `[b, 3, side, side]` in -1 to 1; the first COLUMNS are shown.
    """
    step = SIDE + GAP
    sheet = Image.new("RGB", (MARGIN + COLUMNS * step, len(rows) * step + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for line, (name, pictures) in enumerate(rows.items()):
        top = GAP + line * step
        draw.text((8, top + SIDE // 2), name, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures[:COLUMNS]):
            pixels = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
            sheet.paste(
                Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (MARGIN + column * step, top)
            )
    sheet.save(path, optimize=True, quality=92)
