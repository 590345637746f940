"""An image's key: a hash of what it shows, the same for every form in which Python code holds the image."""

import hashlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors


def image_key(image: Image.Image | torch.Tensor) -> str:
    """32 lowercase hex digits that name the picture: SHA-256 over its size and its RGB bytes, cut to 128 bits.

    The same picture has the same key as a PIL image of any mode that converts to RGB, as a uint8 tensor, as a float tensor
    (``uint8 / 255``), and as a ``tv_tensors.Image``. A grey image has the same key as its RGB form with three equal channels.
    Alpha is ignored: ``convert("RGB")``, and so ``ImageFolder``, drops it.

    Shape:
        ``(C, H, W)`` with C = 1 or 3 for tensors; uint8 in [0, 255] or floating in [0, 1]; any device.

    Raises:
        TypeError: for anything that is not one image of these types.
        ValueError: for an image of the wrong shape, without pixels, or with floats outside [0, 1].

    Examples:
        >>> image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        >>> image_key(image) == image_key(v2.functional.to_pil_image(image))
        True
    """
    if isinstance(image, Image.Image):
        rgb = _rgb(image)
        width, height = rgb.size
        pixels: Any = rgb.tobytes()
    else:
        planes = to_uint8_chw(image)
        _, height, width = planes.shape
        # In PIL's byte order: reordering 3 KB of a tensor is cheap, reordering PIL's bytes would slow down the common case.
        pixels = planes.cpu().permute(1, 2, 0).contiguous().numpy()
    # SHA-256 is what processors have instructions for: 2.5 us for 32x32 pixels, where BLAKE2b takes 4.2 us.
    digest = hashlib.sha256(b"%dx%d:" % (width, height))  # the size, or 2x8 and 4x4 of one colour would be the same picture
    digest.update(pixels)
    return digest.hexdigest()[:32]


def to_uint8_chw(image: Image.Image | torch.Tensor) -> torch.Tensor:
    """The image as a plain uint8 RGB tensor.

    A tensor stays on its device; a uint8 RGB tensor is returned unchanged, without a copy, so do not write into the result.
    Floats are rounded to the nearest of 256 levels.

    Shape:
        PIL image, or tensor ``(C, H, W)`` with C = 1 or 3 -> ``(3, H, W)`` in [0, 255].

    Raises:
        TypeError, ValueError: as `image_key`.
    """
    if isinstance(image, Image.Image):
        # NumPy reorders a photo's bytes three times as fast as torch does.
        return torch.from_numpy(np.array(np.asarray(_rgb(image)).transpose(2, 0, 1), order="C"))
    return _rgb_planes(_one_image(image))


def _rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB; returned unchanged if it already is."""
    if image.width == 0 or image.height == 0:
        raise ValueError(f"image of {image.width} x {image.height} pixels is empty; leave it out of the data set")
    if image.mode == "RGB":
        return image
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours as a direct conversion, which warns about the transparency
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"image of mode {image.mode!r} cannot be converted to RGB ({error}); convert it first") from error


def _one_image(image: object) -> torch.Tensor:
    """``image`` as a plain (C, H, W) tensor with C = 1 or 3, not empty."""
    if not isinstance(image, torch.Tensor):
        raise TypeError(
            f"expected a PIL image or a (C, H, W) tensor, got {type(image).__name__}; convert it with v2.ToImage() first"
        )
    if type(image) is not torch.Tensor:
        if isinstance(image, tv_tensors.TVTensor) and not isinstance(image, tv_tensors.Image):
            raise TypeError(f"expected an image, got a tv_tensors.{type(image).__name__}; only images have keys")
        image = image.as_subclass(torch.Tensor)  # operations on a sub-class cost several times as much
    shape = tuple(image.shape)
    if len(shape) != 3 or shape[0] not in (1, 3):
        hint = "pass the images of a batch one at a time" if len(shape) == 4 else "an image is (C, H, W) with 1 or 3 channels"
        raise ValueError(f"tensor of shape {shape} is not one RGB or grey image; {hint}")
    if not (shape[1] and shape[2]):
        raise ValueError(f"image of {shape[2]} x {shape[1]} pixels is empty; leave it out of the data set")
    return image


def _rgb_planes(image: torch.Tensor) -> torch.Tensor:
    """A (1 or 3, H, W) tensor of uint8 or floats as (3, H, W) uint8."""
    if image.is_floating_point():
        # Rounded in float32 for all types; even bfloat16, with its 8 bits, is off by less than half a level.
        levels = image.detach().to(torch.float32).mul(255).round_()
        low, high = (bound.item() for bound in torch.aminmax(levels))
        if not (low >= 0 and high <= 255):  # also catches NaN
            raise ValueError(
                f"float image has values from {low / 255:.4g} to {high / 255:.4g}, outside [0, 1]; "
                "take the image before Normalize, or scale it with v2.ToDtype(torch.float32, scale=True)"
            )
        image = levels.to(torch.uint8)
    elif image.dtype != torch.uint8:
        raise TypeError(f"tensor of dtype {image.dtype} is not an image; use uint8 in [0, 255] or floats in [0, 1]")
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image
