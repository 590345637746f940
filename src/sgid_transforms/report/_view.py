"""Which images a report shows, in which order, and the sentences around them. No HTML here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from sgid_transforms.report._pictures import Picture
from sgid_transforms.report.facts import ClassFacts, ImageFacts, Survey, VariantFacts

CASES = 6
_WEAK_SCORER = 0.5  # share of originals below which a scorer's judgement of labels is worth little

Pictures = Mapping[tuple[str, int | None], Picture]
"""(key, number of the variant; None: the original) -> what is embedded."""


@dataclass(frozen=True)
class Card:
    """One original with its variants, as the gallery shows it. ``worst``, ``best`` and ``change`` are sorted by, ascending."""

    image: ImageFacts
    anchor: str
    original: Picture | None
    variants: tuple[tuple[VariantFacts, Picture | None], ...]
    prompt: str
    state: str
    worst: float | None
    best: float | None
    change: float | None


@dataclass(frozen=True)
class Case:
    """One variant beside its original, as a highlight."""

    image: ImageFacts
    variant: VariantFacts
    anchor: str
    original: Picture | None
    picture: Picture


@dataclass(frozen=True)
class Tile:
    """One of the figures at the top."""

    name: str
    value: str
    beside: str


@dataclass(frozen=True)
class Column:
    """A heading of the table of classes."""

    name: str
    kind: str
    first: str = "descending"
    sorted: str = ""


def badness(variant: VariantFacts) -> float | None:
    """The lower, the worse: the probability of the label, or without it the similarity to the original."""
    return variant.image_similarity if variant.label_probability is None else variant.label_probability


def goodness(image: ImageFacts, variant: VariantFacts) -> float | None:
    """The lower, the better: the similarity to the original, if the label was kept."""
    return variant.image_similarity if variant.answer == image.label else None


def worst_of(image: ImageFacts) -> float | None:
    """The badness of an original's worst variant."""
    return min((value for v in image.variants if (value := badness(v)) is not None), default=None)


def best_of(image: ImageFacts) -> float | None:
    """The goodness of an original's best variant."""
    return min((value for v in image.variants if (value := goodness(image, v)) is not None), default=None)


def choose(images: Sequence[ImageFacts], max_images: int) -> list[ImageFacts]:
    """Worst and best originals in turn, as long as they and their variants are no more than ``max_images``; worst first.

    At least one original is chosen, if there is any.
    """
    worst = sorted(images, key=lambda image: _last_if_none(worst_of(image)))
    best = sorted(images, key=lambda image: _last_if_none(best_of(image)))
    chosen: dict[str, ImageFacts] = {}
    room = max_images
    for image in filter(None, chain.from_iterable(zip_longest(worst, best))):
        if image.key in chosen:
            continue
        room -= 1 + sum(variant.made for variant in image.variants)
        if room < 0 and chosen:
            break
        chosen[image.key] = image
    return [image for image in worst if image.key in chosen]


def cards(chosen: Sequence[ImageFacts], pictures: Pictures) -> list[Card]:
    """The gallery."""
    return [_card(number, image, pictures) for number, image in enumerate(chosen)]


def _card(number: int, image: ImageFacts, pictures: Pictures) -> Card:
    prompts = {variant.prompt for variant in image.variants if variant.made}
    made = [variant for variant in image.variants if variant.made]
    similarities = [variant.image_similarity for variant in made if variant.image_similarity is not None]
    answers = [variant.answer for variant in made if variant.answer is not None]
    states = {
        "lost": any(answer != image.label for answer in answers),
        "kept": bool(answers) and all(answer == image.label for answer in answers),
        "rejected": len(made) < len(image.variants),
    }
    return Card(
        image=image,
        anchor=f"image-{number}",
        original=pictures.get((image.key, None)),
        variants=tuple((variant, pictures.get((image.key, variant.number))) for variant in image.variants),
        prompt=prompts.pop() if len(prompts) == 1 else "",
        state=" ".join(name for name, holds in states.items() if holds),
        worst=worst_of(image),
        best=best_of(image),
        change=sum(similarities) / len(similarities) if similarities else None,
    )


def worst_cases(gallery: Sequence[Card]) -> list[Case]:
    """The worst variants, one of an original."""
    return _cases(sorted(gallery, key=lambda card: _last_if_none(card.worst)), lambda image, variant: badness(variant))


def best_cases(gallery: Sequence[Card]) -> list[Case]:
    """The best variants, one of an original."""
    return _cases(sorted(gallery, key=lambda card: _last_if_none(card.best)), goodness)


