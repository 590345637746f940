"""The generator: requests in, filtered images out, whatever the model is."""

from __future__ import annotations

import inspect
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch

from sgid_transforms.errors import DeviceLostError, GenerationError, RecipeError
from sgid_transforms.generation.adapters import PipelineAdapter
from sgid_transforms.generation.batching import is_device_lost
from sgid_transforms.generation.engine import NativeEngine
from sgid_transforms.generation.filters import ImageFilter, Verdict, needs_clip, retry_seed, retry_strength
from sgid_transforms.generation.requests import (
    Answers,
    Engine,
    GenerationRequest,
    GenerationResult,
    Pull,
    RejectedImageError,
    answer_all,
    check_text,
)
from sgid_transforms.models.clip import CLIPScorer
from sgid_transforms.models.loading import (
    check_device,
    compile_pipeline,
    default_dtype,
    load_pipeline,
    padded_sizes,
    records_graphs,
)
from sgid_transforms.recipe.guidance import SimilarityGuidance
from sgid_transforms.recipe.prompts import build_prompt
from sgid_transforms.recipe.recipe import Filters, Recipe

_InWork = dict[GenerationRequest, tuple[GenerationRequest, GenerationResult]]
"""A request that the engine is working on -> the original request, and its result so far."""


@dataclass(frozen=True)
class GeneratorStats:
    """What the generator did since it was made.

    Args:
        requests: requests that were received.
        images: requests that got an image.
        filtered: requests that got none, because every attempt was rejected.
        errors: requests that got none, because they could not be run.
        attempts: attempts to make an image, including retries.
        rejected: rejected attempts by reason.
        evaluations: rows that the model evaluated for all attempts.
    """

    requests: int = 0
    images: int = 0
    filtered: int = 0
    errors: int = 0
    attempts: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    evaluations: int = 0

    @property
    def retries(self) -> int:
        """Attempts beyond the first one of each request that could be run."""
        return self.attempts - (self.images + self.filtered + self.errors)


