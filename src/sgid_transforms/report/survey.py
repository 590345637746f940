"""Measure what is in the stores: the figures behind the HTML report, also for use in scripts."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from sgid_transforms.building.address import Address
from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import ImageError
from sgid_transforms.images.keys import to_uint8_chw
from sgid_transforms.images.reading import load_image
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.report.answers import Answers, beside
from sgid_transforms.report.metrics import Scorer, cmmd, human_consistency, mean_pairwise_distance, vendi_score
from sgid_transforms.variants.store import VariantStore

NO_LABEL = "(no label)"

Originals = str | os.PathLike[str] | Callable[[CaptionRecord], "Image.Image | torch.Tensor | None"]
"""Where to find originals: the folder that the records' relative paths start from, or a function of a record."""

_CHUNK = 16  # originals held in memory at a time, with their variants
_MIN_CMMD = 8  # originals in each half


@dataclass(frozen=True)
class VariantFacts:
    """One variant, or one that was rejected for good.

    Args:
        number: Number of the variant, from 0.
        prompt: The text that the model saw.
        strength: Share of the noise schedule that was run.
        guidance: Classifier-free guidance scale.
        attempt: Number of rejected attempts before it.
        rejected: Reasons of its attempts, if there is no image.
        image_similarity: Cosine of the embeddings of the variant and its original.
        text_similarity: Cosine of the embeddings of the variant and its prompt.
        label_probability: Probability of its label among all class names.
        answer: The class name that the scorer finds likeliest.
        verdict: ``"reject"`` or ``"keep"``, if people judged it.
        judge: Who did.
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
    verdict: str | None = None
    judge: str = ""

    @property
    def made(self) -> bool:
        """Whether there is an image."""
        return not self.rejected


@dataclass(frozen=True)
class ImageFacts:
    """One original and its variants.

    Args:
        key: Key of the original.
        label: Name of its class; ``NO_LABEL`` if it is unknown.
        caption: What it shows.
        name: The last two parts of its path, if it has one.
        similarity: Cosine with its prompt, from the caption store.
        rank: Rank of the similarity within the data set.
        contradiction: By what its caption contradicts its label, from the caption store.
        found: Whether the original could be read.
        label_probability: Probability of its label among all class names.
        answer: The class name that the scorer finds likeliest.
        variants: Its variants, by number.
    """

    key: str
    label: str = NO_LABEL
    caption: str = ""
    name: str = ""
    similarity: float | None = None
    rank: float | None = None
    contradiction: str | None = None
    found: bool = False
    label_probability: float | None = None
    answer: str | None = None
    variants: tuple[VariantFacts, ...] = ()


@dataclass(frozen=True)
class ClassFacts:
    """The figures of one class, or of all. What could not be measured is ``None``.

    Label agreement is the share of images whose likeliest class name, by the scorer, is their label. Distances and Vendi scores
    compare sets of the same size: the originals that have a variant, and the first variant of each of them.

    Args:
        label: Name of the class.
        originals: Number of originals that were measured.
        variants: Number of their variants.
        rejected: Number of variants that could not be made.
        reasons: Number of their rejected attempts, by reason.
        agreement_originals: Label agreement of the originals.
        agreement: Label agreement of the variants.
        image_similarity: Mean cosine of variants and their originals.
        distance_originals: Mean cosine distance between two originals.
        distance: Mean cosine distance between the first variants of two originals.
        vendi_originals: Effective number of different originals.
        vendi: Effective number of different first variants.
        judged: Number of variants that people judged.
        refused: Number of those that they rejected.
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
    judged: int = 0
    refused: int = 0


