"""From "variant 2 of this image" to a stored variant: used by the service, and by a process without a service."""

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import Any

from sgid_transforms.building.address import Address
from sgid_transforms.building.wanted import Outcome, Status, Wanted
from sgid_transforms.captions.prepare import Describer
from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import ServiceError, SGIDError, StoreError
from sgid_transforms.generation.requests import GenerationRequest, GenerationResult, in_batches, pull_from
from sgid_transforms.models.captioner import BLIP
from sgid_transforms.models.loading import own_device
from sgid_transforms.recipe.guidance import guidance_scale, variant_seed, variant_strength
from sgid_transforms.recipe.prompts import build_prompt
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.variants import layout
from sgid_transforms.variants.provenance import Provenance
from sgid_transforms.variants.store import VariantStore

_log = logging.getLogger("sgid_transforms")

_MAX_BYTES = 96 << 20  # of the originals that the model works on at a time
_MAX_STORING = 64  # variants that wait to be stored,
_MAX_STORING_BYTES = 16 << 20  # and the size of their originals: photos are stored before the model goes on

CLIP = "openai/clip-vit-base-patch32"

Generate = Callable[[Sequence[GenerationRequest]], Sequence[GenerationResult]]
"""What makes images: a :class:`Generator`, or anything that is called like one."""

GeneratorFactory = Callable[..., Generate]
"""``factory(recipe, device, **options)`` returns what makes images; it must pickle to run in a service."""


@dataclass(frozen=True)
class BuilderSpec:
    """All that is needed to set up a `Builder` in any process; small when pickled.

    Args:
        recipe: What to make.
        variants: Where variants live.
        captions: Where captions live.
        device: Where the models run.
        generator: Loads the generator; None: the package's own.
        options: Keyword arguments for it.
        captioner: The captioner that captions on demand; None: no captions on demand.
        scorer: The CLIP model that scores them, also used by the recipe's filters.
        labels: Class names that the label check chooses from; None: those of the caption store.
        count: Called with increments as keyword arguments, named after the counters.
        batch_size: Requests that a generator without a ``stream`` gets at once.
    """

    recipe: Recipe
    variants: VariantStore
    captions: CaptionStore
    device: str = "cpu"
    generator: GeneratorFactory | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    captioner: Any = None
    scorer: Any = None
    labels: Sequence[str] | None = None
    count: Callable[..., None] | None = None
    batch_size: int = 32

    def build(self) -> "Builder":
        """Load the models.

        Raises:
            ModelLoadError: A model cannot be loaded.
            ServiceError: CUDA is requested in a forked process.
        """
        options, device = dict(self.options), own_device(self.device)
        if self.generator is None:
            options = self._filter_options() | options
        try:
            generate = (self.generator or load_generator)(self.recipe, device, **options)
        except RuntimeError as error:
            if "forked subprocess" in str(error):
                raise ServiceError(
                    "this process was forked from one that uses CUDA, so it cannot use CUDA itself; "
                    "run the loop inside `with sgid.serve(device='cuda')`: its own process then owns the model"
                ) from error
            raise
        describer = None
        if self.captioner is not None:
            mode = self.recipe.caption_mode
            describer = Describer(self.recipe.prompt, self.captioner, self.scorer, device, mode=mode)
        size = self.batch_size
        return Builder(
            self.recipe, generate, self.variants, self.captions, describer=describer, count=self.count, batch_size=size
        )

    def _filter_options(self) -> dict[str, Any]:
        """What the recipe's filters need: the class names to tell a label from, and a CLIP model."""
        options: dict[str, Any] = {} if self.scorer is None else {"clip": self.scorer}
        if self.recipe.filters.label_check != "none":
            known = {record.label for record in self.captions if record.label} if self.labels is None else self.labels
            options["labels"] = sorted(known)
        return options


