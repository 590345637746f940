"""The key under which an image's variants are stored: it covers everything besides the recipe that decides their pixels."""

import bisect
import itertools
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from sgid_transforms.captions.agreement import place
from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import MissingCaptionError
from sgid_transforms.generation.filters import needs_clip
from sgid_transforms.recipe.guidance import SimilarityGuidance, context_draw, guidance_scale
from sgid_transforms.recipe.prompts import context_of, parse_template
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.variants.layout import variant_key
from sgid_transforms.variants.provenance import Provenance
from sgid_transforms.variants.store import VariantRef, VariantStore

_T = TypeVar("_T")


class CurrentVariant(NamedTuple):
    """A stored variant, the key of its image, and whether training finds it: None if its record does not tell."""

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

    A key covers what the image's record contributes to the pixels: label and caption if the prompt template names them, the
    guidance scale, and the scorer if it was used. When one of them changes, the old variants are no longer found.

    Args:
        recipe: What is generated.
        captions: Where the contexts of other images come from (``Recipe.caption_from``).
    """

    def __init__(self, recipe: Recipe, captions: CaptionStore) -> None:
        self.recipe = recipe
        self._captions = captions
        self._lenders: dict[str | None, _Lenders] = {}
        named = {name for _, name in parse_template(recipe.prompt)}
        checked = recipe.filters.label_check != "none"
        self.needs_label = "label" in named or checked
        self._captioned = "caption" in named
        self._scored = isinstance(recipe.guidance, SimilarityGuidance) or needs_clip(recipe.filters)

    def caption(self, record: CaptionRecord, variant: int) -> tuple[str, str]:
        """The caption for the prompt of one variant of a record's image, and the key of the image that it was written for.

        With ``caption_from="class"`` or ``"dataset"``, it is the context of another image, drawn by the recipe's fingerprint,
        the image's key and the variant's number. Images of a class without contexts keep their own captions.

        Raises:
            MissingCaptionError: The recipe draws from contexts, and the caption store has none.
        """
        recipe = self.recipe
        if recipe.caption_from != "own" and self._captioned:
            lenders = self._lenders_of(record.label if recipe.caption_from == "class" else None)
            if lenders is not None:
                return lenders.at(context_draw(recipe.fingerprint, record.key, variant, recipe.seed))
        if record.contradiction is None or recipe.on_contradiction == "keep":
            return record.caption, record.key
        return context_of(record.caption) if recipe.on_contradiction == "context" else "", record.key

    def _lenders_of(self, label: str | None) -> "_Lenders | None":
        """The lenders of one class, or of all classes for None."""
        if not self._lenders:  # read once; read again while there are none
            rows = self._captions.contexts()
            if not rows:
                raise MissingCaptionError(
                    f"caption_from={self.recipe.caption_from!r} takes its captions from the contexts of other images, and "
                    f"{self._captions.path} has none; call sgid.prepare(dataset) (or `sgid caption`) first"
                )
            labels = {row[1] for row in rows if row[1] is not None}
            self._lenders = {name: _Lenders([row for row in rows if row[1] == name]) for name in labels}
            self._lenders[None] = _Lenders(rows)
        return self._lenders.get(label)

    def key(self, record: CaptionRecord, variant: int, label: str | None = None) -> str | None:
        """The key of one variant of a record's image, or None if its prompt needs a label and there is none.

        Args:
            record: What is known about the image.
            variant: Number of the variant.
            label: The image's class name in words, for a record without one.

        Raises:
            MissingCaptionError: See `caption`.
        """
        label = record.prompt_label or label
        if self.needs_label and not label:
            return None
        return variant_key(
            record.key,
            label if self.needs_label else None,
            self.caption(record, variant)[0] if self._captioned else None,
            guidance_scale(self.recipe.guidance, record.rank),
            record.scorer if self._scored else None,
        )

    def numbers(
        self, record: CaptionRecord, count: int, rejected: Collection[tuple[str, int]], label: str | None = None
    ) -> Iterator[int]:
        """The first ``count`` numbers of an image's variants that nobody rejected.

        Args:
            record: What is known about the image.
            count: How many.
            rejected: (key, number) of its rejected variants, as `VariantStore.rejections` has them.
            label: As for `key`.
        """
        left = (number for number in itertools.count() if (self.key(record, number, label), number) not in rejected)
        return itertools.islice(left, count)

    def find(self, variants: VariantStore, record: CaptionRecord, key: str, variant: int, *, pil: bool) -> Any | None:
        """A stored variant as a PIL image or a uint8 tensor ``(3, H, W)``, or None.

        Stores of version 0.1 have no text in their keys. Such a variant is found by its image's key alone, and is used if its
        provenance has the same label, caption and guidance scale.
        """
        found: Any = (variants.get_pil if pil else variants.get_image)(self.recipe, key, variant)
        if found is not None or not variants.may_have_old_keys(self.recipe):
            return found
        old = variants.get(self.recipe, record.key, variant)
        if old is None or not self._made_under(record, variant, old.provenance):
            return None
        return variants.get_pil(self.recipe, record.key, variant) if pil else old.image

    def exists(self, variants: VariantStore, record: CaptionRecord, key: str, variant: int) -> bool:
        """Whether `find` would find a variant, mostly without reading it."""
        if variants.contains(self.recipe, key, variant):
            return True
        old = variants.may_have_old_keys(self.recipe) and variants.contains(self.recipe, record.key, variant)
        return old and self.find(variants, record, key, variant, pil=False) is not None

    def current(self, variants: VariantStore, *, failures: bool = False) -> Iterator[CurrentVariant]:
        """All stored variants of the recipe, or all remembered failures, each with whether training would still find it.

        A variant is out of date when its image's caption, label, guidance or scorer has changed since.
        """
        refs = variants.iter_failures(self.recipe) if failures else variants.iter(self.recipe)
        old = variants.may_have_old_keys(self.recipe)
        for chunk in batched(refs, 500):
            records = self._captions.get_many(
                {key for ref in chunk for key in (ref.image_key, *((ref.key,) if old else ())) if key}
            )
            for ref in chunk:
                record = records.get(ref.image_key)
                if record is not None:
                    try:
                        key = self.key(record, ref.variant)
                    except MissingCaptionError:  # no contexts to draw from, so it cannot be told
                        key = None
                    yield CurrentVariant(ref, ref.image_key, None if key is None else key == ref.key)
                elif old and (record := records.get(ref.key)) is not None:
                    found = None if failures else variants.get(self.recipe, ref.key, ref.variant)
                    yield CurrentVariant(
                        ref, ref.key, found is not None and self._made_under(record, ref.variant, found.provenance)
                    )
                else:
                    yield CurrentVariant(ref, ref.image_key, None)

    def _made_under(self, record: CaptionRecord, variant: int, made: Provenance) -> bool:
        same_text = made.label == record.label and (not self._captioned or made.caption == self.caption(record, variant)[0])
        return same_text and made.guidance_scale == guidance_scale(self.recipe.guidance, record.rank)


class _Lenders:
    """Images that lend their contexts, arranged in a circle: the one next to the drawn place is taken.

    When a lender is removed, only the draws that hit it change. With a list, nearly all would.
    """

    def __init__(self, rows: Iterable[tuple[str, str | None, str]]) -> None:
        self._circle = sorted((place(key), key, context) for key, _, context in rows)
        self._places = [entry[0] for entry in self._circle]

    def at(self, draw: int) -> tuple[str, str]:
        """The context at a place of 64 bits, and its image's key."""
        index = bisect.bisect_left(self._places, draw.to_bytes(8, "big"))
        _, key, context = self._circle[index % len(self._circle)]
        return context, key