@dataclass(frozen=True)
class Survey:
    """All figures of one recipe's variants.

    Args:
        images: The originals that were measured, in the order of a hash of their keys.
        classes: The figures of each class, by label.
        overall: The figures of all classes together.
        originals_in_store: Originals that have variants or failures of this recipe.
        variants_in_store: Variants of this recipe, measured or not.
        captions_in_store: Records in the caption store.
        cmmd: CMMD between the variants of one half of the originals and the other half.
        cmmd_floor: CMMD between the two halves of the originals: the part of ``cmmd`` that is chance.
        scorer: Name of the model behind the similarities, ``""`` without one.
        human_consistency: Share of answers in the study that are the label, for these variants, with its 95 % interval.
        human_answers: How many answers that share is of.
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
    human_consistency: tuple[float, float, float] | None = None
    human_answers: int = 0

    def to_dict(self, *, images: bool = False) -> dict[str, Any]:
        """Plain values for ``json.dumps``; ``images`` includes those of every image."""
        values = asdict(self)
        return values if images else {name: value for name, value in values.items() if name != "images"}


def survey(
    captions: CaptionStore,
    variants: VariantStore,
    recipe: Recipe,
    *,
    originals: Originals | None = None,
    scorer: Scorer | None = None,
    class_names: Sequence[str] | None = None,
    max_originals: int = 2000,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Survey:
    """Measure the variants of one recipe.

    Args:
        captions: Labels, captions and paths of the originals.
        variants: The variants.
        recipe: The recipe of these variants.
        originals: Folder that the records' relative paths start from (default: the working folder). For data sets without
            files: a function that returns the image of a record, or ``None``.
        scorer: An image-text model such as ``CLIPScorer``; without one, only what generation measured is known.
        class_names: Classes that the scorer chooses among; default: all labels of the caption store.
        max_originals: Larger stores are sampled by a hash of the keys, so that the sample is always the same.
        progress: Wraps the iterable of keys, as ``tqdm`` does.

    Raises:
        ValueError: ``max_originals`` is below 1.
        StoreError: A store cannot be read.
    """
    return Reader(captions, variants, recipe, originals).survey(scorer, class_names, max_originals, progress)


def find_variants(captions: CaptionStore, variants: VariantStore, recipe: Recipe) -> dict[str, set[tuple[str, int]]]:
    """Store key and number of every variant and failure of a recipe, by the key of the original.

    Those made with an outdated caption or label are left out, as in training. For an image that the caption store does not
    know, all are included.
    """
    address = Address(recipe, captions)
    found: dict[str, set[tuple[str, int]]] = {}
    for failures in (False, True):
        for ref, image_key, state in address.current(variants, failures=failures):
            if state is not False:
                found.setdefault(image_key, set()).add((ref.key, ref.variant))
    return found


class Row(NamedTuple):
    """An original and its variants, as they are stored.

    Args:
        facts: The original and its variants, without what only a scorer knows.
        image: The original, uint8 ``(3, H, W)``, if it was found.
        pixels: The variants that have an image, by number.
    """

    facts: ImageFacts
    image: torch.Tensor | None
    pixels: Mapping[int, torch.Tensor]


class Reader:
    """Reads originals and variants from the stores: a report measures many of them, and later reads some again to show them.

    Args:
        captions: Labels, captions and paths of the originals.
        variants: The variants.
        recipe: The recipe of these variants.
        originals: As for `survey`.
    """

    def __init__(
        self, captions: CaptionStore, variants: VariantStore, recipe: Recipe, originals: Originals | None = None
    ) -> None:
        self.captions, self.variants, self.recipe, self.originals = captions, variants, recipe, originals
        self.found = find_variants(captions, variants, recipe)

    def rows(self, keys: Sequence[str]) -> Iterator[Row]:
        """The rows of these originals. Damaged variants are left out, and so are originals that have no others."""
        records = self.captions.get_many(keys)
        for key in keys:
            record, image = records.get(key), self._original(records.get(key))
            found, pixels = [], {}
            label, caption = (record.label, record.caption) if record else (None, None)
            for stored_key, number in sorted(self.found[key]):
                variant = self.variants.get(self.recipe, stored_key, number)
                if variant is not None:
                    origin, pixels[number] = variant.provenance, variant.image
                    label, caption = label or origin.label, caption or origin.caption
                    found.append(
                        VariantFacts(
                            number=number,
                            prompt=origin.prompt,
                            strength=origin.strength,
                            guidance=origin.guidance_scale,
                            attempt=origin.attempt,
                            image_similarity=origin.image_similarity,
                            label_probability=origin.label_score,
                            verdict=None if variant.verdict is None else variant.verdict.decision,
                            judge="" if variant.verdict is None else variant.verdict.who,
                        )
                    )
                elif (reasons := self.variants.failure(self.recipe, stored_key, number)) is not None:
                    found.append(VariantFacts(number, rejected=reasons or ("unknown",)))
            if found:
                facts = ImageFacts(
                    key=key,
                    label=label or NO_LABEL,
                    caption=caption or "",
                    name="/".join(Path(record.path).parts[-2:]) if record and record.path else "",
                    similarity=record.similarity if record else None,
                    rank=record.rank if record else None,
                    contradiction=record.contradiction if record else None,
                    found=image is not None,
                    variants=tuple(found),
                )
                yield Row(facts, image, pixels)

    def survey(
        self,
        scorer: Scorer | None,
        class_names: Sequence[str] | None,
        max_originals: int,
        progress: Callable[[Sequence[str]], Iterable[str]],
    ) -> Survey:
        """Measure what was found; see `survey`."""
        if max_originals < 1:
            raise ValueError(f"max_originals is {max_originals}; it must be at least 1")
        if scorer is not None and class_names is None:
            class_names = sorted({record.label for record in self.captions if record.label})
        keys = iter(progress(sorted(self.found, key=lambda key: hashlib.sha256(key.encode()).digest())[:max_originals]))
        scored: list[_Scored] = []
        while chunk := list(islice(keys, _CHUNK)):
            scored += _score(list(self.rows(chunk)), scorer, class_names or ())
        by_label: dict[str, list[_Scored]] = {}
        for one in scored:
            by_label.setdefault(one.facts.label, []).append(one)
        distance, floor = _half_cmmd(scored)
        answers = Answers(beside(self.captions.path)).all()
        seen = [one.is_right for one in answers if one.question == "class" and one.arm == self.recipe.fingerprint]
        return Survey(
            images=tuple(one.facts for one in scored),
            classes=tuple(_summarize(label, by_label[label]) for label in sorted(by_label)),
            overall=_summarize("All classes", scored),
            originals_in_store=len(self.found),
            variants_in_store=self.variants.count(self.recipe),
            captions_in_store=len(self.captions),
            cmmd=distance,
            cmmd_floor=floor,
            scorer="" if scorer is None else str(getattr(scorer, "id", type(scorer).__name__)),
            human_consistency=human_consistency(seen) if seen else None,
            human_answers=len(seen),
        )

    def _original(self, record: CaptionRecord | None) -> torch.Tensor | None:
        """The image of a record, or ``None`` if it cannot be found or read."""
        if record is None:
            return None
        if callable(self.originals):
            image = self.originals(record)
            return None if image is None else to_uint8_chw(image)
        if record.path is None:
            return None
        try:
            return to_uint8_chw(load_image(Path(self.originals or "", record.path)))
        except (ImageError, ValueError):  # a path with a NUL character is a ValueError
            return None


class _Scored(NamedTuple):
    """An original without its pixels, with its embedding and that of its first variant where there are any."""

    facts: ImageFacts
    original: torch.Tensor | None = None
    first: torch.Tensor | None = None


def _score(rows: Sequence[Row], scorer: Scorer | None, class_names: Sequence[str]) -> Iterator[_Scored]:
    """Add what the scorer sees; it gets the images of all rows at once."""
    images = [image for row in rows for image in (row.image, *row.pixels.values()) if image is not None]
    if scorer is None or not images:
        yield from (_Scored(row.facts) for row in rows)
        return
    features = scorer.image_features(images).cpu()
    prompts = list(dict.fromkeys(variant.prompt for row in rows for variant in row.facts.variants if variant.made))
    texts = dict(zip(prompts, scorer.text_features(prompts).cpu(), strict=True)) if prompts else {}
    choice = class_names if len(class_names) > 1 else ()
    probabilities = scorer.probabilities(features, choice).tolist() if choice else [[]] * len(images)
    seen = iter(zip(features, probabilities, strict=True))

    def judged(values: list[float], label: str) -> tuple[str | None, float | None]:
        by_class = dict(zip(choice, values, strict=True))
        return max(by_class, key=by_class.__getitem__) if by_class else None, by_class.get(label)

    for facts, image, _ in rows:
        original = first = None
        if image is not None:
            original, values = next(seen)
            answer, probability = judged(values, facts.label)
            facts = replace(facts, answer=answer, label_probability=probability)
        variants = []
        for variant in facts.variants:
            if variant.made:
                feature, values = next(seen)
                first = feature if first is None else first
                answer, probability = judged(values, facts.label)
                variant = replace(
                    variant,
                    answer=answer,
                    label_probability=variant.label_probability if probability is None else probability,
                    image_similarity=variant.image_similarity if original is None else _cosine(feature, original),
                    text_similarity=_cosine(feature, texts[variant.prompt]),
                )
            variants.append(variant)
        yield _Scored(replace(facts, variants=tuple(variants)), original, first)


def _summarize(label: str, scored: Sequence[_Scored]) -> ClassFacts:
    images = [one.facts for one in scored]
    made = [(image, variant) for image in images for variant in image.variants if variant.made]
    rejected = [variant for image in images for variant in image.variants if not variant.made]
    original, first = _pairs(scored)
    return ClassFacts(
        label=label,
        originals=len(scored),
        variants=len(made),
        rejected=len(rejected),
        reasons=dict(Counter(reason for variant in rejected for reason in variant.rejected).most_common()),
        agreement_originals=_mean(image.answer == image.label for image in images if image.answer is not None),
        agreement=_mean(variant.answer == image.label for image, variant in made if variant.answer is not None),
        image_similarity=_mean(variant.image_similarity for _, variant in made if variant.image_similarity is not None),
        distance_originals=mean_pairwise_distance(original) if len(original) > 1 else None,
        distance=mean_pairwise_distance(first) if len(first) > 1 else None,
        vendi_originals=vendi_score(original) if len(original) else None,
        vendi=vendi_score(first) if len(first) else None,
        judged=sum(variant.verdict is not None for _, variant in made),
        refused=sum(variant.verdict == "reject" for _, variant in made),
    )


def _half_cmmd(scored: Sequence[_Scored]) -> tuple[float, float] | tuple[None, None]:
    """CMMD of one half of the originals to the variants of the other half, and to that half itself.

    The halves have the same size, and no original is compared with its own variants, so only the generator makes a difference.
    """
    original, first = _pairs(scored)
    half = len(original) // 2
    if half < _MIN_CMMD:
        return None, None
    return cmmd(original[:half], first[half : 2 * half]), cmmd(original[:half], original[half : 2 * half])


def _pairs(scored: Sequence[_Scored]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the originals that have a variant, and of their first variants; only the latter if no original is known."""
    pairs = [(one.original, one.first) for one in scored if one.original is not None and one.first is not None]
    firsts = [first for _, first in pairs] or [one.first for one in scored if one.first is not None]
    originals = [original for original, _ in pairs]
    none = torch.zeros(0, 1)
    return torch.stack(originals) if originals else none, torch.stack(firsts) if firsts else none


def _cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x * y).sum().clamp(-1, 1))


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None
