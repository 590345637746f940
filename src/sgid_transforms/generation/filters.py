"""The checks that a generated image must pass, and how a rejected one is retried.

Pure functions come first; `ImageFilter` combines them and owns the CLIP model that some of them need.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from sgid_transforms.errors import GenerationError, RecipeError
from sgid_transforms.generation.requests import GenerationRequest
from sgid_transforms.images.forms import shrunk
from sgid_transforms.models.clip import CLIPScorer
from sgid_transforms.recipe.recipe import Filters

_NOISE = 8  # of 255: codecs and decoders leave a little noise on a flat picture


@dataclass(frozen=True)
class Verdict:
    """What the filters say about one image.

    Args:
        reason: one of the short reasons of `GenerationResult`, or ``None`` for an image that passes.
        label_score: CLIP's probability of the label, in [0, 1], where the label was checked.
        image_similarity: CLIP cosine of (image, original), in [-1, 1], where it was checked.
    """

    reason: str | None = None
    label_score: float | None = None
    image_similarity: float | None = None


def pixel_reason(image: Tensor) -> str | None:
    """``black`` or ``constant`` for a uint8 ``(3, H, W)`` image that shows nothing.

    A safety checker leaves black images. A diverged sampler leaves constant ones, with only a little noise in each channel.
    """
    if int(image.max()) < _NOISE:
        return "black"
    spread = image.amax((1, 2)).int() - image.amin((1, 2)).int()
    return "constant" if int(spread.max()) < _NOISE else None


def label_reason(probabilities: Tensor, label: int, check: str, threshold: float) -> str | None:
    """``label`` if an image does not show its label.

    Args:
        probabilities: ``(L,)``, of each class.
        label: index of the right class.
        check: ``argmax``: the right class must be the most probable one; ``threshold``: its probability must reach
            ``threshold``.
        threshold: a probability in [0, 1].
    """
    score = float(probabilities[label])
    if check == "argmax":
        return None if score >= float(probabilities.max()) else "label"
    return None if score >= threshold else "label"


def similarity_reason(similarity: float, low: float | None, high: float | None) -> str | None:
    """``too_similar`` above ``high`` (nothing was gained), ``too_different`` below ``low`` (too far from the original)."""
    if high is not None and similarity > high:
        return "too_similar"
    # not >=, so that NaN is rejected
    return "too_different" if low is not None and not similarity >= low else None


def retry_seed(seed: int, attempt: int) -> int:
    """Seed of a further attempt, in [0, 2**63).

    It depends only on the two numbers, so that a variant is the same whatever else is in its batch.
    """
    return int.from_bytes(hashlib.sha256(f"retry\0{seed:d}\0{attempt:d}".encode()).digest()[:8], "big") >> 1


def retry_strength(strength: float, reason: str, low: float, high: float) -> float:
    """Strength of the next attempt, half-way to one end of the range that the user set.

    It goes towards ``low``, nearer to the original, if the image lost its label or is too different, and towards ``high`` if it
    is too similar. With a range of one value, only the seed changes.
    """
    goal = high if reason == "too_similar" else low
    return min(max((strength + goal) / 2, min(strength, goal)), max(strength, goal))


def nsfw_flags(pipeline: Any, images: Sequence[Tensor]) -> list[bool]:
    """What a pipeline's safety checker says about finished images; nothing is flagged if it has none.

    diffusers' checker replaces a flagged image by a black one. Here it gets a copy, and only its flags are used.
    """
    checker = getattr(pipeline, "safety_checker", None)
    extractor = getattr(pipeline, "feature_extractor", None)
    if checker is None or extractor is None or not images:
        return [False] * len(images)
    parameter = next(checker.parameters())
    pictures = [to_pil_image(image) for image in images]
    pixels = extractor(pictures, return_tensors="pt").pixel_values.to(parameter.device, parameter.dtype)
    copies = [np.asarray(picture, dtype=np.float32) / 255 for picture in pictures]  # a list, since sizes may differ
    with torch.no_grad():
        _, flagged = checker(images=copies, clip_input=pixels)
    return [bool(flag) for flag in flagged]


class ImageFilter:
    """All checks of a recipe's `Filters` over a batch of generated images.

    Args:
        filters: what to check.
        labels: class names of the data set; needed by the label check.
        scorer: the CLIP model for label and similarity; needed if one of them is checked.
        pipeline: the pipeline whose safety checker is used; ``None`` if the engine uses it itself.

    Raises:
        RecipeError: the filters ask for a label check, and there are no labels.
        GenerationError: a CLIP model is needed, and there is none.
    """

    def __init__(
        self, filters: Filters, *, labels: Sequence[str] | None = None, scorer: CLIPScorer | None = None, pipeline: Any = None
    ) -> None:
        self.filters = filters
        self._labels = list(labels) if labels is not None else []
        self._index = {label: i for i, label in enumerate(self._labels)}
        self._scorer = scorer
        self._pipeline = pipeline if filters.reject_nsfw else None
        if filters.label_check != "none" and len(self._index) < 2:
            raise RecipeError(
                f"filters.label_check {filters.label_check!r} compares with other classes; pass the class names of the "
                f"data set as labels ({len(self._index)} given)"
            )
        if len(self._index) != len(self._labels):
            raise RecipeError("labels holds a class name twice; pass each one once")
        if needs_clip(filters) and scorer is None:
            raise GenerationError("the filters for label and similarity need a CLIP model; pass a scorer")

    def check_request(self, request: GenerationRequest) -> None:
        """Raise `GenerationError` for a request whose label could not be checked afterwards."""
        if self.filters.label_check == "none" or request.label in self._index:
            return
        if request.label is None:
            raise GenerationError(f"filters.label_check {self.filters.label_check!r} needs a label in every request; set label")
        raise GenerationError(
            f"the label {request.label!r} is not one of the {len(self._index)} class names; pass it in labels"
        )

    def __call__(self, images: Sequence[Tensor], requests: Sequence[GenerationRequest]) -> list[Verdict]:
        """One verdict per image.

        Args:
            images: uint8 ``(3, H, W)`` each.
            requests: the request of each image.
        """
        images = [shrunk(image) for image in images]
        reasons = [pixel_reason(image) for image in images]
        if self._pipeline is not None:
            left = [i for i, reason in enumerate(reasons) if reason is None]
            for i, flagged in zip(left, nsfw_flags(self._pipeline, [images[i] for i in left]), strict=True):
                if flagged:
                    reasons[i] = "nsfw"
        verdicts = [Verdict(reason) for reason in reasons]
        if self._scorer is not None and needs_clip(self.filters):
            left = [i for i, reason in enumerate(reasons) if reason is None]
            scored = self._score([images[i] for i in left], [requests[i] for i in left])
            for i, verdict in zip(left, scored, strict=True):
                verdicts[i] = verdict
        return verdicts

    def _score(self, images: Sequence[Tensor], requests: Sequence[GenerationRequest]) -> list[Verdict]:
        assert self._scorer is not None
        if not images:
            return []
        filters = self.filters
        features = self._scorer.image_features(images)
        similarities: list[float | None] = [None] * len(images)
        if _checks_similarity(filters):
            originals = self._scorer.image_features([shrunk(request.image) for request in requests])
            similarities = (features * originals).sum(1).clamp(-1, 1).tolist()
        probabilities = self._scorer.probabilities(features, self._labels) if filters.label_check != "none" else None
        verdicts = []
        for i, (request, similarity) in enumerate(zip(requests, similarities, strict=True)):
            reason, score = None, None
            if probabilities is not None and request.label is not None:
                index = self._index[request.label]
                score = float(probabilities[i, index])
                reason = label_reason(probabilities[i], index, filters.label_check, filters.label_threshold)
            if reason is None and similarity is not None:
                reason = similarity_reason(similarity, filters.min_image_similarity, filters.max_image_similarity)
            verdicts.append(Verdict(reason, score, similarity))
        return verdicts


def needs_clip(filters: Filters) -> bool:
    """Whether one of the checks needs a CLIP model."""
    return filters.label_check != "none" or _checks_similarity(filters)


def _checks_similarity(filters: Filters) -> bool:
    return filters.min_image_similarity is not None or filters.max_image_similarity is not None
