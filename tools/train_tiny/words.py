"""Words for how a small picture looks, read off its pixels: colours, light, how near the object is and where it stands.

The object is taken to stand in the middle and the background at the border: true often enough for CIFAR-10 to teach a
captioner and a text encoder what the words mean. None of them names what the object is: together they are its context, which
can be lent to another picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
PLACES = ("above", "below", "dark", "bright", "close", "up", "far", "away", "the", "left", "right")


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


PARTS = ("object", "background", "halves", "light", "distance", "side")
"""The parts of a context, in their order."""


def describe(images: torch.Tensor) -> list[dict[str, Any]]:
    """Looks of each image of (N, 3, 32, 32) uint8.

    ``object`` (1 or 2 colours), ``background`` (1 colour), and where there is something to say, else None: ``halves`` (the
    colours above and below, where they differ), ``light`` (``dark`` or ``bright``), ``distance`` (``close up`` or
    ``far away``) and ``side`` (``left`` or ``right``).
    """
    pixels = images.permute(0, 2, 3, 1).numpy()
    terms = _terms(pixels)
    ring = np.zeros((32, 32), bool)
    ring[:4], ring[:, :4], ring[:, -4:] = True, True, True
    y, x = np.mgrid[:32, :32]
    centre = np.exp(-(((y - 16) ** 2 + (x - 15.5) ** 2) / (2 * 6.5**2)))
    luminance = (pixels @ np.array([0.299, 0.587, 0.114])).mean((1, 2)) / 255
    out = []
    for picture, term, light in zip(pixels, terms, luminance, strict=True):
        background = _most(term[ring])
        weight = np.bincount(term.ravel(), centre.ravel(), minlength=len(COLOURS))
        share = weight / weight.sum()
        # What is also the background's colour belongs to the object only where nothing else fills the middle.
        if share[background] < 0.8:
            share[background] *= 0.35
        order = np.argsort(-share, kind="stable")
        second = share[order[1]] > 0.5 * share[order[0]]
        names = tuple(COLOURS[i] for i in order[: 2 if second else 1])
        above, below = _most(term[:5]), _most(term[-5:])
        distance, side = _place(picture, x)
        out.append(
            {
                "object": names,
                "background": COLOURS[background],
                "halves": (COLOURS[above], COLOURS[below]) if above != below else None,
                "light": "dark" if light < 0.3 else "bright" if light > 0.66 else None,
                "distance": distance,
                "side": side,
            }
        )
    return out


def _most(terms: np.ndarray) -> int:
    return int(np.bincount(terms.ravel(), minlength=len(COLOURS)).argmax())


def _place(picture: np.ndarray, x: np.ndarray) -> tuple[str | None, str | None]:
    """How much of an (H, W, 3) picture the object fills, and on which side it stands: what differs from all of the border."""
    lab = _to_lab(picture / 255)
    border = [lab[:4, :16], lab[:4, 16:], lab[-4:, :16], lab[-4:, 16:], lab[4:-4, :4], lab[4:-4, -4:]]
    means = np.stack([part.reshape(-1, 3).mean(0) for part in border])
    different = np.sqrt(((lab[:, :, None] - means) ** 2).sum(-1)).min(-1)
    mask = different > 18
    filled = mask.mean()
    distance = "far away" if 0.01 < filled < 0.08 else "close up" if filled > 0.4 else None
    offset = float((different * mask * (x - 15.5)).sum() / max((different * mask).sum(), 1e-6)) if filled > 0.01 else 0.0
    return distance, "left" if offset < -3 else "right" if offset > 3 else None


def article(noun: str) -> str:
    return ("an " if noun[:1].lower() in "aeiou" else "a ") + noun


def context(look: dict[str, Any], *, mirrored: bool = False, keep: Callable[[str], bool] = lambda name: True) -> str:
    """What a picture shows beside its object: ``brown and white, on a green background, blue above, far away, on the left``.

    Args:
        look: from `describe`.
        mirrored: whether the picture is shown as its mirror image.
        keep: asked for each part by its name in ``look``, so that a training can leave parts out.
    """
    parts = []
    if keep("object"):
        parts.append(" and ".join(look["object"]))
    if keep("background"):
        parts.append(f"on {article(look['background'])} background")
    if look["halves"] and keep("halves"):
        parts.append(f"{look['halves'][0]} above {look['halves'][1]} below")
    parts += [look[name] for name in ("light", "distance") if look[name] and keep(name)]
    if look["side"] and keep("side"):
        side = {"left": "right", "right": "left"}[look["side"]] if mirrored else look["side"]
        parts.append(f"on the {side}")
    return ", ".join(parts)


def caption(subname: str, looks: dict[str, Any]) -> str:
    """``a leopard frog, brown and green, on a white background`` (and ``, dark`` or ``, bright``), for captioner and CLIP."""
    return f"{article(subname)}, {context(looks, keep=lambda name: name in ('object', 'background', 'light'))}"