class Builder:
    """Makes and stores variants of one recipe. It belongs to one thread at a time.

    Args:
        recipe: What to make.
        generate: The generator. Its ``tokenizer`` and ``max_tokens``, if any, limit the prompts; its ``stream``, if any, pulls
            waiting requests whenever it has room.
        variants: Where variants are looked up and stored.
        captions: What is known about the images, and where captions written on demand are kept.
        describer: Writes captions on demand; None: an image without a caption cannot have a variant.
        count: Called with increments as keyword arguments, named after the counters.
        batch_size: Requests that a generator without a ``stream`` gets at once.
    """

    def __init__(
        self,
        recipe: Recipe,
        generate: Generate,
        variants: VariantStore,
        captions: CaptionStore,
        *,
        describer: Describer | None = None,
        count: Callable[..., None] | None = None,
        batch_size: int = 32,
    ) -> None:
        self.recipe, self.generate, self.variants, self.captions = recipe, generate, variants, captions
        self.batch_size = batch_size
        self._address = Address(recipe, captions)
        self._describer = describer
        self._count = count or (lambda **counts: None)
        self._versions = _versions()
        self._warned = False

    def __call__(self, wanted: Sequence[Wanted]) -> list[Outcome]:
        """Make variants, unless they exist already; equal requests are deduplicated.

        Raises:
            Exception: What the generator raises. A request that it could not fulfil is an outcome with a ``reason``.
        """
        unique = {one.name: one for one in wanted}
        outcomes: dict[tuple[str, int], Outcome] = {}
        try:
            for group in self.stream(pull_from(list(unique.values()))):
                for one, outcome in group:
                    outcomes[one.name] = outcome
                    self.count(outcome)
        except Exception:
            self._count(failed=len(unique) - len(outcomes))
            raise
        return [outcomes[one.name] for one in wanted]

    def count(self, outcome: Outcome) -> None:
        """Count an outcome. `stream` does not count; its caller does."""
        if outcome.counter is not None:
            self._count(**{outcome.counter: 1})

    def stream(self, pull: Callable[[int], Sequence[Wanted]]) -> Iterator[list[tuple[Wanted, Outcome]]]:
        """Pull wanted variants whenever the generator has room for them, and yield each group that is done.

        Args:
            pull: Hands over up to the given number of waiting variants, or fewer if fewer wait. When it returns none and all
                work is done, the stream ends. Large photos are pulled in smaller numbers.
        """
        asked: dict[GenerationRequest, tuple[Wanted, CaptionRecord, str]] = {}
        done: list[tuple[Wanted, Outcome]] = []
        storing: deque[tuple[Wanted, Future[Outcome]]] = deque()
        largest = 0

        def source(room: int) -> list[GenerationRequest]:
            nonlocal largest
            requests: list[GenerationRequest] = []
            while len(requests) < room:
                held = sum(request.image.numel() for request in asked) + 2 * sum(one.image.numel() for one, _ in storing)
                left = _MAX_BYTES - held
                fits = left // largest if largest else 1
                if asked and fits < 1:
                    break
                fresh = pull(min(room - len(requests), max(fits, 1)))
                if not fresh:
                    break
                largest = max(largest, *(one.image.numel() for one in fresh))
                for one, plan in self._plans(fresh):
                    if isinstance(plan, Outcome):
                        done.append((one, plan))
                    else:
                        request, record, key = plan
                        asked[request] = one, record, key
                        requests.append(request)
            return requests

        stream = getattr(self.generate, "stream", None) or partial(in_batches, self.generate, self.batch_size)
        # A thread of its own encodes and stores, so that the device does not wait for the disk.
        with ThreadPoolExecutor(1, "sgid-writer") as writer:
            try:
                in_steps = False  # a stream that hands over after each step is soon here again; others may take minutes
                for results in stream(source):
                    in_steps = in_steps or not results
                    storing += [
                        (asked[request][0], writer.submit(self._finish, *asked.pop(request), request, result))
                        for request, result in results
                    ]
                    del results  # else their pixels stay in memory until the next group
                    while storing and (storing[0][1].done() or not in_steps or self._is_much(storing)):
                        done.append((storing[0][0], storing.popleft()[1].result()))
                    if done:
                        yield done
                        done = []
            except Exception:  # what is made already is stored, and its callers are told so
                yield done + [(one, outcome.result()) for one, outcome in storing if outcome.exception() is None]
                raise
            done += [(one, outcome.result()) for one, outcome in storing]
        if done:
            yield done

    @staticmethod
    def _is_much(storing: Collection[tuple[Wanted, Any]]) -> bool:
        return len(storing) > _MAX_STORING or sum(one.image.numel() for one, _ in storing) > _MAX_STORING_BYTES

    def _plans(
        self, wanted: Sequence[Wanted]
    ) -> Iterator[tuple[Wanted, Outcome | tuple[GenerationRequest, CaptionRecord, str]]]:
        """The request to the model for each wanted variant, or its outcome if no request is needed."""
        named: list[Wanted] = []
        for one in wanted:  # one malformed request must not fail the others
            try:
                layout.stem(one.key, one.variant)
                named.append(one)
            except StoreError as error:
                yield one, Outcome(Status.FAILED, str(error), made=True)
        wanted = named
        records = self.captions.get_many({one.key for one in wanted})
        undescribed = {one.key: one for one in wanted if one.key not in records}
        if undescribed and self._describer is not None:
            bare = [
                (CaptionRecord(key, "", label=one.label), one.image)
                for key, one in undescribed.items()
                if one.label is not None
            ]
            described = self._describer.describe(bare) if bare else []
            self._write(lambda: self.captions.put_many(described), "captions")
            records |= {record.key: record for record in described}
        for one in wanted:
            record = records.get(one.key)
            try:
                key = None if record is None else self._address.key(record, one.variant, one.label)
            except SGIDError as error:  # no contexts to draw from
                yield one, Outcome(Status.FAILED, str(error), made=True)
                continue
            if record is None or key is None:
                lacking = "caption" if record is None else "label"
                yield one, Outcome(Status.FAILED, f"image {one.key} has no {lacking}; call sgid.prepare(dataset)")
            elif self.variants.contains(self.recipe, key, one.variant):
                yield one, Outcome(Status.STORED)
            elif (reasons := self.variants.failure(self.recipe, key, one.variant)) is not None:
                yield one, Outcome(Status.FILTERED, ", ".join(reasons) or "filtered")
            else:
                try:
                    yield one, (self._request(one, record), record, key)
                except SGIDError as error:  # a label that does not fit into the text encoder, for instance
                    yield one, Outcome(Status.FAILED, str(error), made=True)

    def _request(self, one: Wanted, record: CaptionRecord) -> GenerationRequest:
        recipe, fingerprint = self.recipe, self.recipe.fingerprint
        tokenizer = getattr(self.generate, "tokenizer", None)
        max_tokens = getattr(self.generate, "max_tokens", None) if tokenizer is not None else None
        label = record.label or one.label or ""
        caption, _ = self._address.caption(record, one.variant)
        return GenerationRequest(
            image=one.image,
            prompt=build_prompt(recipe.prompt, record.words or label, caption, tokenizer=tokenizer, max_tokens=max_tokens),
            negative_prompt=recipe.negative_prompt,
            strength=variant_strength(recipe.strength, fingerprint, one.key, one.variant, recipe.seed),
            guidance_scale=guidance_scale(recipe.guidance, record.rank),
            seed=variant_seed(fingerprint, one.key, one.variant, recipe.seed),
            label=label or None,
            id=f"{one.key}-{one.variant}",
        )

    def _finish(
        self, one: Wanted, record: CaptionRecord, key: str, request: GenerationRequest, result: GenerationResult
    ) -> Outcome:
        """Store what was made, or remember that it cannot be made."""
        made = result.image
        if made is None and result.failed:
            return Outcome(Status.FAILED, result.reason or "no image", made=True)
        if made is None:
            reasons = result.rejected or (result.reason or "no image",)
            self._write(lambda: self.variants.put_failure(self.recipe, key, one.variant, reasons), "variants")
            return Outcome(Status.FILTERED, result.reason or "filtered", made=True)
        provenance = self._provenance(one, request, record, result)
        if self._write(lambda: self.variants.put(self.recipe, key, one.variant, made, provenance), "variants"):
            return Outcome(Status.STORED, made=True)
        return Outcome(Status.STORED, image=made, made=True)

    def _write(self, write: Callable[[], object], what: str) -> bool:
        """Whether ``write`` succeeded. If a store cannot be written, variants are not reused, but training goes on."""
        try:
            write()
        except StoreError as error:
            if not self._warned:
                _log.warning("%s cannot be stored and are made again every time: %s", what, error)
            self._warned = True
            return False
        return True

    def _provenance(
        self, one: Wanted, request: GenerationRequest, record: CaptionRecord, result: GenerationResult
    ) -> Provenance:
        recipe = self.recipe
        caption, lender = self._address.caption(record, one.variant)
        extra: dict[str, Any] = {} if recipe.lora is None else {"lora": recipe.lora, "lora_scale": recipe.lora_scale}
        if lender != record.key:
            extra["caption_from"] = lender
        return Provenance(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=result.seed,
            strength=result.strength,
            guidance_scale=request.guidance_scale,
            similarity=record.similarity,
            label_score=result.label_score,
            image_similarity=result.image_similarity,
            model=recipe.model,
            revision=recipe.revision,
            sampler=recipe.sampler,
            num_inference_steps=recipe.num_inference_steps,
            attempt=result.attempt,
            label=request.label,
            caption=caption,
            versions=self._versions,
            extra=extra,
        )


def auto_models(recipe: Recipe, captioner: Any = "auto", scorer: Any = "auto") -> tuple[Any, Any]:
    """Captioner and scorer, where ``"auto"`` stands for those that fit the recipe's model: the bundled ones for ``"tiny"``,
    else BLIP and CLIP."""
    bundled = recipe.model == "tiny"
    return (
        ("tiny" if bundled else BLIP) if captioner == "auto" else captioner,
        ("tiny" if bundled else CLIP) if scorer == "auto" else scorer,
    )


def load_generator(recipe: Recipe, device: str, **options: Any) -> Generate:
    """The package's own generator."""
    from sgid_transforms.generation.generator import Generator

    generator: Generate = Generator.from_recipe(recipe, device=device, **options)
    return generator


def _versions() -> Mapping[str, str]:
    return {name: metadata.version(name) for name in ("sgid-transforms", "torch", "diffusers", "transformers")}
