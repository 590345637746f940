"""Captions and variants of the images of one run, made once and kept; what is there already is not made again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sgid_transforms import CaptionStore, Recipe, SGIDAugment, VariantStore
from sgid_transforms.building.address import Address
from sgid_transforms.building.builder import BuilderSpec
from sgid_transforms.building.wanted import Status, Wanted
from sgid_transforms.generation.requests import GenerationRequest, GenerationResult, Pull, pull_from
from sgid_transforms.images.keys import to_uint8_chw
from sgid_transforms.models.clip import CLIPScorer

from .data import Labelled


@dataclass(frozen=True)
class Made:
    """How many variants an image set has: ``wanted``, of which ``rejected`` were not made because a filter said no."""

    wanted: int
    rejected: int


class RankedStrength:
    """Makes variants whose strength follows the similarity, under one guidance scale.

    Args:
        generate: the generator.
        strength: at the rank 0 and at the rank 1; the rank is what requests have as their guidance scale.
        guidance: the scale for all of them.
    """

    def __init__(self, generate: Any, strength: tuple[float, float], guidance: float) -> None:
        self._generate, self._strength, self._guidance = generate, strength, guidance

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generate, name)

    def stream(self, pull: Pull) -> Iterator[list[tuple[GenerationRequest, GenerationResult]]]:
        """As the generator's own."""
        low, high = self._strength
        asked: dict[GenerationRequest, GenerationRequest] = {}

        def changed(room: int) -> list[GenerationRequest]:
            fresh = []
            for request in pull(room):
                strength = low + (high - low) * request.guidance_scale
                fresh.append(replace(request, strength=strength, guidance_scale=self._guidance))
                asked[fresh[-1]] = request
            return fresh

        for results in self._generate.stream(changed):
            yield [(asked.pop(request), result) for request, result in results]


class Subset:
    """The captions and variants of one choice of images. Ranks of similarities are of these images alone.

    Args:
        folder: where both are kept; nothing else may be in there.
        images: the images, with their labels and class names.
        device: where models run.
        dtype: of the generator; ``None``: what suits the device.
        captioner, scorer: as `SGIDAugment` takes them.
        measure: what ranks the images: ``prompt`` or ``label``, see `Variants`.
        guidance: the scale, if it is the strength that follows the ranks; else ``None``.
    """

    def __init__(
        self,
        folder: Path,
        images: Labelled,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        captioner: str = "auto",
        scorer: str = "auto",
        measure: str = "prompt",
        guidance: float | None = None,
    ) -> None:
        self.folder, self.images, self.device, self.dtype = folder, images, device, dtype
        self.captioner, self.scorer = captioner, scorer
        self.measure, self.guidance = measure, guidance
        folder.mkdir(parents=True, exist_ok=True)
        # Without fsync: a power cut may cost variants, which are then made again.
        self.variants = VariantStore(folder / "variants", fsync=False)
        self.captions = CaptionStore(folder / "captions.sqlite")

    def augment(self, recipe: Recipe, *, p: float, k: int) -> SGIDAugment:
        """The transform that reads this subset's variants and makes none."""
        return SGIDAugment(
            recipe=recipe,
            captions=self.captions,
            variants=self.variants,
            p=p,
            variants_per_image=k,
            on_miss="original",
            class_names=list(self.images.classes),
            device=self.device,
            captioner=self.captioner,
            scorer=self.scorer,
        )

    def make(self, recipe: Recipe, k: int, *, progress: bool = False) -> Made:
        """Make what is missing of ``k`` variants of every image, after captioning the images.

        Raises:
            RuntimeError: a variant cannot be made at all.
        """
        sgid = self.augment(recipe, p=1.0, k=k)
        sgid.prepare(self.images, progress=progress)
        if self.measure == "label":
            self._rank_by_label(sgid)
        address = Address(recipe, self.captions)
        wanted: list[Wanted] = []
        rejected = 0
        for index in range(len(self.images)):
            image, label = self.images[index]
            key = sgid.key_of(image)
            record = self.captions.get(key)
            for number in range(k):
                place = None if record is None else address.key(record, number)
                if place is not None and self.variants.contains(recipe, place, number):
                    continue
                if place is not None and self.variants.failure(recipe, place, number) is not None:
                    rejected += 1
                    continue
                wanted.append(Wanted(key, number, image, self.images.classes[label]))
        rejected += self._run(sgid, wanted, progress)
        return Made(len(self.images) * k, rejected)

    def _rank_by_label(self, sgid: SGIDAugment) -> None:
        """Replace the similarities by CLIP's probability of the label."""
        clip = CLIPScorer(sgid.scorer, device=self.device)
        pictures = [self.images[index] for index in range(len(self.images))]
        names = list(self.images.classes)
        features = clip.image_features([to_uint8_chw(image) for image, _ in pictures])
        probabilities = clip.probabilities(features, names)[range(len(pictures)), [label for _, label in pictures]]
        found = {sgid.key_of(image): float(one) for (image, _), one in zip(pictures, probabilities, strict=True)}
        self.captions.set_similarities(found)
        self.captions.set_ranks()

    def _run(self, sgid: SGIDAugment, wanted: Sequence[Wanted], progress: bool) -> int:
        if not wanted:
            return 0
        options = {} if self.dtype is None else {"dtype": self.dtype}
        spec = BuilderSpec(sgid.recipe, self.variants, self.captions, device=self.device, scorer=sgid.scorer, options=options)
        builder = spec.build()
        if self.guidance is not None:
            strength = sgid.recipe.strength
            low, high = strength if isinstance(strength, tuple) else (strength, strength)
            builder.generate = RankedStrength(builder.generate, (low, high), self.guidance)
        rejected = 0
        with tqdm(total=len(wanted), desc="variants", unit="img", disable=not progress) as bar:
            for group in builder.stream(pull_from(wanted)):
                for one, outcome in group:
                    if outcome.status is Status.FAILED:
                        raise RuntimeError(f"variant {one.variant} of {one.key}: {outcome.reason}")
                    rejected += outcome.status is Status.FILTERED
                bar.update(len(group))
        return rejected
