"""The generator: requests in, filtered images out, whatever the model is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from sgid_transforms.errors import GenerationError, RecipeError
from sgid_transforms.generation.adapters import PipelineAdapter
from sgid_transforms.generation.engine import NativeEngine
from sgid_transforms.generation.filters import ImageFilter, Verdict, needs_clip, retry_seed, retry_strength
from sgid_transforms.generation.requests import Engine, GenerationRequest, GenerationResult, RejectedImageError
from sgid_transforms.models.clip import CLIPScorer
from sgid_transforms.models.loading import compile_pipeline, default_dtype, load_pipeline, padded_sizes
from sgid_transforms.recipe.recipe import Filters, Recipe


@dataclass(frozen=True)
class GeneratorStats:
    """What a generator did since it was made.

    Args:
        requests: requests that were asked for.
        images: requests that got an image.
        filtered: requests that got none, because every attempt was rejected.
        errors: requests that got none, because they cannot be run.
        attempts: images that were made or tried, retries among them.
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


@dataclass
class _Task:
    """A request on its way through its attempts."""

    index: int
    original: GenerationRequest
    current: GenerationRequest
    attempt: int = 0
    rejected: tuple[str, ...] = ()
    evaluations: int = 0

    def result(self, image: Tensor | None, reason: str | None, verdict: Verdict | None = None) -> GenerationResult:
        verdict = verdict or Verdict()
        return GenerationResult(
            image=image,
            reason=reason,
            seed=self.current.seed,
            strength=self.current.strength,
            attempt=self.attempt,
            rejected=self.rejected,
            label_score=verdict.label_score,
            image_similarity=verdict.image_similarity,
            unet_evaluations=self.evaluations,
        )


