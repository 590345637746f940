"""Image formats: what is lossless, what is refused, and that hostile headers cost no memory."""

import io
import resource
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sgid_transforms.errors import StoreError
from sgid_transforms.variants import IMAGE_FORMATS, codec
from sgid_transforms.variants.layout import DamagedFileError

LOSSLESS = ("png", "webp-lossless")


def _photo(height, width, seed=0):
    """A smooth image, as photographs are: lossy formats do badly on noise."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 3, width), indexing="ij")
    planes = [128 + 100 * torch.sin(x * (i + 1) + seed) * torch.cos(y + i) for i in range(3)]
    return torch.stack(planes).round().to(torch.uint8)


def _tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _psnr(a, b):
    return float(10 * torch.log10(255**2 / (a.float() - b.float()).pow(2).mean()))


@pytest.mark.parametrize("image_format", LOSSLESS)
@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_lossless_formats_return_the_same_pixels(image_format, height, width, seed):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    data, _ = codec.encode(image, image_format)
    assert torch.equal(_tensor(codec.decode(data)), image)


@pytest.mark.parametrize("image_format", ["webp", "jpeg"])
def test_lossy_formats_stay_close(image_format):
    image = _photo(96, 80)
    data, _ = codec.encode(image, image_format)
    assert _psnr(_tensor(codec.decode(data)), image) > 38
    assert len(data) < 96 * 80 * 3 / 4


@pytest.mark.parametrize(
    ("size", "start", "extension"),
    [((256, 256), b"\x89PNG", ".png"), ((8, 8192), b"\x89PNG", ".png"), ((256, 257), b"\xff\xd8\xff", ".jpg")],
)
def test_auto_is_png_up_to_256_pixels_square(size, start, extension):
    data, found = codec.encode(_photo(*size), "auto")
    assert data.startswith(start)
    assert found == extension


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_other_programs_open_the_files(image_format):
    image = _photo(48, 32)
    data, extension = codec.encode(image, image_format)
    expected = _tensor(codec.decode(data))
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format.lower()[:3] == {".jpg": "jpe"}.get(extension, extension[1:4])
        assert torch.equal(_tensor(np.array(picture.convert("RGB"))), expected)
    assert torch.equal(_tensor(np.array(codec.decode_pil(data))), expected)


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_bytes_after_the_image_do_not_matter(image_format):
    data, _ = codec.encode(_photo(20, 30), image_format)
    assert np.array_equal(codec.decode(data + b'{"prompt": "x"}' + bytes(44)), codec.decode(data))


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_decoded_pixels_are_the_callers_own(image_format):
    pixels = codec.decode(codec.encode(_photo(20, 30), image_format)[0])
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous
    assert pixels.dtype == np.uint8


def test_the_memory_layout_of_the_image_does_not_matter():
    image = _photo(20, 30)
    strided = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert codec.encode(strided, "png") == codec.encode(image, "png")


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(1, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, dtype=torch.uint8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 0, 8, dtype=torch.uint8),
        torch.zeros(3, 1, 20000, dtype=torch.uint8),
        np.zeros((8, 8, 3), np.uint8),
        None,
    ],
    ids=["float", "gray", "plane", "batch", "empty", "too-wide", "numpy", "none"],
)
def test_what_is_no_uint8_rgb_image_is_refused(image):
    with pytest.raises(StoreError, match="a variant"):
        codec.encode(image, "png")


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(StoreError, match="'bmp' is unknown; use one of auto, png, webp-lossless, webp, jpeg"):
        codec.encode(_photo(8, 8), "bmp")


def test_the_formats_are_those_that_a_recipe_accepts():
    from sgid_transforms.recipe import recipe

    assert set(recipe.IMAGE_FORMATS) == set(IMAGE_FORMATS)


def _saved(mode, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(_photo(16, 24).permute(1, 2, 0).numpy()).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        _saved("L", "PNG"),
        _saved("P", "PNG"),
        _saved("RGBA", "PNG"),
        _saved("1", "PNG"),
        _saved("RGB", "PNG", compress_level=9, optimize=True),
        _saved("L", "JPEG"),
        _saved("RGB", "JPEG", progressive=True),
        _saved("RGBA", "WEBP", lossless=True),
    ],
    ids=["gray", "palette", "alpha", "bits", "filtered", "gray-jpeg", "progressive", "alpha-webp"],
)
def test_images_made_by_other_programs_decode_to_rgb(data):
    assert codec.decode(data).shape == (16, 24, 3)


def test_a_png_with_filters_is_not_mistaken_for_our_own():
    image = _photo(33, 47)
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG", compress_level=0)
    assert torch.equal(_tensor(codec.decode(buffer.getvalue())), image)


def test_16_bit_pngs_are_reduced():
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(buffer, "PNG")
    assert codec.decode(buffer.getvalue()).shape == (4, 4, 3)


def _chunk(kind, payload):
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def _png(width, height, payload):
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", payload) + _chunk(b"IEND", b"")


BOMBS = {
    "png-size": _png(60_000, 60_000, zlib.compress(bytes(10_000_000), 9)),
    "png-no-pixels": _png(0, 8, zlib.compress(b"")),
    "png-too-little": _png(8, 8, zlib.compress(bytes(10))),
    "png-no-deflate": _png(8, 8, b"nonsense"),
    "jpeg-size": b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03" + bytes(50),
    "jpeg-no-header": b"\xff\xd8\xff\xda" + bytes(50),
    "jpeg-endless": b"\xff\xd8" + b"\xff" * 1000,
    "jpeg-zero-segments": b"\xff\xd8\xff\xe0\x00\x00" + bytes(50),
    "webp-size": b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6 + bytes(40),
    "webp-lossless-size": b"RIFF\x40\0\0\0WEBPVP8L\x20\0\0\0\x2f" + b"\xff" * 30,
    "webp-lossy": b"RIFF\x40\0\0\0WEBPVP8 \x20\0\0\0" + b"\xff" * 30,
    "webp-unknown": b"RIFF\x40\0\0\0WEBPEVIL" + bytes(40),
    "webp-cut": b"RIFF\x40\0\0\0WEBPVP8X",
    "png-cut": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\0\0",
    "gif": b"GIF89a" + bytes(100),
    "pickle": b"\x80\x04\x95" + bytes(100),
    "empty": b"",
}


@pytest.mark.parametrize("decode", [codec.decode, codec.decode_pil])
@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_and_nonsense_are_refused_without_much_memory(data, decode):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DamagedFileError):
        decode(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # KiB; the smallest bomb promises 10 GB


def test_more_data_than_pixels_is_not_unpacked():
    data = _png(8, 8, zlib.compress(bytes(80_000_000), 9))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not codec.decode(data).any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000
