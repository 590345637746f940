"""From an image's own size to the size that a model works at, and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sgid_transforms.errors import RecipeError

_MAX_ASPECT = 4.0  # beyond it, models that know only near-square images repeat themselves


def check_resolution(resolution: int | tuple[int, int], multiple: int) -> None:
    """Raise `RecipeError` unless a model whose sizes are multiples of ``multiple`` can work at ``resolution``."""
    if isinstance(resolution, tuple):
        if len(resolution) != 2 or any(side < multiple or side % multiple for side in resolution):
            raise RecipeError(f"resolution {resolution} cannot be used; give height and width as multiples of {multiple}")
    elif resolution < multiple:
        raise RecipeError(f"resolution {resolution} is too small for this model; use at least {multiple}")


def working_size(height: int, width: int, resolution: int | tuple[int, int], multiple: int) -> tuple[int, int]:
    """Height and width at which a model sees an image.

    A pair is taken as it is. A single number stands for an area, ``resolution ** 2``: the image keeps its aspect ratio
    (clipped to 1:4 and 4:1), rounded to multiples of ``multiple``, so that images fall into few buckets and those of one
    bucket share a batch.
    """
    if isinstance(resolution, tuple):
        return resolution
    aspect = min(max(height / width, 1 / _MAX_ASPECT), _MAX_ASPECT)
    sides = (resolution * math.sqrt(aspect), resolution / math.sqrt(aspect))
    rows, columns = (max(round(side / multiple), 1) * multiple for side in sides)
    return rows, columns


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Float images ``(B, 3, H, W)`` in [0, 1] at another size (antialiased bicubic, clipped); the same object at its own."""
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [0, 1] as uint8, rounded to the nearest level."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)
