"""Images: their keys, their files, and the samples of data sets that hold them."""

from sgid_transforms.images.keys import image_key
from sgid_transforms.images.reading import load_image

__all__ = ["image_key", "load_image"]