def _cases(gallery: Sequence[Card], measure: Callable[[ImageFacts, VariantFacts], float | None]) -> list[Case]:
    found = []
    for card in gallery:
        scored = [
            (value, index)
            for index, (variant, picture) in enumerate(card.variants)
            if picture is not None and (value := measure(card.image, variant)) is not None
        ]
        if scored:
            variant, picture = card.variants[min(scored)[1]]
            assert picture is not None
            found.append(Case(card.image, variant, card.anchor, card.original, picture))
    return found[:CASES]


def tiles(facts: Survey) -> Iterator[Tile]:
    """The figures at the top: what could be measured of them."""
    one = facts.overall
    yield Tile("Originals", f"{one.originals:,}", f"of {facts.captions_in_store:,} with a caption")
    yield Tile("Variants", f"{one.variants:,}", f"{one.variants / max(1, one.originals):.1f} of each original")
    total = one.variants + one.rejected
    yield Tile("Rejected", f"{one.rejected:,}", f"{one.rejected / max(1, total):.1%} of {total:,} asked for")
    if one.agreement is not None:
        beside = "" if one.agreement_originals is None else f"{one.agreement_originals:.0%} of the originals"
        yield Tile("Label kept", f"{one.agreement:.0%}", beside)
    if one.image_similarity is not None:
        yield Tile("Similarity", f"{one.image_similarity:.2f}", "cosine to the original; 1 is unchanged")
    if one.vendi is not None:
        beside = (
            "different first variants"
            if one.vendi_originals is None
            else f"different images; originals {one.vendi_originals:.1f}"
        )
        yield Tile("Vendi score", f"{one.vendi:.1f}", beside)
    if facts.cmmd is not None:
        yield Tile("CMMD", f"{facts.cmmd:.2f}", f"originals among themselves {facts.cmmd_floor:.2f}")


def notes(facts: Survey) -> Iterator[str]:
    """What a reader must know to trust the figures."""
    one = facts.overall
    if one.originals < facts.originals_in_store:
        yield (
            f"All figures are of a sample of {one.originals:,} of {facts.originals_in_store:,} originals, "
            f"chosen by a hash; the store has {facts.variants_in_store:,} variants of this recipe."
        )
    if facts.scorer:
        yield (
            f"Labels and similarities are judged by the model “{facts.scorer}”. It errs, too: compare the figures of the "
            "variants with those of the originals."
        )
        if one.agreement_originals is not None and one.agreement_originals < _WEAK_SCORER:
            yield (
                f"That model recognises only {one.agreement_originals:.0%} of the originals: what it says of labels means "
                "little here. Choose one that knows these classes."
            )
    else:
        yield "There was no scorer: labels and similarities are known only where generation measured them."
    lost = sum(not image.found for image in facts.images)
    if lost:
        yield f"{lost:,} of the originals could not be found or read; give the folder that their paths start from."
    if facts.cmmd is not None:
        yield (
            "CMMD compares one half of the originals with the variants of the other half, and with that half itself: "
            "the second figure is what chance alone makes of it."
        )


def shown_text(shown: int, pictures: int, facts: Survey) -> str:
    """What the gallery holds, and what it leaves out."""
    if shown == len(facts.images):
        return (
            f"All {shown:,} originals that were looked at, each with its variants."
            if shown > 1
            else "The original and its variants."
        )
    return (
        f"{shown:,} of the {len(facts.images):,} originals that were looked at: the worst and the best in turn, "
        f"cut at {pictures:,} embedded pictures to keep this file small."
    )


def columns(scored: bool) -> list[Column]:
    """The headings of the table of classes."""
    figures = [
        Column("Label kept", "number", "ascending", "ascending"),
        Column("Similarity to original", "number"),
        Column("Distance", "number"),
        Column("Vendi score", "number"),
    ]
    return [
        Column("Class", "text", "ascending", "" if scored else "ascending"),
        Column("Originals", "number"),
        Column("Variants", "number"),
        Column("Rejected", "number"),
        *(figures if scored else []),
        Column("Rejected attempts by reason", "text", "ascending"),
    ]


def sorted_classes(facts: Survey) -> list[ClassFacts]:
    """Worst label agreement first, then by name."""
    return sorted(facts.classes, key=lambda one: (_last_if_none(one.agreement), one.label.casefold()))


def orders(facts: Survey) -> list[tuple[str, str]]:
    """What the gallery can be sorted by: attribute and direction, and words for it."""
    measured = any(worst_of(image) is not None for image in facts.images)
    kept = any(best_of(image) is not None for image in facts.images)
    return [
        *([("worst up number", "worst first"), ("worst down number", "safest first")] if measured else []),
        *([("best up number", "best first")] if kept else []),
        *([("change up number", "most changed"), ("change down number", "least changed")] if measured else []),
        ("rank up number", "caption fits least"),
        ("rank down number", "caption fits best"),
        ("name up text", "file name"),
    ]


def _last_if_none(value: float | None) -> float:
    return float("inf") if value is None else value
