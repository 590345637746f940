import os

import numpy as np
import pytest
from PIL import Image

from image_folders import picture
from sgid_transforms.errors import ImageError
from sgid_transforms.images import reading as images
from sgid_transforms.images.keys import image_key
from sgid_transforms.images.reading import load_image, read_image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_ends_upright(tmp_path, orientation):
    """Pillow's own `exif_transpose` is the oracle."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(3, 40, 24).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    found, turned = read_image(tmp_path / "a.png")
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert turned == (orientation > 1)


@pytest.mark.parametrize(
    ("mode", "ending"), [("L", "png"), ("RGBA", "png"), ("LA", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg")]
)
def test_the_key_is_the_one_that_training_computes(tmp_path, mode, ending):
    """`ImageFolder`'s loader does `convert("RGB")`: without a turn, this loader must give the same pixels."""
    path = tmp_path / f"a.{ending}"
    picture(1, 30, 20, mode).save(path)
    with Image.open(path) as image:
        assert image_key(load_image(path)) == image_key(image.convert("RGB"))


def test_a_palette_with_transparency_gives_its_colours_without_a_warning(tmp_path):
    picture(1, 8, 8, "P").save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert load_image(tmp_path / "a.png").mode == "RGB"


def test_broken_exif_turns_nothing_and_loses_nothing(tmp_path):
    picture(2, 20, 10).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert load_image(tmp_path / "a.jpg").size == (20, 10)


def broken(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


def test_each_unreadable_file_has_its_reason(tmp_path, monkeypatch):
    picture(1, 64, 64).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    os.mkfifo(tmp_path / "pipe.jpg")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    reasons = {
        broken(tmp_path, "cut.png", good[: len(good) // 2]): "cut off",
        broken(tmp_path, "flipped.png", bytes(flipped)): "damaged",
        broken(tmp_path, "text.jpg", b"hello"): "none of the images",
        broken(tmp_path, "icon.png", b"GIF89a" + bytes(20)): "none of the images",
        broken(tmp_path, "empty.png", b""): "empty",
        tmp_path / "pipe.jpg": "not a plain file",
        tmp_path / "gone.jpg": "No such file",
        tmp_path: "not a plain file",
        tmp_path / "deep.png": "8 bits",
    }
    for path, word in reasons.items():
        with pytest.raises(ImageError, match=word):
            load_image(path)


@pytest.mark.parametrize("side", [9_460, 14_000])  # above the limit, where Pillow warns; above twice the limit, where it raises
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    """89 and 196 million black pixels take 90 and 200 KB as a PNG. Only the header is written here."""
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path = broken(tmp_path, "bomb.png", data + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    with pytest.raises(ImageError, match="safe to decode"):
        load_image(path)


def test_the_limit_is_pillows(tmp_path):
    assert images.MAX_PIXELS == Image.MAX_IMAGE_PIXELS
