"""Out of the stores: originals and their variants, with what is known of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import ImageError
from sgid_transforms.images.keys import to_uint8_chw
from sgid_transforms.images.reading import load_image
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.report.facts import NO_LABEL, ImageFacts, VariantFacts
from sgid_transforms.variants.store import VariantStore

Originals = str | os.PathLike[str] | Callable[[CaptionRecord], "Image.Image | torch.Tensor | None"]
"""Where originals are found: the folder that the records' relative paths start from, or a function of a record."""


@dataclass(frozen=True, eq=False)
class Row:
    """An original and its variants, as the stores have them.

    Args:
        facts: of the original, without its variants.
        image: the original, uint8 ``(3, H, W)``, if it was found.
        variants: facts and image of each; a rejected one has no image.
    """

    facts: ImageFacts
    image: torch.Tensor | None
    variants: tuple[tuple[VariantFacts, torch.Tensor | None], ...]


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads rows from the stores, as often as asked to: a report looks at all images, and shows some of them later.

    Args:
        captions: labels, captions and paths of the originals.
        variants: the variants.
        recipe: whose variants.
        originals: where originals are found.
    """

    captions: CaptionStore
    variants: VariantStore
    recipe: Recipe
    originals: Originals | None = None

    def names(self) -> dict[str, list[int]]:
        """The numbers of the variants and of the failures of every original that has any."""
        names: dict[str, set[int]] = {}
        for refs in (self.variants.iter(self.recipe), self.variants.iter_failures(self.recipe)):
            for ref in refs:
                names.setdefault(ref.key, set()).add(ref.variant)
        return {key: sorted(numbers) for key, numbers in names.items()}

    def rows(self, wanted: Mapping[str, Sequence[int]]) -> Iterator[Row]:
        """The rows of these originals, in their order; variants that turn out to be damaged are left out."""
        records = self.captions.get_many(wanted)
        for key, numbers in wanted.items():
            record = records.get(key)
            image = load_original(record, self.originals)
            found = [one for number in numbers if (one := self._variant(key, number)) is not None]
            if not found:
                continue
            label, caption = next(((label, caption) for _, _, label, caption in found if label), (None, None))
            facts = ImageFacts(
                key=key,
                label=(record.label if record else None) or label or NO_LABEL,
                caption=(record.caption if record else None) or caption or "",
                name="/".join(Path(record.path).parts[-2:]) if record and record.path else "",
                similarity=record.similarity if record else None,
                rank=record.rank if record else None,
                found=image is not None,
            )
            yield Row(facts, image, tuple((variant, pixels) for variant, pixels, _, _ in found))

    def _variant(self, key: str, number: int) -> tuple[VariantFacts, torch.Tensor | None, str | None, str | None] | None:
        """Facts, image, label and caption of a variant, or of a failure; ``None`` where there is neither any more."""
        variant = self.variants.get(self.recipe, key, number)
        if variant is None:
            reasons = self.variants.failure(self.recipe, key, number)
            return None if reasons is None else (VariantFacts(number, rejected=reasons or ("unknown",)), None, None, None)
        origin = variant.provenance
        facts = VariantFacts(
            number=number,
            prompt=origin.prompt,
            strength=origin.strength,
            guidance=origin.guidance_scale,
            attempt=origin.attempt,
            image_similarity=origin.image_similarity,
            label_probability=origin.label_score,
        )
        return facts, variant.image, origin.label, origin.caption


def load_original(record: CaptionRecord | None, originals: Originals | None) -> torch.Tensor | None:
    """The original of a record, uint8 ``(3, H, W)``; ``None`` if it cannot be found or read."""
    if record is None:
        return None
    if callable(originals):
        image = originals(record)
        return None if image is None else to_uint8_chw(image)
    if record.path is None:
        return None
    try:
        return to_uint8_chw(load_image(Path(originals or "", record.path)))
    except (ImageError, ValueError):  # a path with a NUL character is a ValueError
        return None
