"""What an image-text model says about originals and their variants, and the figures of sets of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sgid_transforms.report._reading import Row
from sgid_transforms.report.facts import ClassFacts, ImageFacts, VariantFacts
from sgid_transforms.report.metrics import Scorer, cmmd, mean_pairwise_distance, vendi_score

_MIN_CMMD = 8  # originals in each half


@dataclass(frozen=True, eq=False)
class Scored:
    """An original without its pixels.

    Args:
        facts: of the original and its variants.
        original: its embedding ``(D,)``, if it was found and there is a scorer.
        first: embedding of its first variant, if there is one.
    """

    facts: ImageFacts
    original: torch.Tensor | None = None
    first: torch.Tensor | None = None


def score_rows(rows: Sequence[Row], scorer: Scorer | None, class_names: Sequence[str]) -> list[Scored]:
    """Let the scorer add what it sees; the images of all rows are given to it at once."""
    images = [image for row in rows for image in (row.image, *(pixels for _, pixels in row.variants)) if image is not None]
    if scorer is None or not images:
        return [Scored(replace(row.facts, variants=tuple(facts for facts, _ in row.variants))) for row in rows]
    features = scorer.image_features(images).cpu()
    answers = iter(_answers(scorer, features, class_names))
    prompts = list(dict.fromkeys(variant.prompt for row in rows for variant, pixels in row.variants if pixels is not None))
    texts = dict(zip(prompts, scorer.text_features(prompts).cpu(), strict=True)) if prompts else {}
    embeddings = iter(features)
    scored = []
    for row in rows:
        facts, original, first = row.facts, None, None
        if row.image is not None:
            original = next(embeddings)
            answer, probability = _of_label(next(answers), facts.label)
            facts = replace(facts, answer=answer, label_probability=probability)
        variants: list[VariantFacts] = []
        for variant, pixels in row.variants:
            if pixels is None:
                variants.append(variant)
                continue
            feature = next(embeddings)
            first = feature if first is None else first
            answer, probability = _of_label(next(answers), facts.label)
            variants.append(
                replace(
                    variant,
                    answer=answer,
                    label_probability=variant.label_probability if probability is None else probability,
                    image_similarity=variant.image_similarity if original is None else _cosine(feature, original),
                    text_similarity=_cosine(feature, texts[variant.prompt]),
                )
            )
        scored.append(Scored(replace(facts, variants=tuple(variants)), original, first))
    return scored


def summarize(label: str, scored: Sequence[Scored]) -> ClassFacts:
    """The figures of a set of originals."""
    made = [(one.facts, variant) for one in scored for variant in one.facts.variants if variant.made]
    rejected = [variant for one in scored for variant in one.facts.variants if not variant.made]
    reasons = Counter(reason for variant in rejected for reason in variant.rejected)
    original, first = _pairs(scored)
    return ClassFacts(
        label=label,
        originals=len(scored),
        variants=len(made),
        rejected=len(rejected),
        reasons=dict(reasons.most_common()),
        agreement_originals=_mean([one.facts.answer == one.facts.label for one in scored if one.facts.answer is not None]),
        agreement=_mean([variant.answer == image.label for image, variant in made if variant.answer is not None]),
        image_similarity=_mean([variant.image_similarity for _, variant in made if variant.image_similarity is not None]),
        distance_originals=mean_pairwise_distance(original) if len(original) > 1 else None,
        distance=mean_pairwise_distance(first) if len(first) > 1 else None,
        vendi_originals=vendi_score(original) if len(original) else None,
        vendi=vendi_score(first) if len(first) else None,
    )


def half_cmmd(scored: Sequence[Scored]) -> tuple[float, float] | tuple[None, None]:
    """CMMD of one half of the originals to the variants of the other half, and to that half itself.

    The halves have one size, and no original meets its own variant: what sets the two figures apart is the generator alone.
    """
    original, first = _pairs(scored)
    half = len(original) // 2
    if half < _MIN_CMMD:
        return None, None
    return cmmd(original[:half], first[half : 2 * half]), cmmd(original[:half], original[half : 2 * half])


def _pairs(scored: Sequence[Scored]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the originals that have a variant, and of their first variants; of these alone if no original is known."""
    pairs = [(one.original, one.first) for one in scored if one.original is not None and one.first is not None]
    firsts = [first for _, first in pairs] or [one.first for one in scored if one.first is not None]
    return _stack([original for original, _ in pairs]), _stack(firsts)


def _stack(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(rows) if rows else torch.zeros(0, 1)


def _answers(scorer: Scorer, features: torch.Tensor, class_names: Sequence[str]) -> list[dict[str, float]]:
    """Class name -> probability, for each image; empty where there is nothing to choose from."""
    if len(class_names) < 2:
        return [{} for _ in features]
    probabilities = scorer.probabilities(features, class_names).tolist()
    return [dict(zip(class_names, row, strict=True)) for row in probabilities]


def _of_label(answers: dict[str, float], label: str) -> tuple[str | None, float | None]:
    return max(answers, key=answers.__getitem__) if answers else None, answers.get(label)


def _cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x * y).sum().clamp(-1, 1))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
