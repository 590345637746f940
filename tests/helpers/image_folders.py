"""A data set as users have them: sizes from 24 to 600 pixels, odd colour modes, turned photos, and files that are broken."""

from pathlib import Path

import numpy as np
from PIL import Image

BROKEN = {"cut_off.jpg": "cut off", "letter.jpg": "none of the images", "nothing.png": "empty", "deep.tif": "8 bits"}
"""What `own_folder` puts beside good images -> a word of the reason why it is left out."""

GOOD = 9
"""Different pictures in `own_folder`."""


def picture(seed: int, width: int = 24, height: int = 24, mode: str = "RGB") -> Image.Image:
    """A smooth random picture, so that JPEG keeps it small."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def own_folder(root: Path) -> Path:
    """Two classes of good images of every kind with broken files among them, and one empty class folder."""
    cat, dog = root / "tabby_cat", root / "dog" / "puppies"
    for folder in (cat, dog, root / "empty_class"):
        folder.mkdir(parents=True)
    picture(0).save(cat / "small.png")
    picture(1, 600, 400).save(cat / "large.JPG")
    picture(2, 60, 90, "L").save(cat / "grey.jpg")
    picture(3, 64, 64, "RGBA").save(cat / "rgba.png")
    picture(4, 48, 32, "CMYK").save(dog / "cmyk.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(5, 90, 60).save(dog / "turned.jpg", exif=turned)
    picture(6, 33, 47, "P").save(dog / "palette.png")
    picture(7, 32, 32).save(dog / "webp.webp")
    picture(8, 25, 31, "1").save(dog / "bits.png")
    picture(0).save(cat / "again.png")  # a duplicate of small.png
    whole = (cat / "large.JPG").read_bytes()
    (cat / "cut_off.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (cat / "letter.jpg").write_text("Dear reader, I am no image.")
    (dog / "nothing.png").touch()
    Image.fromarray(np.zeros((24, 24), np.uint16)).save(dog / "deep.tif")
    (dog / "readme.txt").write_text("not an image, and not named as one")
    return root


def plain_folder(root: Path, images: int, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Small PNGs, `images` of them in each class."""
    for number, name in enumerate(classes):
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(images):
            picture(1000 * number + index).save(folder / f"{index}.png")
    return root
