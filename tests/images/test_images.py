import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from image_folders import picture
from sgid_transforms.errors import ImageError
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
    with pytest.raises(ImageError, match="more than 67,108,864 pixels"):
        load_image(path)


@pytest.mark.parametrize("size", [(16384, 1), (1, 17000), (8193, 8193)])
def test_what_no_store_could_hold_is_refused_at_once(tmp_path, size):
    """One picture of 17,000 pixels in width passed the reader, and ended the whole job at the store, at every rerun."""
    Image.new("1", size).save(tmp_path / "wide.png")
    with pytest.raises(ImageError, match="a side of more than 16,383; scale it down"):
        load_image(tmp_path / "wide.png")


def _png16(path, colour, channels):
    rows = np.full((4, 4, channels), 200, ">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 4, 16, colour, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_pngs_of_16_bits_are_refused_whatever_pillows_mode_says(tmp_path, colour, channels):
    """Pillow says "RGB", and dark pictures came out black."""
    _png16(tmp_path / "deep.png", colour, channels)
    with pytest.raises(ImageError, match="more than 8 bits a channel"):
        load_image(tmp_path / "deep.png")


@pytest.mark.parametrize(("magic", "channels"), [(b"P5", 1), (b"P6", 3)])
def test_pnms_of_16_bits_are_refused_and_those_of_8_are_read(tmp_path, magic, channels):
    (tmp_path / "deep.ppm").write_bytes(magic + b" 2 2 65535\n" + bytes(8 * channels))
    with pytest.raises(ImageError, match="more than 8 bits a channel"):
        load_image(tmp_path / "deep.ppm")
    (tmp_path / "usual.ppm").write_bytes(magic + b" 2 2 255\n" + bytes(4 * channels))
    assert load_image(tmp_path / "usual.ppm").size == (2, 2)
