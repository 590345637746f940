"""Which forms of images are accepted, and how a variant gets its original's PIL mode, dtype, channels and device."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

_SHORTEST_EDGE = 1024  # pixels
_PIL_MODES = frozenset({"RGB", "RGBA", "RGBX", "L", "LA", "P", "CMYK", "YCbCr", "HSV", "LAB"})


def is_image(value: Any) -> bool:
    """PIL images, ``tv_tensors.Image`` and plain tensors of 3 or 4 dimensions (labels have fewer)."""
    if isinstance(value, Image.Image | tv_tensors.Image):
        return True
    return isinstance(value, torch.Tensor) and not isinstance(value, tv_tensors.TVTensor) and value.ndim in (3, 4)


def refuse_other_images(values: Sequence[Any], *, alone: bool = True) -> None:
    """Refuse image-like values in a form that is not supported, which would otherwise stay unchanged silently.

    Args:
        values: The members of a sample.
        alone: Whether the sample has no other image. If it has one, only NumPy pictures, as OpenCV and Albumentations make
            them, are refused: a plain tensor is then taken for a mask.

    Raises:
        TypeError: A NumPy array.
        ValueError: A grey tensor without its channel, or one of more than 4 dimensions.
    """
    for position, value in enumerate(values):
        shape = tuple(getattr(value, "shape", ()))
        if not isinstance(value, torch.Tensor) and hasattr(value, "__array_interface__") and len(shape) >= 2:
            if alone or (len(shape) == 3 and shape[-1] in (1, 3, 4)):
                raise TypeError(
                    f"a NumPy array of shape {shape} is not an image; convert it with v2.ToImage() or Image.fromarray first"
                )
        elif alone and type(value) is torch.Tensor and (position == 0 or value.dtype == torch.uint8):
            if len(shape) == 2 and min(shape) > 1:
                raise ValueError(f"a tensor of shape {shape} has no channels; pass (1, H, W), such as image[None]")
            if len(shape) > 4:
                raise ValueError(f"a tensor of shape {shape} has too many dimensions; pass (C, H, W) or (B, C, H, W)")


def check_form(image: Any) -> None:
    """Refuse images in a form that a variant cannot be converted to.

    Raises:
        TypeError: A dtype or PIL mode that is not an 8-bit or floating image.
        ValueError: A shape that is not ``(C, H, W)`` or ``(B, C, H, W)`` with 1 or 3 channels.
    """
    if isinstance(image, Image.Image):
        if image.mode not in _PIL_MODES:
            raise TypeError(f"a PIL image of mode {image.mode!r} has no 8-bit colours; convert it to 'RGB' first")
        return
    if image.ndim not in (3, 4) or image.shape[-3] not in (1, 3):
        raise ValueError(f"an image tensor has shape {tuple(image.shape)}; pass (C, H, W) or (B, C, H, W) with 1 or 3 channels")
    if image.layout is not torch.strided:
        raise TypeError(f"an image tensor has layout {image.layout}; pass a dense one, such as image.to_dense()")
    if not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise TypeError(f"an image tensor has dtype {image.dtype}; pass uint8 in [0, 255] or floats in [0, 1]")


def pil_like(variant: Image.Image, original: Image.Image) -> Image.Image:
    """The RGB variant in the original's mode and size; the original's alpha channel stays."""
    if variant.size != original.size:  # possible under a user's own key, which may ignore the size
        variant = variant.resize(original.size, Image.Resampling.BICUBIC)
    if original.mode == "RGB":
        return variant
    if original.mode in ("RGBA", "LA"):
        variant = variant.convert(original.mode)
        variant.putalpha(original.getchannel("A"))
        return variant
    return variant.convert(original.mode)


def tensor_like(variant: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """The variant, uint8 ``(3, H, W)``, as a plain tensor with the original's channels, size, dtype and device."""
    variant = variant.to(original.device)
    if variant.shape[1:] != original.shape[1:]:
        variant = F.resize(variant, list(original.shape[1:]), antialias=True)
    if original.shape[0] == 1:
        variant = F.rgb_to_grayscale(variant)
    if original.is_floating_point():
        variant = F.to_dtype(variant, original.dtype, scale=True)
    return variant.contiguous()


def to_pil(variant: torch.Tensor) -> Image.Image:
    """uint8 ``(3, H, W)`` to a PIL image."""
    return Image.fromarray(variant.permute(1, 2, 0).contiguous().cpu().numpy())


def shrunk(image: torch.Tensor) -> torch.Tensor:
    """Shrink a large photo ``(3, H, W)`` to a size that is still several times what captioners and CLIP models see.

    Those models also resize, but in floats and whole batches: 32 photos of 24 megapixels took 25 GB.
    """
    shortest = min(image.shape[1:])
    if shortest <= _SHORTEST_EDGE:
        return image
    small: torch.Tensor = F.resize(image, [round(side * _SHORTEST_EDGE / shortest) for side in image.shape[1:]], antialias=True)
    return small
