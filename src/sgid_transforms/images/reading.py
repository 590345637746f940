"""Read image files of any origin as upright RGB, or say in one sentence why not."""

import os
import stat
import struct
import warnings
from pathlib import Path
from typing import Final

from PIL import Image, ImageOps, UnidentifiedImageError

from sgid_transforms.errors import ImageError

EXTENSIONS: Final = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Extensions of image files: those of torchvision's ``ImageFolder``."""

FORMATS: Final = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
"""Formats that are decoded, whatever a file's extension; Pillow would otherwise try some forty formats on untrusted bytes."""

MAX_PIXELS: Final = 2**26
"""Maximum pixels of an image, 8192 x 8192: below Pillow's limit for decompression bombs, and the limit of a variant store."""

MAX_SIDE: Final = 16383
"""Longest side of an image in pixels: that of WebP, so that a variant of every image can be stored in every format."""

_ORIENTATION: Final = 0x0112  # the EXIF tag
_MODES: Final = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"})

_TOO_LARGE: Final = (
    f"it has more than {MAX_PIXELS:,} pixels, or a side of more than {MAX_SIDE:,}; scale it down, or leave it out"
)


def check_size(width: int, height: int) -> None:
    """Refuse a picture that is too large for a variant store.

    Raises:
        ImageError: It has more than ``MAX_PIXELS`` pixels, or a side longer than ``MAX_SIDE``.
    """
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageError(_TOO_LARGE)


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Load an image file as a person sees it: rotated by its EXIF orientation, in mode RGB, fully decoded.

    Pass it to torchvision as ``ImageFolder(root, loader=load_image)``: the default loader leaves phone photos lying on their
    side. Transparency is dropped and CMYK converted, as ``convert("RGB")`` does. Of an animation, the first frame is used.

    Raises:
        ImageError: the file cannot be read, is cut off, is not an image, or has more than ``MAX_PIXELS`` pixels or more than 8
            bits per channel. The message gives only the reason, without the path.
    """
    return read_image(path)[0]


def read_image(path: str | os.PathLike[str]) -> tuple[Image.Image, bool]:
    """Like `load_image`, but also returns whether the picture was turned."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block until somebody writes to it
            raise ImageError("it is not a plain file")
        if status.st_size == 0:
            raise ImageError("it is empty (0 bytes)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about broken EXIF and odd metadata; damaged pixels raise
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                check_size(*image.size)
                if image.mode not in _MODES or _is_deep(image):
                    raise ImageError(f"it has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
                image.load()
                turned = _orientation(image) in range(2, 9)
                return _rgb(ImageOps.exif_transpose(image) if turned else image), turned
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(_TOO_LARGE) from None
    except UnidentifiedImageError:
        raise ImageError(f"it is none of the images {', '.join(FORMATS)}, whatever its name says") from None
    except ImageError:
        raise
    except OSError as error:
        raise ImageError(_os_reason(error)) from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything: SyntaxError, struct.error, ...
        raise ImageError(f"it is damaged ({type(error).__name__}: {error})") from error


def is_image_name(path: Path) -> bool:
    """Whether ``ImageFolder`` takes the file for an image, by its extension."""
    return path.suffix.lower() in EXTENSIONS


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours as the direct way, which warns that it drops the transparency
    return image.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    """Whether a file has more than 8 bits per channel. Pillow's mode hides that for colours: it drops the rest, or worse."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(";16" in one or ";12" in one for one in arguments if isinstance(one, str)):
            return True
        if image.format == "PPM" and any(type(one) is int and one > 255 for one in arguments):  # the largest value
            return True
    return False


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (OSError, ValueError, TypeError, SyntaxError, struct.error, KeyError, IndexError):
        return 1  # unreadable EXIF turns nothing


def _os_reason(error: OSError) -> str:
    if error.errno is not None and error.strerror:
        return f"it cannot be read ({error.strerror})"
    if "truncated" in str(error):
        return f"it is cut off ({error})"
    return f"it is damaged ({error})"
