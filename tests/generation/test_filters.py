"""Filters: what counts as an image, and where a retry goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_models
import tiny_text
from sgid_transforms.errors import GenerationError, RecipeError
from sgid_transforms.generation.filters import (
    ImageFilter,
    Verdict,
    label_reason,
    needs_clip,
    nsfw_flags,
    pixel_reason,
    retry_seed,
    retry_strength,
    similarity_reason,
)
from sgid_transforms.models.clip import CLIPScorer
from sgid_transforms.recipe.recipe import Filters


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> CLIPScorer:
    folder: Path = tmp_path_factory.mktemp("clip")
    tiny_text.clip_model().save_pretrained(folder)
    tiny_text.clip_processor().save_pretrained(folder)
    return CLIPScorer(str(folder))


def flat(*levels: int) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None].expand(3, 16, 16).clone()


def test_black_images() -> None:
    """A published black-image test reads the brightest bin of a histogram, and so lets every black image pass."""
    spot = flat(0, 0, 0)
    spot[:, 3, 3] = 255
    pictures = [flat(0, 0, 0), flat(3, 0, 7), spot, tiny_models.image(1)]
    assert [pixel_reason(picture) for picture in pictures] == ["black", "black", None, None]


def test_constant_images() -> None:
    noise = flat(120, 30, 200)
    noise[:, 0, 0] += 7
    pictures = [flat(9, 9, 9), flat(120, 30, 200), flat(255, 255, 255), noise]
    assert [pixel_reason(picture) for picture in pictures] == ["constant"] * 4
    noise[1, 0, 0] += 1
    assert pixel_reason(noise) is None


def test_label_reasons() -> None:
    probabilities = torch.tensor([0.2, 0.5, 0.3])
    assert [label_reason(probabilities, i, "argmax", 0.9) for i in range(3)] == ["label", None, "label"]
    assert [label_reason(probabilities, i, "threshold", 0.3) for i in range(3)] == ["label", None, None]
    assert label_reason(torch.tensor([torch.nan, torch.nan]), 0, "argmax", 0.5) == "label"
    assert label_reason(torch.tensor([torch.nan, torch.nan]), 0, "threshold", 0.0) == "label"


def test_similarity_reasons() -> None:
    assert similarity_reason(0.5, None, None) is None
    assert similarity_reason(0.96, 0.6, 0.95) == "too_similar"
    assert similarity_reason(0.55, 0.6, 0.95) == "too_different"
    assert similarity_reason(0.6, 0.6, 0.95) is None
    assert similarity_reason(0.95, 0.6, 0.95) is None
    assert similarity_reason(float("nan"), 0.6, None) == "too_different"


def test_retry_seeds_are_new_and_reproducible() -> None:
    seeds = {retry_seed(seed, attempt) for seed in range(20) for attempt in range(1, 21)}
    assert len(seeds) == 20 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert retry_seed(7, 1) == 238606303462010175  # the same on every platform and in every version


@settings(deadline=None)  # a busy machine is no failure
@given(st.floats(0.001, 1), st.floats(0.001, 1), st.floats(0.001, 1), st.sampled_from(["label", "too_similar"]))
def test_retry_strength_goes_half_way_and_never_out_of_range(a: float, b: float, c: float, reason: str) -> None:
    low, strength, high = sorted((a, b, c))
    following = retry_strength(strength, reason, low, high)
    assert low <= following <= high
    if reason == "too_similar":
        assert following >= strength
        assert following == pytest.approx((strength + high) / 2)
    else:
        assert following <= strength
        assert following == pytest.approx((strength + low) / 2)


def test_a_fixed_strength_stays() -> None:
    assert {retry_strength(0.4, reason, 0.4, 0.4) for reason in ("nan", "label", "too_similar")} == {0.4}


class Checker(torch.nn.Module):
    """Flags bright images, and blackens them as diffusers' own checker does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Any, clip_input: torch.Tensor) -> tuple[Any, list[bool]]:
        self.seen.append(tuple(clip_input.shape))
        flags = [bool(image.mean() > 0.75) for image in images]
        for image, flag in zip(images, flags, strict=True):
            if flag:
                image[:] = 0
        return images, flags


class Guarded:
    """A pipeline with a safety checker."""

    def __init__(self) -> None:
        self.safety_checker: Any = Checker()
        self.feature_extractor = tiny_text.clip_image_processor()


def bright() -> torch.Tensor:
    return tiny_models.image(0) // 8 + 220


def test_the_safety_checker_is_asked_and_its_black_image_is_not_used() -> None:
    images = [tiny_models.image(0), bright(), tiny_models.image(1, 20, 48)]
    before = [image.clone() for image in images]
    pipeline = Guarded()
    assert nsfw_flags(pipeline, images) == [False, True, False]
    assert all(torch.equal(image, copy) for image, copy in zip(images, before, strict=True))
    assert pipeline.safety_checker.seen == [(3, 3, 32, 32)]  # all at once, whatever their sizes
    assert nsfw_flags(tiny_models.sd1(), images) == [False] * 3
    assert nsfw_flags(pipeline, []) == []


