"""Words for how a small picture looks, read off its pixels: colours of object and background, light or dark.

The object is taken to stand in the middle and the background at the border: true often enough for CIFAR-10 to teach a
captioner and a text encoder what the colour words mean.
"""

from __future__ import annotations

import numpy as np
import torch

# sRGB prototypes of the basic colour terms; several per term where one point does not cover it.
_PROTOTYPES: list[tuple[str, tuple[int, int, int]]] = [
    ("black", (15, 15, 15)), ("black", (38, 36, 36)),
    ("gray", (85, 85, 85)), ("gray", (130, 130, 130)), ("gray", (175, 175, 175)),
    ("white", (215, 215, 215)), ("white", (250, 250, 250)),
    ("red", (200, 30, 35)), ("red", (140, 25, 30)), ("red", (190, 75, 65)),
    ("orange", (230, 130, 40)), ("orange", (205, 105, 55)),
    ("yellow", (235, 215, 60)), ("yellow", (190, 170, 60)),
    ("green", (50, 130, 50)), ("green", (90, 120, 60)), ("green", (35, 65, 35)), ("green", (140, 175, 95)),
    ("blue", (40, 70, 170)), ("blue", (95, 145, 205)), ("blue", (160, 195, 235)), ("blue", (35, 50, 85)),
    ("brown", (110, 75, 45)), ("brown", (70, 50, 35)), ("brown", (150, 110, 75)),
    ("beige", (200, 175, 140)), ("beige", (175, 155, 130)), ("beige", (225, 205, 180)),
    ("pink", (225, 150, 165)), ("purple", (120, 70, 140)),
]  # fmt: skip
COLOURS = tuple(dict.fromkeys(name for name, _ in _PROTOTYPES))


def _to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1], (..., 3), to CIE Lab (D65)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    xyz = xyz / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


_LAB = _to_lab(np.array([rgb for _, rgb in _PROTOTYPES], dtype=np.float64) / 255)
_TERM = np.array([COLOURS.index(name) for name, _ in _PROTOTYPES])
_TABLE: np.ndarray | None = None


def _terms(images: np.ndarray) -> np.ndarray:
    """Colour term of every pixel: (N, H, W, 3) uint8 -> (N, H, W) index into ``COLOURS``, by a 32^3 table."""
    global _TABLE
    if _TABLE is None:
        axis = (np.arange(32) * 8 + 4) / 255
        grid = _to_lab(np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)).reshape(-1, 3)
        # Lightness counts for less than hue, as it does in how people name colours.
        scale = np.array([0.7, 1.0, 1.0])
        distance = (((grid[:, None] - _LAB[None]) * scale) ** 2).sum(-1)
        _TABLE = _TERM[distance.argmin(1)].reshape(32, 32, 32)
    q = images >> 3
    return _TABLE[q[..., 0], q[..., 1], q[..., 2]]


def describe(images: torch.Tensor) -> list[dict[str, str | tuple[str, ...] | None]]:
    """Looks of each image of (N, 3, 32, 32) uint8: ``object`` (1 or 2 colours), ``background`` (1), ``light`` (or None)."""
    pixels = images.permute(0, 2, 3, 1).numpy()
    terms = _terms(pixels)
    ring = np.zeros((32, 32), bool)
    ring[:4], ring[:, :4], ring[:, -4:] = True, True, True
    y, x = np.mgrid[:32, :32]
    centre = np.exp(-(((y - 16) ** 2 + (x - 15.5) ** 2) / (2 * 6.5**2)))
    luminance = (pixels @ np.array([0.299, 0.587, 0.114])).mean((1, 2)) / 255
    out = []
    for term, light in zip(terms, luminance, strict=True):
        background = int(np.bincount(term[ring], minlength=len(COLOURS)).argmax())
        weight = np.bincount(term.ravel(), centre.ravel(), minlength=len(COLOURS))
        share = weight / weight.sum()
        # What is also the background's colour belongs to the object only where nothing else fills the middle.
        if share[background] < 0.8:
            share[background] *= 0.35
        order = np.argsort(-share, kind="stable")
        second = share[order[1]] > 0.5 * share[order[0]]
        names = tuple(COLOURS[i] for i in order[: 2 if second else 1])
        out.append(
            {
                "object": names,
                "background": COLOURS[background],
                "light": "dark" if light < 0.3 else "bright" if light > 0.66 else None,
            }
        )
    return out


def article(noun: str) -> str:
    return ("an " if noun[:1].lower() in "aeiou" else "a ") + noun


def caption(subname: str, looks: dict) -> str:
    """``a leopard frog, brown and green, on a white background`` (and ``, dark`` or ``, bright``)."""
    text = f"{article(subname)}, {' and '.join(looks['object'])}, on {article(looks['background'])} background"
    return text + (f", {looks['light']}" if looks["light"] else "")
