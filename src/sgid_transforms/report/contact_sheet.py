"""A contact sheet: each row shows an original and its variants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import to_pil_image

_MARGIN = 6
_INK, _PAPER, _EMPTY = (30, 30, 30), (255, 255, 255), (225, 225, 225)


def contact_sheet(
    rows: Sequence[Sequence[torch.Tensor | Image.Image | None]],
    *,
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    cell: int = 96,
) -> Image.Image:
    """Draw images of any sizes as a grid on white paper.

    Args:
        rows: images, row by row: uint8 tensors (3, H, W), PIL images, or ``None`` for an empty cell. Rows may differ in length.
        row_titles: a line of text above each row, truncated to fit; none or one for each row.
        column_titles: a line of text above each column; none or one for each column.
        cell: side of a cell in pixels. Images are fitted into it with their aspect ratio kept; smaller ones are enlarged
            by whole factors without smoothing, so that a 32-pixel image shows its true pixels.

    Returns:
        An RGB image.

    Raises:
        ValueError: there are no images, or the number of titles is wrong.
    """
    if not rows or not any(len(row) for row in rows):
        raise ValueError("a contact sheet needs at least one image, got none")
    columns = max(len(row) for row in rows)
    if len(row_titles) not in (0, len(rows)):
        raise ValueError(f"got {len(row_titles)} row titles for {len(rows)} rows; give none or one for each row")
    if len(column_titles) not in (0, columns):
        raise ValueError(f"got {len(column_titles)} column titles for {columns} columns; give none or one for each column")
    font = ImageFont.load_default(13)
    line = 20
    top = line if column_titles else 0
    row_height = cell + _MARGIN + (line if row_titles else 0)
    width = columns * (cell + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, top + len(rows) * row_height + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(column_titles):
        draw.text((_MARGIN + column * (cell + _MARGIN), 4), _cut(title, cell, font), _INK, font)
    for number, row in enumerate(rows):
        y = top + _MARGIN + number * row_height
        if row_titles:
            draw.text((_MARGIN, y), _cut(row_titles[number], width - 2 * _MARGIN, font), _INK, font)
            y += line
        for column in range(columns):
            x = _MARGIN + column * (cell + _MARGIN)
            image = row[column] if column < len(row) else None
            if image is None:
                if column < len(row):
                    draw.rectangle((x, y, x + cell - 1, y + cell - 1), _EMPTY)
                continue
            fitted = _fit(image, cell)
            sheet.paste(fitted, (x + (cell - fitted.width) // 2, y + (cell - fitted.height) // 2))
    return sheet


def _fit(image: torch.Tensor | Image.Image, cell: int) -> Image.Image:
    picture: Image.Image = to_pil_image(image) if isinstance(image, torch.Tensor) else image
    picture = picture.convert("RGB")
    longest = max(picture.size)
    if longest > cell:
        size = (max(1, round(picture.width * cell / longest)), max(1, round(picture.height * cell / longest)))
        return picture.resize(size, Image.Resampling.LANCZOS)
    factor = cell // longest
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
