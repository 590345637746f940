"""From "variant 2 of this image" to a stored variant: what the service runs, and a process without a service, too."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, Protocol

import torch

from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import SGIDError, StoreError
from sgid_transforms.generation.requests import GenerationRequest, GenerationResult
from sgid_transforms.recipe.guidance import guidance_scale, variant_seed, variant_strength
from sgid_transforms.recipe.prompts import build_prompt
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.service.protocol import Item
from sgid_transforms.variants.codec import resolve_format
from sgid_transforms.variants.provenance import Provenance
from sgid_transforms.variants.store import VariantStore

_log = logging.getLogger("sgid_transforms")

Generate = Callable[[Sequence[GenerationRequest]], Sequence[GenerationResult]]
"""What makes images: a :class:`Generator`, or anything that is called like one."""


class Describe(Protocol):
    """Captions and scores images on demand."""

    def __call__(self, images: Sequence[torch.Tensor], labels: Sequence[str]) -> list[tuple[str, float | None]]: ...


@dataclass(frozen=True, eq=False)
class VariantJob:
    """One variant that is wanted.

    Args:
        key: Of the original image.
        variant: Its number.
        image: The original, uint8 ``(3, H, W)``.
        label: Class name in words.
        caption: None: to be written by a captioner.
        similarity: CLIP cosine of the image and its prompt.
        rank: Of the similarity within the data set, in [0, 1].
    """

    key: str
    variant: int
    image: torch.Tensor
    label: str
    caption: str | None
    similarity: float | None = None
    rank: float | None = None


@dataclass(frozen=True, eq=False)
class VariantOutcome:
    """What became of a job: an image uint8 ``(3, H, W)``, or the ``reason`` why there is none, or an ``error``."""

    image: torch.Tensor | None = None
    reason: str | None = None
    error: str | None = None


class VariantMaker:
    """Makes and stores variants of one recipe. It belongs to one thread at a time.

    Args:
        recipe: What to make.
        generate: The generator. Its ``tokenizer`` and ``max_tokens``, where it has them, bound the prompts.
        variants: Where variants are looked up and stored.
        captions: Where captions written on demand are kept.
        describe: Writes captions on demand; None: a job without a caption is an error.
        count: Called with the name of a counter and an increment.
    """

    def __init__(
        self,
        recipe: Recipe,
        generate: Generate,
        variants: VariantStore,
        *,
        captions: CaptionStore | None = None,
        describe: Describe | None = None,
        count: Callable[[str, int], None] = lambda name, number: None,
    ) -> None:
        self.recipe, self.generate, self.variants = recipe, generate, variants
        self._captions, self._describe, self._count = captions, describe, count
        self._versions = _versions()
        self._unwritable = False

    def __call__(self, jobs: Sequence[VariantJob]) -> list[VariantOutcome]:
        """Make variants, or fetch those that somebody made meanwhile; equal jobs are made once.

        Raises:
            Exception: What the generator raises. A request that it could not fulfil is an outcome with a ``reason``.
        """
        outcomes: dict[tuple[str, int], VariantOutcome] = {}
        todo: dict[tuple[str, int], VariantJob] = {}
        for job in jobs:
            name = (job.key, job.variant)
            if name not in outcomes and name not in todo:
                found = self._stored(job)
                if found is None:
                    todo[name] = job
                else:
                    outcomes[name] = found
        work = self._captioned(list(todo.values()))
        requests = []
        for job in work:
            try:
                requests.append((job, self._request(job)))
            except SGIDError as error:  # a label that does not fit into the text encoder, for instance
                self._count("failed", 1)
                outcomes[job.key, job.variant] = VariantOutcome(error=str(error))
        if requests:
            try:
                results = self.generate([request for _, request in requests])
            except Exception:
                self._count("failed", len(requests))
                raise
            for (job, request), result in zip(requests, results, strict=True):
                outcomes[job.key, job.variant] = self._finish(job, request, result)
        return [outcomes[job.key, job.variant] for job in jobs]

    def _stored(self, job: VariantJob) -> VariantOutcome | None:
        image = self.variants.get_image(self.recipe, job.key, job.variant)
        if image is not None:
            return VariantOutcome(image)
        reasons = self.variants.failure(self.recipe, job.key, job.variant)
        return None if reasons is None else VariantOutcome(reason=", ".join(reasons) or "filtered")

    def _captioned(self, jobs: list[VariantJob]) -> list[VariantJob]:
        """The jobs with captions: those without one are captioned, and the captions kept."""
        bare = [job for job in jobs if job.caption is None]
        if not bare or self._describe is None:
            return jobs
        by_key = {job.key: job for job in bare}
        described = self._describe([job.image for job in by_key.values()], [job.label for job in by_key.values()])
        texts = dict(zip(by_key, described, strict=True))
        if self._captions is not None:
            self._captions.put_many(
                [CaptionRecord(key, *texts[key][:1], label=job.label, similarity=texts[key][1]) for key, job in by_key.items()]
            )
        return [
            job if job.caption is not None else replace(job, caption=texts[job.key][0], similarity=texts[job.key][1])
            for job in jobs
        ]

    def _request(self, job: VariantJob) -> GenerationRequest:
        recipe, fingerprint = self.recipe, self.recipe.fingerprint
        tokenizer = getattr(self.generate, "tokenizer", None)
        max_tokens = getattr(self.generate, "max_tokens", None) if tokenizer is not None else None
        return GenerationRequest(
            image=job.image,
            prompt=build_prompt(recipe.prompt, job.label, job.caption or "", tokenizer=tokenizer, max_tokens=max_tokens),
            negative_prompt=recipe.negative_prompt,
            strength=variant_strength(recipe.strength, fingerprint, job.key, job.variant, recipe.seed),
            guidance_scale=guidance_scale(recipe.guidance, job.rank),
            seed=variant_seed(fingerprint, job.key, job.variant, recipe.seed),
            label=job.label,
            id=f"{job.key}-{job.variant}",
        )

    def _finish(self, job: VariantJob, request: GenerationRequest, result: GenerationResult) -> VariantOutcome:
        made = result.image
        if made is None:
            reason = result.reason or "no image"
            if reason.startswith("error"):  # an accident, to be tried again; a rejection would only repeat itself
                self._count("failed", 1)
                return VariantOutcome(reason=reason)
            self._count("filtered", 1)
            self._write(lambda: self.variants.put_failure(self.recipe, job.key, job.variant, result.rejected or (reason,)))
            return VariantOutcome(reason=reason)
        self._count("generated", 1)
        stored = self._write(
            lambda: self.variants.put(self.recipe, job.key, job.variant, made, self._provenance(job, request, result))
        )
        _, height, width = made.shape
        lossless = resolve_format(self.recipe.image_format, height, width) in ("png", "webp-lossless")
        if stored is None or (stored and lossless):
            return VariantOutcome(made)
        # Another writer was first, or the file's format is lossy: every epoch shall see the same pixels, this one too.
        image = self.variants.get_image(self.recipe, job.key, job.variant)
        return VariantOutcome(made if image is None else image.to(made.device))

    def _write(self, write: Callable[[], bool]) -> bool | None:
        """Call ``write``; a store that cannot be written costs the reuse of variants, not the training."""
        try:
            return write()
        except StoreError as error:
            if not self._unwritable:
                _log.warning("variants cannot be stored and are made again every time: %s", error)
            self._unwritable = True
            return None

    def _provenance(self, job: VariantJob, request: GenerationRequest, result: GenerationResult) -> Provenance:
        recipe = self.recipe
        return Provenance(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=result.seed,
            strength=result.strength,
            guidance_scale=request.guidance_scale,
            similarity=job.similarity,
            label_score=result.label_score,
            image_similarity=result.image_similarity,
            model=recipe.model,
            revision=recipe.revision,
            sampler=recipe.sampler,
            num_inference_steps=recipe.num_inference_steps,
            attempt=result.attempt,
            label=job.label,
            caption=job.caption,
            versions=self._versions,
        )


def job_to_item(fingerprint: str, job: VariantJob) -> Item:
    """A job as it travels to the service."""
    meta = {
        "key": job.key,
        "variant": job.variant,
        "size": list(job.image.shape[1:]),
        "label": job.label,
        "caption": job.caption,
        "similarity": job.similarity,
        "rank": job.rank,
    }
    return Item(f"{fingerprint}/{job.key}/{job.variant}", meta, _to_bytes(job.image))


def item_to_job(item: Item) -> VariantJob:
    """The reverse of :func:`job_to_item`; the image shares the item's memory."""
    meta = dict(item.meta)
    return VariantJob(image=_from_bytes(item.payload, meta.pop("size")), **meta)


