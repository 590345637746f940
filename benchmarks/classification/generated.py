"""Captions and variants of the images of one run, made once and kept; what is there already is not made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sgid_transforms import CaptionStore, Recipe, SGIDAugment, VariantStore
from sgid_transforms.building.address import Address
from sgid_transforms.building.builder import BuilderSpec
from sgid_transforms.building.wanted import Status, Wanted
from sgid_transforms.generation.requests import pull_from

from .data import Labelled


@dataclass(frozen=True)
class Made:
    """How many variants an image set has: ``wanted``, of which ``rejected`` were not made because a filter said no."""

    wanted: int
    rejected: int


class Subset:
    """The captions and variants of one choice of images. Ranks of similarities are of these images alone.

    Args:
        folder: where both are kept; nothing else may be in there.
        images: the images, with their labels and class names.
        device: where models run.
        dtype: of the generator; ``None``: what suits the device.
        captioner, scorer: as `SGIDAugment` takes them.
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
    ) -> None:
        self.folder, self.images, self.device, self.dtype = folder, images, device, dtype
        self.captioner, self.scorer = captioner, scorer
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

    def _run(self, sgid: SGIDAugment, wanted: Sequence[Wanted], progress: bool) -> int:
        if not wanted:
            return 0
        options = {} if self.dtype is None else {"dtype": self.dtype}
        spec = BuilderSpec(sgid.recipe, self.variants, self.captions, device=self.device, scorer=sgid.scorer, options=options)
        rejected = 0
        with tqdm(total=len(wanted), desc="variants", unit="img", disable=not progress) as bar:
            for group in spec.build().stream(pull_from(wanted)):
                for one, outcome in group:
                    if outcome.status is Status.FAILED:
                        raise RuntimeError(f"variant {one.variant} of {one.key}: {outcome.reason}")
                    rejected += outcome.status is Status.FILTERED
                bar.update(len(group))
        return rejected