class Generator:
    """Runs requests through an engine, filters the images, and retries rejected ones.

    Use it from one thread at a time; `sgid_transforms.service` shares one generator among processes.

    Args:
        engine: a `NativeEngine`, a `PipelineAdapter`, or anything else that follows `Engine`.
        filters: what an image must pass.
        labels: class names of the data set, for the label check.
        scorer: the CLIP model of the filters; ``None``: the bundled one, loaded if a filter needs it.
        strength_range: the range in which a retry may choose its strength; ``None``: from half of the request's own to 1.
        safety_pipeline: the pipeline whose safety checker looks at finished images, if the engine does not do that.

    Raises:
        RecipeError: the filters need class names, and there are none.

    Examples:
        >>> generator = Generator.from_recipe(Recipe(model="tiny"))
        >>> image = v2.functional.pil_to_tensor(ImageFolder("train")[0][0])
        >>> [result] = generator([GenerationRequest(image, "a photo of a cat", strength=0.7, seed=1)])
        >>> result.image.shape, result.ok
        (torch.Size([3, 32, 32]), True)
    """

    def __init__(
        self,
        engine: Engine,
        *,
        filters: Filters | None = None,
        labels: Sequence[str] | None = None,
        scorer: CLIPScorer | None = None,
        strength_range: tuple[float, float] | None = None,
        safety_pipeline: Any = None,
    ) -> None:
        self.engine = engine
        self.filters = Filters() if filters is None else filters
        if scorer is None and needs_clip(self.filters):
            scorer = CLIPScorer().load()
        self._filter = ImageFilter(self.filters, labels=labels, scorer=scorer, pipeline=safety_pipeline)
        self._range = strength_range
        self._counts: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        batch_size: int | str = "auto",
        *,
        vae_batch_size: int | None = None,
        labels: Sequence[str] | None = None,
        clip: Any = "tiny",
        channels_last: bool | None = None,
        compile: bool | str = False,
        latent_cache: str | PathLike[str] | None = None,
        pipeline: Any = None,
        **loading: Any,
    ) -> Generator:
        """Load a recipe's model and make a generator from it.

        Args:
            recipe: what to generate.
            device: where to run.
            dtype: ``None``: float32 on a CPU, bfloat16 (or float16) on an accelerator; a given pipeline keeps its own.
            batch_size: samples in one call of the model; ``"auto"``: what the device's free memory suggests. It is halved
                when memory runs out.
            vae_batch_size: images in one call of the autoencoder, if fewer; native path only.
            labels: class names of the data set, for the label check.
            clip: the CLIP model of the filters: ``"tiny"``, a folder, a hub id, or a `CLIPScorer`.
            channels_last: memory format of the native path; ``None``: what is faster on the device.
            compile: compile the network's repeated blocks: ``True``, or a mode of ``torch.compile``, such as
                ``"reduce-overhead"``, which records CUDA graphs.
            latent_cache: folder for encoded input images, reused by further variants; native path only.
            pipeline: a loaded pipeline to use instead of loading the recipe's model. The recipe's ``revision`` must then name
                it, so that its variants are not taken for those of the model's own weights.
            loading: further arguments of `load_pipeline`: ``variant``, ``local_files_only``, ``attention``, ``cpu_offload``.

        Raises:
            ModelLoadError: the model cannot be loaded.
            RecipeError: the recipe does not fit the model.
        """
        device = check_device(device)
        unknown = sorted(set(loading) - set(inspect.signature(load_pipeline).parameters))
        if unknown:
            raise RecipeError(f"{', '.join(unknown)} is not an option of the generator; see load_pipeline")
        choose_batch_size(batch_size, torch.device("cpu"))  # refuses a wrong one before anything is loaded
        loaded = pipeline is None
        if loaded:
            dtype = default_dtype(device) if dtype is None else dtype
            loading |= {"lora": recipe.lora, "lora_scale": recipe.lora_scale}
            pipeline = load_pipeline(recipe.model, revision=recipe.revision, device=device, dtype=dtype, **loading)
        elif recipe.revision is None:
            raise RecipeError(
                "a pipeline that was loaded already needs a name, so that its variants are found again and not taken for those "
                "of other weights; set the recipe's revision to one of your own, such as 'my pipeline, 1'"
            )
        elif loading:
            raise RecipeError(
                f"{', '.join(sorted(loading))} says how to load a model, but a loaded pipeline was given; leave one out"
            )
        if not recipe.filters.reject_nsfw:
            _drop_safety_checker(pipeline)
        mode = compile if isinstance(compile, str) else None
        if compile:
            compile_pipeline(pipeline, mode=mode)
        place = None if loaded else device  # offloaded modules must stay where they are
        size = choose_batch_size(batch_size, device)
        engine: Engine
        if NativeEngine.supports(pipeline) is None:
            engine = NativeEngine(
                pipeline,
                sampler=recipe.sampler,
                num_inference_steps=recipe.num_inference_steps,
                guidance_interval=recipe.guidance_interval,
                exact_strength=bool(recipe.exact_strength),
                resolution=recipe.resolution,
                batch_size=size,
                vae_batch_size=vae_batch_size,
                device=place,
                dtype=dtype,
                channels_last=channels_last,
                latent_cache=latent_cache,
                row_sizes=padded_sizes(2 * size) if records_graphs(mode) else None,
            )
        else:
            _check_adapter_recipe(recipe, pipeline)
            engine = PipelineAdapter(
                pipeline,
                sampler=recipe.sampler,
                num_inference_steps=recipe.num_inference_steps,
                resolution=recipe.resolution,
                batch_size=size,
                device=place,
            )
        strength = recipe.strength if isinstance(recipe.strength, tuple) else (recipe.strength, recipe.strength)
        _check_requests(recipe, engine, strength[0])
        return cls(
            engine,
            filters=recipe.filters,
            labels=labels,
            scorer=_scorer(clip, device) if needs_clip(recipe.filters) else None,
            strength_range=strength,
            # a pipeline that runs its own call uses its own checker
            safety_pipeline=pipeline if isinstance(engine, NativeEngine) else None,
        )

    @property
    def tokenizer(self) -> Any:
        """The tokenizer whose limit binds prompts, or ``None``."""
        return self.engine.tokenizer

    @property
    def max_tokens(self) -> int | None:
        """Longest prompt in tokens, start and end included, or ``None``."""
        return self.engine.max_tokens

    def stats(self) -> GeneratorStats:
        """Counts since the generator was made."""
        return GeneratorStats(rejected=dict(self._rejected), **self._counts)

    def __call__(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """One result per request, in order. A request that fails has a reason in its result and does not affect the others."""
        return answer_all(self.stream, requests)

    def stream(self, pull: Pull) -> Iterator[list[tuple[GenerationRequest, GenerationResult]]]:
        """Pull requests whenever the engine has room for them, and yield each group that is done, in no particular order.

        Args:
            pull: Hands over up to the given number of waiting requests, or fewer if fewer wait. When it returns none and all
                work is done, the stream ends.

        Raises:
            DeviceLostError: the device stopped working.
        """
        try:
            yield from self._stream(pull)
        except RuntimeError as error:
            if not is_device_lost(error):
                raise
            said = str(error).partition("\n")[0]
            raise DeviceLostError(
                f"the device stopped working ({said}), so this process can make nothing more; start it again: what was stored "
                "is kept"
            ) from error

    def _stream(self, pull: Pull) -> Iterator[list[tuple[GenerationRequest, GenerationResult]]]:
        again: deque[GenerationRequest] = deque()
        in_work: _InWork = {}
        done: list[tuple[GenerationRequest, GenerationResult]] = []

        def source(room: int) -> list[GenerationRequest]:
            taken = [again.popleft() for _ in range(min(room, len(again)))]
            while len(taken) < room and (fresh := pull(room - len(taken))):
                for request in fresh:
                    self._counts["requests"] += 1
                    result = GenerationResult(None, seed=request.seed, strength=request.strength)
                    try:
                        self._filter.check_request(request)
                    except Exception as error:
                        done.append((request, self._failed(result, error)))
                    else:
                        in_work[request] = request, result
                        taken.append(request)
            return taken

        while True:
            for answers in self.engine.stream(source):
                done += self._judge(answers, in_work, again)
                del answers  # else their pixels stay in memory until the next group
                yield done
                done = []
            if done:  # refused before the engine saw them
                yield done
                done = []
            elif not again:
                return

    def _judge(
        self,
        answers: Answers,
        in_work: _InWork,
        again: deque[GenerationRequest],
    ) -> list[tuple[GenerationRequest, GenerationResult]]:
        """Sort answers into results and requests to retry, which go to ``again`` and ``in_work``."""
        images = {request: answer for request, answer in answers if not isinstance(answer, Exception)}
        verdicts = dict(zip(images, self._filter(list(images.values()), list(images)), strict=True))
        done: list[tuple[GenerationRequest, GenerationResult]] = []
        for current, answer in answers:
            asked, result = in_work.pop(current)
            if isinstance(answer, Exception) and not isinstance(answer, RejectedImageError):
                done.append((asked, self._failed(result, answer)))
                continue
            verdict = Verdict(answer.reason) if isinstance(answer, RejectedImageError) else verdicts[current]
            rows = self.engine.evaluations(current)
            self._counts["attempts"] += 1
            self._counts["evaluations"] += rows
            result = replace(
                result,
                label_score=verdict.label_score,
                image_similarity=verdict.image_similarity,
                unet_evaluations=result.unet_evaluations + rows,
            )
            if verdict.reason is None:
                self._counts["images"] += 1
                done.append((asked, replace(result, image=images[current])))
                continue
            self._rejected[verdict.reason] += 1
            result = replace(result, rejected=(*result.rejected, verdict.reason))
            if result.attempt >= self.filters.max_retries:
                self._counts["filtered"] += 1
                done.append((asked, replace(result, reason=verdict.reason)))
                continue
            attempt = result.attempt + 1
            following = self._retry(asked, current, attempt, verdict.reason)
            in_work[following] = asked, replace(result, attempt=attempt, seed=following.seed, strength=following.strength)
            again.append(following)
        return done

    def _retry(self, asked: GenerationRequest, current: GenerationRequest, attempt: int, reason: str) -> GenerationRequest:
        """The next attempt: another seed, and another strength if that leaves a step to run."""
        low, high = self._range or (asked.strength / 2, 1.0)
        seed, strength = retry_seed(asked.seed, attempt), retry_strength(current.strength, reason, low, high)
        following = replace(current, seed=seed, strength=strength)
        try:
            self.engine.evaluations(following)
        except GenerationError:
            return replace(current, seed=seed)
        return following

    def _failed(self, result: GenerationResult, error: Exception) -> GenerationResult:
        self._counts["errors"] += 1
        self._counts["attempts"] += 1
        return replace(result, reason=f"error: {error}", failed=True)


def choose_batch_size(batch_size: int | str, device: torch.device) -> int:
    """The initial batch size: the given number, or with ``"auto"`` one that suits the device.

    ``"auto"`` is 16 on a CPU (small models) and, on an accelerator that tells its free memory, one sample for each GB of it,
    from 1 to 32, which fits SDXL-sized models in half precision. Engines halve it when memory runs out.

    Raises:
        RecipeError: neither a positive number nor ``"auto"``.
    """
    if batch_size == "auto":
        backend = torch.get_device_module(device)
        if device.type == "cpu" or not hasattr(backend, "mem_get_info"):
            return 16
        free, _ = backend.mem_get_info(device)
        return int(min(max(free // 2**30, 1), 32))
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise RecipeError(f"batch_size {batch_size!r} is neither 'auto' nor a number from 1 up; use for example 8")
    return batch_size


def _scorer(clip: Any, device: torch.device) -> Any:
    if isinstance(clip, str):
        return CLIPScorer(clip, device=device).load()
    if not hasattr(clip, "image_features") or not hasattr(clip, "probabilities"):
        raise RecipeError(
            f"the recipe's filters need a CLIP model, but the scorer is a {type(clip).__name__} without image_features and "
            "probabilities; give the id of a CLIP model"
        )
    return clip


def _check_requests(recipe: Recipe, engine: Engine, strength: float) -> None:
    """Refuse what would fail for every image: a strength that runs no step, texts that are too long."""
    guidance = recipe.guidance.high if isinstance(recipe.guidance, SimilarityGuidance) else recipe.guidance
    shortest = build_prompt(recipe.prompt, "x", "")
    try:
        engine.evaluations(GenerationRequest(torch.zeros(3, 1, 1, dtype=torch.uint8), shortest, strength=strength))
        if engine.tokenizer is not None and engine.max_tokens is not None:
            check_text(shortest, engine.tokenizer, engine.max_tokens)
            if guidance > 1:
                check_text(recipe.negative_prompt, engine.tokenizer, engine.max_tokens, "negative prompt")
    except GenerationError as error:
        raise RecipeError(str(error)) from error


def _check_adapter_recipe(recipe: Recipe, pipeline: Any) -> None:
    if recipe.guidance_interval != (0.0, 1.0):
        raise RecipeError(
            f"guidance_interval {recipe.guidance_interval} needs the native path, and {type(pipeline).__name__} runs its own "
            "call; use (0.0, 1.0)"
        )
    if recipe.exact_strength:
        raise RecipeError(
            f"exact_strength needs the native path, and {type(pipeline).__name__} runs its own call; set it to false"
        )


def _drop_safety_checker(pipeline: Any) -> None:
    """Without the filter, a flagged image must be returned unchanged, not as the black image that the checker makes of it."""
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.register_modules(safety_checker=None)