@pytest.mark.parametrize("flags", [True, False])
def test_the_real_safety_checker(flags: bool) -> None:
    pipeline = Guarded()
    pipeline.safety_checker = tiny_text.safety_checker(flags=flags)
    assert nsfw_flags(pipeline, [tiny_models.image(0)]) == [flags]


def test_all_checks_in_order(scorer: CLIPScorer) -> None:
    original = tiny_models.image(0)
    requests = [tiny_models.request(0, image=original, label="cat") for _ in range(4)]
    images = [flat(0, 0, 0), bright(), original, tiny_models.image(5)]
    filters = Filters(max_image_similarity=0.999)
    verdicts = ImageFilter(filters, scorer=scorer, pipeline=Guarded())(images, requests)
    assert [verdict.reason for verdict in verdicts] == ["black", "nsfw", "too_similar", None]
    assert verdicts[0] == Verdict("black")
    assert verdicts[2].image_similarity == pytest.approx(1.0)
    assert verdicts[3].image_similarity is not None
    assert verdicts[3].image_similarity < 0.999
    assert verdicts[3].label_score is None
    relaxed = ImageFilter(Filters(reject_nsfw=False), pipeline=Guarded())(images, requests)
    assert [verdict.reason for verdict in relaxed] == ["black", None, None, None]


def test_too_far_from_the_original(scorer: CLIPScorer) -> None:
    requests = [tiny_models.request(0), tiny_models.request(0)]
    images = [tiny_models.image(0), tiny_models.image(5)]
    verdicts = ImageFilter(Filters(min_image_similarity=0.999), scorer=scorer)(images, requests)
    assert [verdict.reason for verdict in verdicts] == [None, "too_different"]


def test_label_check_is_clips_answer(scorer: CLIPScorer) -> None:
    labels = ["cat", "dog", "ship"]
    images = [tiny_models.image(i) for i in range(3)]
    probabilities = scorer.label_probabilities(images, labels)
    best = [labels[int(index)] for index in probabilities.argmax(1)]
    worst = [labels[int(index)] for index in probabilities.argmin(1)]
    argmax = ImageFilter(Filters(label_check="argmax"), labels=labels, scorer=scorer)
    assert [v.reason for v in argmax(images, [tiny_models.request(label=label) for label in best])] == [None] * 3
    verdicts = argmax(images, [tiny_models.request(label=label) for label in worst])
    assert [v.reason for v in verdicts] == ["label"] * 3
    torch.testing.assert_close(torch.tensor([v.label_score for v in verdicts]), probabilities.min(1).values)
    threshold = ImageFilter(Filters(label_check="threshold", label_threshold=0.0), labels=labels, scorer=scorer)
    assert [v.reason for v in threshold(images, [tiny_models.request(label=label) for label in worst])] == [None] * 3


def test_clip_sees_each_image_once(scorer: CLIPScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    own = scorer.image_features
    monkeypatch.setattr(scorer, "image_features", lambda images: calls.append(len(images)) or own(images))
    filters = Filters(label_check="argmax", min_image_similarity=-1.0, max_image_similarity=1.0)
    check = ImageFilter(filters, labels=["cat", "dog"], scorer=scorer)
    images = [tiny_models.image(i) for i in range(5)] + [flat(0, 0, 0)]
    check(images, [tiny_models.request(i, label="cat") for i in range(6)])
    assert calls == [5, 5]  # variants and originals, without the one that failed before
    check([flat(0, 0, 0)], [tiny_models.request(label="cat")])
    assert calls == [5, 5]


def test_what_is_missing_is_said(scorer: CLIPScorer) -> None:
    with pytest.raises(RecipeError, match=r"^filters.label_check 'argmax' compares with other classes; .* \(0 given\)$"):
        ImageFilter(Filters(label_check="argmax"), scorer=scorer)
    with pytest.raises(RecipeError, match=r"^labels holds a class name twice; pass each one once$"):
        ImageFilter(Filters(), labels=["cat", "cat"])
    with pytest.raises(GenerationError, match=r"^the filters for label and similarity need a CLIP model; pass a scorer$"):
        ImageFilter(Filters(max_image_similarity=0.9))
    check = ImageFilter(Filters(label_check="argmax"), labels=["cat", "dog"], scorer=scorer)
    with pytest.raises(GenerationError, match=r"^the label 'cow' is not one of the 2 class names; pass it in labels$"):
        check.check_request(tiny_models.request(label="cow"))
    with pytest.raises(GenerationError, match=r"^filters.label_check 'argmax' needs a label in every request; set label$"):
        check.check_request(tiny_models.request())
    check.check_request(tiny_models.request(label="dog"))
    ImageFilter(Filters()).check_request(tiny_models.request())


def test_clip_is_needed_only_where_it_is_asked() -> None:
    assert not needs_clip(Filters())
    assert needs_clip(Filters(label_check="threshold"))
    assert needs_clip(Filters(min_image_similarity=0.1))
    assert needs_clip(Filters(max_image_similarity=0.9))
