"""What a user should know before a model runs on images that it was not made for."""

from collections.abc import Iterable
from typing import Final

TINY_LABELS: Final = frozenset(("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"))
TINY_SIZE: Final = 32


def tiny_note(labels: Iterable[str], sizes: Iterable[tuple[int, int]]) -> str | None:
    """One sentence when the bundled ``tiny`` meets labels or sizes that it was not trained on, else None.

    Args:
        labels: class names in words.
        sizes: ``(height, width)`` of the images.
    """
    strange = sorted({label for label in labels if label.lower() not in TINY_LABELS})
    largest = max(sizes, key=max, default=(0, 0))
    found = []
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        found.append(f"{strange[0]!r}{more}")
    if max(largest) > TINY_SIZE:
        found.append(f"images of up to {largest[1]} x {largest[0]} pixels")
    if not found:
        return None
    return (
        f"the bundled model 'tiny' knows the ten classes of CIFAR-10 at {TINY_SIZE} x {TINY_SIZE} pixels, and here are "
        f"{' and '.join(found)}: its variants show that the pipeline works, but will not help training; for real use take "
        "--model stabilityai/sd-turbo (fast), stable-diffusion-v1-5/stable-diffusion-v1-5, or stabilityai/sdxl-turbo"
    )


def turned_note(count: int) -> str | None:
    """What torchvision would do otherwise with images that their EXIF orientation turns."""
    if not count:
        return None
    images = "1 image is" if count == 1 else f"{count} images are"
    return (
        f"{images} turned upright by the EXIF orientation, which torchvision's ImageFolder ignores: train with "
        "ImageFolder(DATA, loader=sgid_transforms.images.load_image), or their variants are not found"
    )
