"""Images as data URIs, small enough for a page that holds hundreds of them."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

import torch
from PIL import Image

_PIXEL_ART = 64  # up to this side an image is embedded as it is, and enlarged without smoothing


class Picture(NamedTuple):
    """An embedded image.

    Args:
        src: data URI.
        pixels: whether it is so small that its pixels should show.
    """

    src: str
    pixels: bool


def embed(image: torch.Tensor, max_side: int) -> Picture:
    """A uint8 image ``(3, H, W)`` as a data URI: lossless if it is small, else scaled down to ``max_side`` pixels."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    out = io.BytesIO()
    if max(picture.size) <= min(_PIXEL_ART, max_side):
        picture.save(out, "PNG", optimize=True)
        return Picture(_uri("png", out), True)
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    picture.save(out, "WEBP", quality=82, method=4)
    return Picture(_uri("webp", out), False)


def _uri(kind: str, data: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
