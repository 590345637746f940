"""Under which key the variants of an image are stored: everything that decides their pixels beside the recipe."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.generation.filters import needs_clip
from sgid_transforms.recipe.guidance import SimilarityGuidance, guidance_scale
from sgid_transforms.recipe.prompts import parse_template
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.variants.layout import variant_key
from sgid_transforms.variants.provenance import Provenance
from sgid_transforms.variants.store import VariantRef, VariantStore

_T = TypeVar("_T")


class CurrentVariant(NamedTuple):
    """A stored variant, the key of its image, and whether training finds it: None where its record does not tell."""

    ref: VariantRef
    image_key: str
    is_current: bool | None


def batched(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Lists of up to ``size`` items."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


class Address:
    """The keys of a recipe's variants, image by image.

    A key holds what the image's record contributes to the pixels: label and caption where the prompt template names them, the
    guidance scale, and the scorer where it had a say. Change one of them, and the old variants are not found any more.

    Args:
        recipe: What is generated.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        named = {name for _, name in parse_template(recipe.prompt)}
        checked = recipe.filters.label_check != "none"
        self.needs_label = "label" in named or checked
        self._captioned = "caption" in named
        self._scored = isinstance(recipe.guidance, SimilarityGuidance) or needs_clip(recipe.filters)

    def key(self, record: CaptionRecord, label: str | None = None) -> str | None:
        """The key of the variants of a record's image, or None where their prompt needs a label and there is none.

        Args:
            record: What is known about the image.
            label: Its class name in words, for a record without one.
        """
        label = record.label or label
        if self.needs_label and not label:
            return None
        return variant_key(
            record.key,
            label if self.needs_label else None,
            record.caption if self._captioned else None,
            guidance_scale(self.recipe.guidance, record.rank),
            record.scorer if self._scored else None,
        )

    def find(self, variants: VariantStore, record: CaptionRecord, key: str, variant: int, *, pil: bool) -> Any | None:
        """A stored variant as a PIL image or a uint8 tensor ``(3, H, W)``, or None.

        Stores of version 0.1 knew nothing of texts in their keys. Such a variant is found by its image's key alone, and taken
        where its provenance says that it was made under this very label, caption and guidance scale.
        """
        found: Any = (variants.get_pil if pil else variants.get_image)(self.recipe, key, variant)
        if found is not None or not variants.may_have_old_keys(self.recipe):
            return found
        old = variants.get(self.recipe, record.key, variant)
        if old is None or not self._made_under(record, old.provenance):
            return None
        return variants.get_pil(self.recipe, record.key, variant) if pil else old.image

    def exists(self, variants: VariantStore, record: CaptionRecord, key: str, variant: int) -> bool:
        """Whether `find` would find a variant, mostly without reading it."""
        if variants.contains(self.recipe, key, variant):
            return True
        old = variants.may_have_old_keys(self.recipe) and variants.contains(self.recipe, record.key, variant)
        return old and self.find(variants, record, key, variant, pil=False) is not None

    def current(self, variants: VariantStore, captions: CaptionStore, *, failures: bool = False) -> Iterator[CurrentVariant]:
        """All stored variants of the recipe, or all remembered failures, each with whether training would still find it.

        A variant is out of date when its image's caption, label, guidance or scorer has changed since.
        """
        refs = variants.iter_failures(self.recipe) if failures else variants.iter(self.recipe)
        old = variants.may_have_old_keys(self.recipe)
        for chunk in batched(refs, 500):
            records = captions.get_many({key for ref in chunk for key in (ref.image_key, *((ref.key,) if old else ())) if key})
            for ref in chunk:
                record = records.get(ref.image_key)
                if record is not None:
                    key = self.key(record)
                    yield CurrentVariant(ref, ref.image_key, None if key is None else key == ref.key)
                elif old and (record := records.get(ref.key)) is not None:
                    found = None if failures else variants.get(self.recipe, ref.key, ref.variant)
                    yield CurrentVariant(ref, ref.key, found is not None and self._made_under(record, found.provenance))
                else:
                    yield CurrentVariant(ref, ref.image_key, None)

    def _made_under(self, record: CaptionRecord, made: Provenance) -> bool:
        same_text = made.label == record.label and (not self._captioned or made.caption == record.caption)
        return same_text and made.guidance_scale == guidance_scale(self.recipe.guidance, record.rank)
