"""Stores with known content, and a scorer whose answers can be worked out by hand."""

import torch
from PIL import Image
from torch.nn import functional as F

from sgid_transforms.building.address import Address
from sgid_transforms.captions import CaptionRecord, CaptionStore
from sgid_transforms.images.keys import image_key
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.variants import VariantStore
from sgid_transforms.variants.provenance import Provenance

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}


class ColourScorer:
    """An honest, tiny stand-in for CLIP: an image's embedding is its mean colour, a text's the colours that it names."""

    id = "colours"

    def image_features(self, images):
        return F.normalize(torch.stack([image.float().mean((1, 2)) + 1e-3 for image in images]), dim=1)

    def text_features(self, texts):
        named = [[COLOURS[name] for name in COLOURS if name in text] or [(1.0, 1.0, 1.0)] for text in texts]
        return F.normalize(torch.stack([torch.tensor(colours).sum(0) for colours in named]), dim=1)

    def probabilities(self, image_features, labels):
        return (10 * image_features @ self.text_features(labels).T).softmax(1)


def plain(red, green, blue, size=8):
    """An image of one colour."""
    return torch.tensor([red, green, blue], dtype=torch.uint8).view(3, 1, 1).expand(3, size, size)


def near(label, number, strength):
    """The label's colour, mixed with the next one by the strength; every number makes another image."""
    names = list(COLOURS)
    start, end = (torch.tensor(COLOURS[names[(names.index(label) + step) % 3]]) for step in (0, 1))
    colour = (200 * (start * (1 - strength) + end * strength) + 5 + number).to(torch.uint8)
    return colour.view(3, 1, 1).expand(3, 8, 8)


def make_stores(
    root, recipe=None, labels=("red", "green", "blue"), per_class=3, strengths=(0.1, 0.3, 0.9), caption="a {} field"
):
    """Originals as PNG files below ``root/data``; the variant of strength 0.9 has lost its label; one is rejected per class."""
    recipe = recipe or Recipe(caption_from="own")
    captions, variants = CaptionStore(root / "captions.sqlite"), VariantStore(root / "variants", fsync=False)
    for label in labels:
        for number in range(per_class):
            path = root / "data" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            original = near(label, number, 0.0)
            Image.fromarray(original.permute(1, 2, 0).contiguous().numpy()).save(path)
            key = image_key(original)
            text = caption.format(label)
            record = CaptionRecord(key, text, label, similarity=0.3, rank=0.5, path=f"{label}/{number}.png")
            captions.put(record)
            place = Address(recipe, captions).key(record, 0)
            for variant, strength in enumerate(strengths):
                origin = Provenance(
                    f"a photo of a {label}, {text}", strength=strength, guidance_scale=4.0, label=label, caption=text
                )
                variants.put(recipe, place, variant, near(label, number, strength), origin)
            if number == 0:
                variants.put_failure(recipe, place, len(strengths), ("label", "label", "nan"))
    return captions, variants, recipe