def outcome_to_item(ident: str, outcome: VariantOutcome) -> Item:
    """An outcome as it travels back."""
    if outcome.image is None:
        return Item(ident, {"reason": outcome.reason, "error": outcome.error})
    return Item(ident, {"size": list(outcome.image.shape[1:])}, _to_bytes(outcome.image))


def item_to_outcome(item: Item) -> VariantOutcome:
    """The reverse of :func:`outcome_to_item`; also reads the error of a batch that raised."""
    if "size" in item.meta:
        return VariantOutcome(_from_bytes(item.payload, item.meta["size"]))
    return VariantOutcome(reason=item.meta.get("reason"), error=item.meta.get("error"))


class VariantHandler:
    """The service's handler: a :class:`VariantMaker` that speaks in items."""

    def __init__(self, maker: VariantMaker) -> None:
        self.maker = maker

    def __call__(self, items: Sequence[Item]) -> list[Item]:
        outcomes = self.maker([item_to_job(item) for item in items])
        return [outcome_to_item(item.ident, outcome) for item, outcome in zip(items, outcomes, strict=True)]


def _to_bytes(image: torch.Tensor) -> memoryview:
    return image.detach().cpu().contiguous().numpy().data.cast("B")


def _from_bytes(payload: Any, size: Sequence[int]) -> torch.Tensor:
    height, width = size
    return torch.frombuffer(payload, dtype=torch.uint8).view(3, height, width)


def _versions() -> Mapping[str, str]:
    return {name: metadata.version(name) for name in ("sgid-transforms", "torch", "diffusers", "transformers")}
