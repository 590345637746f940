"""What a report is about: figures of variants, of originals, of classes, and of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

NO_LABEL = "(no label)"


@dataclass(frozen=True)
class VariantFacts:
    """One variant, or one that was rejected for good.

    Args:
        number: of the variant, from 0.
        prompt: the text that the model saw.
        strength: share of the noise schedule that was run.
        guidance: classifier-free guidance scale.
        attempt: number of rejected attempts before it.
        rejected: reasons of its attempts, if there is no image.
        image_similarity: cosine of its and its original's embeddings.
        text_similarity: cosine of its and its prompt's embeddings.
        label_probability: of its label, among all class names.
        answer: the class name that the scorer finds likeliest.
    """

    number: int
    prompt: str = ""
    strength: float | None = None
    guidance: float | None = None
    attempt: int = 0
    rejected: tuple[str, ...] = ()
    image_similarity: float | None = None
    text_similarity: float | None = None
    label_probability: float | None = None
    answer: str | None = None

    @property
    def made(self) -> bool:
        """Whether there is an image."""
        return not self.rejected


@dataclass(frozen=True)
class ImageFacts:
    """One original and its variants.

    Args:
        key: of the original.
        label: name of its class; ``NO_LABEL`` if nobody knows.
        caption: what it shows.
        name: the last two parts of its path, if it has one.
        similarity: cosine with its prompt, as the caption store has it.
        rank: of the similarity within the data set.
        found: whether the original could be read.
        label_probability: of its label, among all class names.
        answer: the class name that the scorer finds likeliest.
        variants: by number.
    """

    key: str
    label: str = NO_LABEL
    caption: str = ""
    name: str = ""
    similarity: float | None = None
    rank: float | None = None
    found: bool = False
    label_probability: float | None = None
    answer: str | None = None
    variants: tuple[VariantFacts, ...] = ()


@dataclass(frozen=True)
class ClassFacts:
    """The figures of one class, or of all. What could not be measured is ``None``.

    Label agreement is the share of images whose likeliest class name, by the scorer, is their label. Distances and Vendi
    scores compare sets of one size: the originals that have a variant, and the first variant of each of them.

    Args:
        label: of the class.
        originals: how many were looked at.
        variants: how many these have.
        rejected: variants that could not be made.
        reasons: rejected attempts of these, by reason.
        agreement_originals: label agreement of the originals.
        agreement: label agreement of the variants.
        image_similarity: mean cosine of variants and their originals.
        distance_originals: mean cosine distance between two originals.
        distance: mean cosine distance between the first variants of two originals.
        vendi_originals: effective number of different originals.
        vendi: effective number of different first variants.
    """

    label: str
    originals: int = 0
    variants: int = 0
    rejected: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    agreement_originals: float | None = None
    agreement: float | None = None
    image_similarity: float | None = None
    distance_originals: float | None = None
    distance: float | None = None
    vendi_originals: float | None = None
    vendi: float | None = None


@dataclass(frozen=True)
class Survey:
    """All figures of one recipe's variants.

    Args:
        images: those that were looked at, in the order of a hash of their keys.
        classes: by label.
        overall: all classes together.
        originals_in_store: originals of the variant store that have variants or failures of this recipe.
        variants_in_store: variants of this recipe, whether or not they were looked at.
        captions_in_store: records of the caption store.
        cmmd: between the variants of one half of the originals and the other half itself.
        cmmd_floor: between the two halves of the originals: what chance alone makes of it.
        scorer: name of the model behind the similarities, ``""`` without one.
    """

    images: tuple[ImageFacts, ...]
    classes: tuple[ClassFacts, ...]
    overall: ClassFacts
    originals_in_store: int
    variants_in_store: int
    captions_in_store: int
    cmmd: float | None = None
    cmmd_floor: float | None = None
    scorer: str = ""

    def to_dict(self, *, images: bool = False) -> dict[str, Any]:
        """Plain values that ``json.dumps`` takes, with or without every single image."""
        values = asdict(self)
        return values if images else {name: value for name, value in values.items() if name != "images"}
