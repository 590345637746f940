"""Pixels to image-file bytes and back, in the formats that a recipe can name.

Decoding is the hot path of training. The measurements behind ``"auto"`` are in ``docs/stores.md``. The size in a file's header
is checked before memory is allocated.
"""

import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from sgid_transforms.errors import StoreError
from sgid_transforms.images.reading import MAX_PIXELS, MAX_SIDE
from sgid_transforms.variants.layout import DamagedFileError

IMAGE_FORMATS = ("auto", "png", "webp-lossless", "webp", "jpeg")
Pixels = npt.NDArray[np.uint8]

_EXTENSION = {"png": ".png", "webp-lossless": ".webp", "webp": ".webp", "jpeg": ".jpg"}
_LARGEST_AUTO_PNG = 256 * 256
_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_PNG_RGB8 = b"\x08\x02\x00\x00\x00"
_TWO_LONGS = struct.Struct(">II")
_LONG = struct.Struct(">I")


def encode(image: torch.Tensor, image_format: str = "auto") -> tuple[bytes, str]:
    """Encode a uint8 image.

    Args:
        image: A uint8 tensor (3, H, W), RGB.
        image_format: ``"png"`` (lossless, not compressed: the fastest to read), ``"webp-lossless"`` (lossless, small),
            ``"webp"`` (quality 95), ``"jpeg"`` (quality 92, 4:2:0), or ``"auto"``: PNG up to 256 x 256 pixels, JPEG above.

    Returns:
        The file's bytes and its extension.

    Raises:
        StoreError: Wrong dtype, shape or format.
    """
    if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        what = f"{image.dtype} of shape {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
        raise StoreError(f"a variant must be a uint8 tensor of shape (3, H, W), not {what}")
    height, width = image.shape[1:]
    if not 0 < height * width <= MAX_PIXELS or max(height, width) > MAX_SIDE:
        raise StoreError(
            f"a variant of {width} x {height} pixels cannot be stored; the limits are {MAX_PIXELS:,}, and {MAX_SIDE:,} per side"
        )
    planes = image.detach().cpu().contiguous().numpy()
    kind = image_format
    if kind == "auto":
        kind = "png" if height * width <= _LARGEST_AUTO_PNG else "jpeg"
    if kind not in _EXTENSION:
        raise StoreError(f"image format {kind!r} is unknown; use one of {', '.join(IMAGE_FORMATS)}")
    if kind == "png":
        return _encode_png(planes), _EXTENSION[kind]
    buffer = io.BytesIO()
    # Pillow takes four bytes per pixel, so avoid a further copy.
    picture = Image.merge("RGB", [Image.frombuffer("L", (width, height), plane, "raw", "L", 0, 1) for plane in planes])
    if kind == "webp-lossless":
        picture.save(buffer, "WEBP", lossless=True, quality=50, method=2)
    elif kind == "webp":
        picture.save(buffer, "WEBP", quality=95, method=4)
    else:
        picture.save(buffer, "JPEG", quality=92, subsampling="4:2:0")
    return buffer.getvalue(), _EXTENSION[kind]


def decode(data: bytes | memoryview) -> Pixels:
    """Decode a PNG, JPEG or WebP file to uint8 pixels of shape (H, W, 3), RGB, writable and contiguous.

    Bytes after the image's own end are ignored.

    Raises:
        DamagedFileError: Not an image of these formats, too many pixels, or damaged.
    """
    stored = _unpack_stored_png(data)
    if stored is None:
        return np.array(_decode_with_pillow(data))
    raw, height, width = stored
    return np.frombuffer(raw, np.uint8).reshape(height, 1 + 3 * width)[:, 1:].copy().reshape(height, width, 3)


def decode_pil(data: bytes | memoryview) -> Image.Image:
    """Like `decode`, but returns an RGB PIL image."""
    stored = _unpack_stored_png(data)
    if stored is None:
        return _decode_with_pillow(data)
    raw, height, width = stored
    return Image.frombytes("RGB", (width, height), memoryview(raw)[1:], "raw", "RGB", 1 + 3 * width, 1)


def _chunk(kind: bytes, payload: bytes) -> bytes:
    return _LONG.pack(len(payload)) + kind + payload + _LONG.pack(zlib.crc32(kind + payload))


def _encode_png(planes: Pixels) -> bytes:
    """A PNG with filter 0 and stored (level 0) deflate blocks: reading it is a plain copy."""
    _, height, width = planes.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)
    rows[:, 1:].reshape(height, width, 3)[:] = planes.transpose(1, 2, 0)
    header = _chunk(b"IHDR", _TWO_LONGS.pack(width, height) + _PNG_RGB8)
    return _PNG_START[:8] + header + _chunk(b"IDAT", zlib.compress(rows.tobytes(), 0)) + _chunk(b"IEND", b"")


def _unpack_stored_png(data: bytes | memoryview) -> tuple[bytes, int, int] | None:
    """Rows, height and width of what ``_encode_png`` wrote; ``None`` for any other file.

    Each row is a zero (the filter) and its pixels. This is five times as fast as a PNG library at 32 x 32. The checksums inside
    are not verified: that would double the time, and the store has already verified a stronger one.
    """
    if data[24:29] != _PNG_RGB8 or data[37:41] != b"IDAT" or data[: len(_PNG_START)] != _PNG_START:
        return None
    width, height = _TWO_LONGS.unpack_from(data, 16)
    _check_size(width, height)
    size = height * (1 + 3 * width)
    end = 41 + _LONG.unpack_from(data, 33)[0]
    try:
        # The length limit stops a decompression bomb; the extra byte shows whether there is more data than expected.
        raw = zlib.decompressobj(-15).decompress(memoryview(data)[43:end], size + 1)
    except zlib.error as error:
        raise DamagedFileError(f"the PNG data cannot be unpacked ({error})") from None
    if len(raw) != size or any(raw[:: 1 + 3 * width]):
        return None
    return raw, height, width


def _decode_with_pillow(data: bytes | memoryview) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:  # reads only the header
            _check_size(picture.width, picture.height)
            if picture.mode == "RGB":
                picture.load()
                return picture
            return picture.convert("RGB")
    except DamagedFileError:
        raise
    except Exception as error:  # Pillow's plug-ins raise almost anything on hostile bytes
        raise DamagedFileError(f"the image cannot be decoded ({type(error).__name__})") from None


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise DamagedFileError(f"the header promises {width} x {height} pixels")
