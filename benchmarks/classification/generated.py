"""Captions and variants of the images of one run, made once and kept; what is there already is not made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sgid_transforms import CaptionStore, Recipe, SGIDAugment, VariantStore
from sgid_transforms.building.builder import VariantJob
from sgid_transforms.building.factory import MakerSpec

from .data import Labelled

_CHUNK = 128  # variants that are handed over at once: several batches, so that the engine can fill them


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
        jobs: list[VariantJob] = []
        rejected = 0
        for index in range(len(self.images)):
            image, label = self.images[index]
            key = sgid.key_of(image)
            for number in range(k):
                if self.variants.contains(recipe, key, number):
                    continue
                if self.variants.failure(recipe, key, number) is not None:
                    rejected += 1
                    continue
                jobs.append(VariantJob(key, number, image, self.images.classes[label], None))
        rejected += self._run(sgid, jobs, progress)
        return Made(len(self.images) * k, rejected)

    def _run(self, sgid: SGIDAugment, jobs: Sequence[VariantJob], progress: bool) -> int:
        if not jobs:
            return 0
        clip = sgid.scorer if isinstance(sgid.scorer, str) else None
        options = {} if self.dtype is None else {"dtype": self.dtype}
        spec = MakerSpec(sgid.recipe, self.variants, self.captions, device=self.device, clip=clip, options=options)
        maker = spec.build()
        rejected = 0
        with tqdm(total=len(jobs), desc="variants", unit="img", disable=not progress) as bar:
            for start in range(0, len(jobs), _CHUNK):
                chunk = jobs[start : start + _CHUNK]
                records = self.captions.get_many([job.key for job in chunk])
                full = []
                for job in chunk:
                    record = records[job.key]
                    scores = (record.similarity, record.rank)
                    full.append(VariantJob(job.key, job.variant, job.image, job.label, record.caption, *scores))
                for job, outcome in zip(full, maker(full), strict=True):
                    if outcome.error is not None or (outcome.reason or "").startswith("error"):
                        raise RuntimeError(f"variant {job.variant} of {job.key}: {outcome.error or outcome.reason}")
                    rejected += outcome.image is None
                bar.update(len(chunk))
        return rejected