class Generator:
    """Runs requests through an engine, filters what it makes, and tries rejected ones again.

    One thread at a time; `sgid_transforms.service` shares one generator among processes.

    Args:
        engine: a `NativeEngine`, a `PipelineAdapter`, or anything else that follows `Engine`.
        filters: what an image must pass.
        labels: class names of the data set, for the label check.
        scorer: the CLIP model of the filters; ``None``: the bundled one, loaded if a filter needs it.
        strength_range: the range in which a retry may choose its strength; ``None``: from half of the request's own to 1.
        safety_pipeline: the pipeline whose safety checker looks at finished images, where the engine does not.

    Raises:
        RecipeError: the filters need class names, and there are none.
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
        labels: Sequence[str] | None = None,
        clip: str = "tiny",
        channels_last: bool | None = None,
        compile: bool = False,
        latent_cache: str | PathLike[str] | None = None,
        call_options: Mapping[str, Any] | None = None,
        pipeline: Any = None,
        **loading: Any,
    ) -> Generator:
        """Load a recipe's model and make a generator of it.

        Args:
            recipe: what to generate.
            device: where to run.
            dtype: ``None``: float32 on a CPU, bfloat16 (or float16) on an accelerator; a given pipeline keeps its own.
            batch_size: samples in one call of the model; ``"auto"``: what the device's free memory suggests. It is halved
                when memory runs out.
            labels: class names of the data set, for the label check.
            clip: the CLIP model of the filters: ``"tiny"``, a folder, or a hub id.
            channels_last: memory format of the native path; ``None``: what is faster on the device.
            compile: compile the network's repeated blocks, and pad batches to few sizes.
            latent_cache: folder for encoded input images, reused by further variants; native path only.
            call_options: further keyword arguments for every call of a pipeline that is not run natively.
            pipeline: a loaded pipeline to use instead of loading the recipe's model.
            loading: further arguments of `load_pipeline`, such as ``attention``, ``lora``, ``tiny_vae``, ``cpu_offload``.
                What changes pixels is not part of the recipe's fingerprint: give such variants a folder of their own.

        Raises:
            ModelLoadError: the model cannot be loaded.
            RecipeError: the recipe does not fit the model.
        """
        device = torch.device(device)
        size = choose_batch_size(batch_size, device)
        loaded = pipeline is None
        if loaded:
            dtype = default_dtype(device) if dtype is None else dtype
            pipeline = load_pipeline(recipe.model, revision=recipe.revision, device=device, dtype=dtype, **loading)
        elif loading:
            raise RecipeError(
                f"{', '.join(sorted(loading))} says how to load a model, but a loaded pipeline was given; leave one out"
            )
        if not recipe.filters.reject_nsfw:
            _drop_safety_checker(pipeline)
        if compile:
            compile_pipeline(pipeline)
        place = None if loaded else device  # offloaded modules must stay where they are
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
                device=place,
                dtype=dtype,
                channels_last=channels_last,
                latent_cache=latent_cache,
                row_sizes=padded_sizes(2 * size) if compile else None,
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
                call_options=call_options,
            )
        strength = recipe.strength if isinstance(recipe.strength, tuple) else (recipe.strength, recipe.strength)
        return cls(
            engine,
            filters=recipe.filters,
            labels=labels,
            scorer=CLIPScorer(clip, device=device).load() if needs_clip(recipe.filters) else None,
            strength_range=strength,
            # a pipeline that runs its own call asks its own checker
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

    @property
    def limits(self) -> tuple[str, ...]:
        """What the model cannot do, one sentence each; empty on the native path."""
        return tuple(getattr(self.engine, "limits", ()))

    def stats(self) -> GeneratorStats:
        """What was done so far."""
        return GeneratorStats(rejected=dict(self._rejected), **self._counts)

    def __call__(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """One result per request, in order. A request that fails has a reason in its result and takes no other with it."""
        results: dict[int, GenerationResult] = {}
        tasks: list[_Task] = []
        for index, request in enumerate(requests):
            task = _Task(index, request, request)
            try:
                self._filter.check_request(request)
            except Exception as error:
                results[index] = self._failed(task, error)
            else:
                tasks.append(task)
        while tasks:
            answers = self.engine.run([task.current for task in tasks])
            tasks = self._judge(tasks, answers, results)
        self._counts["requests"] += len(requests)
        return [results[index] for index in range(len(requests))]

    def _judge(
        self, tasks: list[_Task], answers: Sequence[Tensor | Exception], results: dict[int, GenerationResult]
    ) -> list[_Task]:
        """Sort answers into results and tasks to be tried again."""
        made: list[tuple[_Task, Tensor]] = []
        again: list[_Task] = []
        for task, answer in zip(tasks, answers, strict=True):
            if isinstance(answer, RejectedImageError):
                self._count_attempt(task)
                self._reject(task, Verdict(answer.reason), again, results)
            elif isinstance(answer, Exception):
                results[task.index] = self._failed(task, answer)
            else:
                self._count_attempt(task)
                made.append((task, answer))
        verdicts = self._filter([image for _, image in made], [task.current for task, _ in made])
        for (task, image), verdict in zip(made, verdicts, strict=True):
            if verdict.reason is not None:
                self._reject(task, verdict, again, results)
            else:
                self._counts["images"] += 1
                results[task.index] = task.result(image, None, verdict)
        return again

    def _reject(self, task: _Task, verdict: Verdict, again: list[_Task], results: dict[int, GenerationResult]) -> None:
        reason = verdict.reason or "rejected"
        self._rejected[reason] += 1
        task.rejected += (reason,)
        if task.attempt >= self.filters.max_retries:
            self._counts["filtered"] += 1
            results[task.index] = task.result(None, reason, verdict)
            return
        low, high = self._range or (task.original.strength / 2, 1.0)
        task.attempt += 1
        seed, strength = retry_seed(task.original.seed, task.attempt), retry_strength(task.current.strength, reason, low, high)
        following = replace(task.current, seed=seed, strength=strength)
        task.current = following if self._can_run(following) else replace(task.current, seed=seed)
        again.append(task)

    def _can_run(self, request: GenerationRequest) -> bool:
        """Whether a lowered strength still leaves a step."""
        try:
            return self.engine.evaluations(request) > 0
        except GenerationError:
            return False

    def _failed(self, task: _Task, error: Exception) -> GenerationResult:
        self._counts["errors"] += 1
        self._counts["attempts"] += 1
        return task.result(None, f"error: {error}")

    def _count_attempt(self, task: _Task) -> None:
        rows = self.engine.evaluations(task.current)
        task.evaluations += rows
        self._counts["attempts"] += 1
        self._counts["evaluations"] += rows


def choose_batch_size(batch_size: int | str, device: torch.device) -> int:
    """The batch size to start with: a number as it is, ``"auto"`` by the device.

    ``"auto"`` is 16 on a CPU (small models) and, on CUDA, one sample for each GB of free memory, from 1 to 32: a start
    that fits SDXL-sized models in half precision. Engines halve it when memory runs out.

    Raises:
        RecipeError: neither a positive number nor ``"auto"``.
    """
    if batch_size == "auto":
        if device.type != "cuda":
            return 16
        free, _ = torch.cuda.mem_get_info(device)
        return int(min(max(free // 2**30, 1), 32))
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise RecipeError(f"batch_size {batch_size!r} is neither 'auto' nor a number from 1 up; use for example 8")
    return batch_size


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
    """Without the filter a flagged image must come back as it is, not as the black one that the checker makes of it."""
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.register_modules(safety_checker=None)
