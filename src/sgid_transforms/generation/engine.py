"""The native engine: heterogeneous requests through one UNet, in full batches.

All samples in one call of a diffusers pipeline share one strength and one guidance scale. Here every sample has its own
timestep and its own guidance scale; at a scale of 1 or below, the unconditional half is skipped. A sample leaves the batch when
it is done, and a waiting one takes its place (continuous batching).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from sgid_transforms.errors import ModelLoadError, RecipeError
from sgid_transforms.generation import samplers
from sgid_transforms.generation.batching import BatchLimit, longest_first, run_isolated
from sgid_transforms.generation.denoising import Conditions, Denoiser, Latents, Sample
from sgid_transforms.generation.encoding import LatentCache, LatentCodec, PromptEncoder
from sgid_transforms.generation.requests import Answers, GenerationRequest, Pull, RejectedImageError, answer_all, check_image
from sgid_transforms.generation.schedule import Schedule, Trajectory, resolve_sampler
from sgid_transforms.generation.support import (
    check_resolution,
    limit_tokenizers,
    memory_formats,
    native_resolution,
    obstacle,
    place,
    resized_floats,
    resized_uint8,
    size_multiple,
    to_uint8,
    working_size,
)
from sgid_transforms.models.transfer import download, upload

_KEPT_PROMPTS = 256
_IN_FLIGHT = 4  # batches of samples held at once: enough to keep batches full, small compared to the model


@dataclass(frozen=True)
class EngineStats:
    """What the UNet did since the engine was made.

    Args:
        unet_calls: calls of the UNet.
        unet_rows: rows that it evaluated for requests, without padding.
        row_capacity: rows that its calls had room for.
    """

    unet_calls: int = 0
    unet_rows: int = 0
    row_capacity: int = 0

    @property
    def fill(self) -> float:
        """Share of the UNet's batch capacity that was used, in [0, 1]."""
        return self.unet_rows / self.row_capacity if self.row_capacity else 0.0


@dataclass(eq=False)
class _Shelf:
    """The samples of one working size, which share the UNet's batches."""

    conditions: Conditions  # of the samples of all sizes
    latents: Latents | None = None
    pool: list[Sample] = field(default_factory=list)
    finished: list[Sample] = field(default_factory=list)
    passed_over: int = 0  # steps that went to other sizes since its last one


_Decoding = tuple[list[Sample], Callable[[], list[Tensor | Exception]]]
"""Samples whose images are on their way, and a function that waits for them."""


class NativeEngine:
    """Runs requests through a Stable Diffusion pipeline's own modules (SD 1.x, 2.x, Turbo, LCM, SDXL).

    The engine takes the modules and the scheduler's config from the pipeline and never calls it. Latents are kept in float32
    and cast to the modules' dtype as inputs; autocast is off inside. Random numbers are drawn on the CPU in float32 from each
    request's seed, in the order in which diffusers draws them (the encoder's posterior, the noise, then the sampler's own), so
    that they depend neither on device and dtype nor on the batch. Global random states are not touched. Use it from one thread
    at a time.

    Args:
        pipeline: a diffusers pipeline of that family, with its weights loaded.
        sampler: ``ddim``, ``euler``, ``dpmsolver++`` or ``lcm``, or ``auto`` for the one that matches the pipeline's scheduler.
        num_inference_steps: steps at strength 1.
        guidance_interval: shares of the noise schedule (timestep over the last training timestep) between which guidance is
            applied; outside, only the conditional half is evaluated (Kynkäänniemi et al. 2024, arXiv 2404.07724).
        exact_strength: start at exactly the noise level of the strength, with the steps spread evenly below it. diffusers
            starts at the nearest lower level of a fixed list. Useful with few steps. Not for ``lcm``.
        resolution: height and width at which the model works, or one number for an area whose aspect ratio follows the
            image; ``None`` takes the size that the UNet was trained at.
        batch_size: guided samples in one UNet call, that is, half of its rows.
        vae_batch_size: images in one VAE call, which needs more memory than the UNet where images are large; ``None``:
            ``batch_size``.
        device: where to move the modules; ``None`` leaves them where they are (as CPU offload requires).
        dtype: dtype of UNet and VAE; ``None`` leaves it as it is. A VAE that overflows in float16 stays in float32.
        channels_last: whether UNet and VAE run in that memory format; ``None``: both on an accelerator, the VAE alone on a CPU.
        latent_cache: folder for encoded input images, or ``None`` for no cache.
        row_sizes: row counts to which UNet calls are padded, so that few CUDA graphs are recorded; ``None``: no padding.

    Raises:
        ModelLoadError: the pipeline is not one that this engine can run.
        RecipeError: a setting cannot work with this model.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        sampler: str = "auto",
        num_inference_steps: int = 20,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        exact_strength: bool = False,
        resolution: int | tuple[int, int] | None = None,
        batch_size: int = 8,
        vae_batch_size: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool | None = None,
        latent_cache: str | PathLike[str] | None = None,
        row_sizes: Sequence[int] | None = None,
    ) -> None:
        reason = obstacle(pipeline)
        if reason:
            raise ModelLoadError(reason)
        low, high = guidance_interval
        if not 0 <= low <= high <= 1:
            raise RecipeError(f"guidance_interval {guidance_interval} is not a range within [0, 1]; use for example (0.2, 0.8)")
        for name, size in (("batch_size", batch_size), ("vae_batch_size", vae_batch_size)):
            if size is not None and size < 1:
                raise RecipeError(f"{name} {size} leaves no room for a sample; use at least 1")
        self.batch_size = batch_size
        self._pipeline = pipeline
        formats = memory_formats(channels_last, pipeline._execution_device if device is None else device)
        place(pipeline, device, dtype, formats)
        self._schedule = Schedule(
            pipeline.scheduler.config,
            resolve_sampler(sampler, pipeline.scheduler),
            num_inference_steps,
            strength_sets_range=type(pipeline).__name__.startswith("LatentConsistencyModel"),
            exact_strength=exact_strength,
        )
        self._interval = (float(low), float(high))
        resolution = native_resolution(pipeline) if resolution is None else resolution
        if resolution is None:
            raise RecipeError("the model's config names no sample_size, so its own resolution is unknown; set resolution")
        self._resolution, self._multiple = resolution, size_multiple(pipeline)
        check_resolution(self._resolution, self._multiple)
        limit_tokenizers(pipeline)
        self._prompts = PromptEncoder(pipeline, _KEPT_PROMPTS)
        self._codec = LatentCodec(pipeline.vae, formats.vae)
        self._cache = LatentCache(latent_cache, pipeline.vae) if latent_cache is not None else None
        self._unet_limit = BatchLimit(2 * batch_size)
        self._encode_limit, self._decode_limit = (BatchLimit(vae_batch_size or batch_size) for _ in range(2))
        self._text_limit = BatchLimit(batch_size)
        self._denoiser = Denoiser(pipeline, self._schedule, self._unet_limit, formats.unet, row_sizes or ())

    @staticmethod
    def supports(pipeline: Any) -> str | None:
        """``None`` if this engine can run the pipeline, else one sentence that says why not."""
        return obstacle(pipeline)

    @property
    def sampler(self) -> str:
        """Name of the sampler in use."""
        return self._schedule.sampler

    @property
    def tokenizer(self) -> Any:
        """The tokenizer whose limit binds prompts."""
        return self._prompts.tokenizer

    @property
    def max_tokens(self) -> int:
        """Longest prompt in tokens, start and end included."""
        return self._prompts.max_tokens

    @property
    def stats(self) -> EngineStats:
        """Work done so far."""
        return EngineStats(self._denoiser.calls, self._denoiser.rows, self._denoiser.capacity)

    def forget_prompts(self) -> None:
        """Drop the encoded texts: needed after the text encoder's weights change (a LoRA, for example)."""
        self._prompts.clear()

    def evaluations(self, request: GenerationRequest) -> int:
        """UNet rows that a request takes.

        Raises:
            GenerationError: the strength leaves no step.
        """
        trajectory = self._schedule.trajectory(request.strength)
        return len(trajectory) + sum(self._guided_steps(request, trajectory))

    def run(self, requests: Sequence[GenerationRequest]) -> list[Tensor | Exception]:
        """One entry per request, in order: a uint8 ``(3, H, W)`` image on the CPU, or the exception that it raised."""
        return answer_all(self.stream, requests)

    def stream(self, pull: Pull) -> Iterator[Answers]:
        """Pull requests whenever there is room for them, and yield what is done after each step; see `Engine.stream`."""
        shelves: dict[tuple[int, int], _Shelf] = {}
        conditions = Conditions(_IN_FLIGHT * self.batch_size)
        free = list(range(conditions.capacity))
        self._denoiser.locate()
        self._codec.to(self._denoiser.device)
        decoding: list[_Decoding] = []
        while True:
            answers: Answers = []
            if len(free) >= self.batch_size:
                while free and (requests := pull(len(free))):
                    answers += self._take(requests, shelves, conditions, free)
            working = [shelf for shelf in shelves.values() if shelf.pool]
            if working:
                # The fullest batch first; a rare size waits a while for more requests, and then goes ahead.
                shelf = max(
                    working, key=lambda one: min(sum(s.rows for s in one.pool), self._unet_limit.value) + one.passed_over
                )
                for one in working:
                    one.passed_over = 0 if one is shelf else one.passed_over + 1
                answers += self._with_grad_off(self._advance, shelf, free)
            # Images of the step before come to the host while the device works on this one. A CPU has nothing to wait for.
            begun = [one for shelf in shelves.values() for one in self._with_grad_off(self._decoded, shelf, free)]
            at_once = self._denoiser.device.type == "cpu"
            answers += [
                (sample.request, image)
                for samples, images in (begun if at_once else decoding)
                for sample, image in zip(samples, images(), strict=True)
            ]
            decoding = [] if at_once else begun
            del begun
            if not answers and not working and not decoding:
                return
            yield answers
            shelves = {size: shelf for size, shelf in shelves.items() if shelf.pool or shelf.finished}

    def _with_grad_off(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``work`` without gradients and autocast; a generator must not leave this state behind between its items."""
        with torch.no_grad(), torch.autocast(self._denoiser.device.type, enabled=False):
            return work(*arguments)

    def _take(
        self,
        requests: Sequence[GenerationRequest],
        shelves: dict[tuple[int, int], _Shelf],
        conditions: Conditions,
        free: list[int],
    ) -> Answers:
        """Put requests on the shelves of their sizes, ready to be denoised; returns those that failed."""
        failed: Answers = []
        groups: dict[tuple[int, int], list[Sample]] = {}
        for request in requests:
            try:
                sample = self._accept(request, free)
            except Exception as error:
                failed.append((request, error))
            else:
                groups.setdefault(sample.size, []).append(sample)
        for size, samples in groups.items():
            shelf = shelves.setdefault(size, _Shelf(conditions))
            for start in range(0, len(samples), self.batch_size):
                ready, lost = self._with_grad_off(self._start, shelf, samples[start : start + self.batch_size])
                shelf.pool += ready
                free += [sample.slot for sample, _ in lost]
                failed += [(sample.request, error) for sample, error in lost]
        return failed

    def _advance(self, shelf: _Shelf, free: list[int]) -> Answers:
        """Run one step for as many samples as fit; returns those that failed."""
        assert shelf.latents is not None
        pool = shelf.pool
        chosen = longest_first([s.remaining for s in pool], [s.rows for s in pool], self._unet_limit.value)
        active = [pool[i] for i in chosen]
        step = partial(self._denoiser.step, shelf.conditions, shelf.latents)
        outcomes = run_isolated(step, active, self._unet_limit, cost=lambda s: s.rows)
        failed: Answers = []
        gone: set[Sample] = set()
        for sample, outcome in zip(active, outcomes, strict=True):
            if isinstance(outcome, Exception):
                failed.append((sample.request, outcome))
                free.append(sample.slot)
                gone.add(sample)
            else:
                sample.step += 1
                if not sample.remaining:
                    shelf.finished.append(sample)
                    gone.add(sample)
        shelf.pool = [sample for sample in pool if sample not in gone]
        return failed

    def _accept(self, request: GenerationRequest, free: list[int]) -> Sample:
        check_image(request.image)
        trajectory = self._schedule.trajectory(request.strength)
        height, width = request.image.shape[-2:]
        size = working_size(height, width, self._resolution, self._multiple)
        return Sample(request, size, trajectory, self._guided_steps(request, trajectory), free.pop())

    def _guided_steps(self, request: GenerationRequest, trajectory: Trajectory) -> tuple[bool, ...]:
        if request.guidance_scale <= 1 or self._denoiser.embeds_guidance:
            return (False,) * len(trajectory)
        low, high = self._interval
        return tuple(low <= level <= high for level in trajectory.levels)

    def _start(self, shelf: _Shelf, group: list[Sample]) -> tuple[list[Sample], list[tuple[Sample, Exception]]]:
        """Embed prompts, encode images and add noise; returns the samples that are ready, and those that failed."""
        failed: list[tuple[Sample, Exception]] = []

        def keep(samples: list[Sample], outcomes: Sequence[Any], store: Callable[[Sample, Any], None]) -> list[Sample]:
            kept = []
            for sample, outcome in zip(samples, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    failed.append((sample, outcome))
                else:
                    store(sample, outcome)
                    kept.append(sample)
            return kept

        # All texts are asked for at once, so that prompts and negative prompts share the encoder's batches.
        guided = [s for s in group if any(s.guided)]
        texts = [(s.request.prompt, False) for s in group] + [(s.request.negative_prompt, True) for s in guided]
        embeddings = self._prompts.get(texts, self._text_limit)
        negatives = dict(zip(guided, embeddings[len(group) :], strict=True))
        group = keep(group, embeddings[: len(group)], lambda s, e: setattr(s, "prompt", e))
        group = keep(group, [negatives.get(s) for s in group], lambda s, e: setattr(s, "negative", e))
        group = keep(group, run_isolated(self._encode, group, self._encode_limit), lambda s, e: setattr(s, "encoded", e))
        noised = run_isolated(partial(self._noised, shelf), group, self._encode_limit)
        return keep(group, noised, lambda s, e: setattr(s, "noises", e)), failed

    def _encode(self, group: list[Sample]) -> list[tuple[Tensor, ...]]:
        device = self._denoiser.device
        keys = [self._cache.key(s.request.image, s.size) for s in group] if self._cache else []
        found = {i: hit for i, key in enumerate(keys) if self._cache and (hit := self._cache.get(key, device)) is not None}
        missing = [i for i in range(len(group)) if i not in found]
        if missing:
            images = upload([group[i].request.image for i in missing], device)
            pixels = torch.cat([resized_floats(image, group[i].size) for i, image in zip(missing, images, strict=True)])
            for i, encoded in zip(missing, self._codec.encode(pixels), strict=True):
                found[i] = encoded
                if self._cache:
                    self._cache.put(keys[i], encoded)
        return [found[i] for i in range(len(group))]

    def _noised(self, shelf: _Shelf, group: list[Sample]) -> list[tuple[Tensor, ...]]:
        """Put the samples' noisy latents and conditions into their rows; returns the noise of their later steps.

        Random numbers are drawn in the order in which diffusers draws them, and go to the device in one transfer, with all
        other numbers.
        """
        encoded = [sample.encoded for sample in group if sample.encoded is not None]
        shape, is_posterior = encoded[0][0].shape, len(encoded[0]) == 2
        posterior, first, later = [], [], []
        for sample in group:
            generator = torch.Generator().manual_seed(sample.request.seed)
            if is_posterior:
                posterior.append(torch.randn(shape, generator=generator))
            first.append(torch.randn(shape, generator=generator))
            if self.sampler == "lcm":
                later += [torch.randn(shape, generator=generator) for _ in range(len(sample.trajectory) - 1)]
        second = shelf.conditions.capacity
        guided = [sample for sample in group if sample.negative is not None]
        numbers = torch.tensor([(s.slot, *s.trajectory.table[0][1:3]) for s in group], dtype=torch.float32)
        negatives = torch.tensor([second + sample.slot for sample in guided], dtype=torch.float32)
        scales = self._denoiser.scale_embeddings(group) if self._denoiser.embeds_guidance else []
        there = upload(
            [numbers, negatives, torch.stack(first), *([torch.stack(posterior)] if posterior else []), *scales, *later],
            self._denoiser.device,
        )
        (numbers, negatives, noise), rest = there[:3], there[3:]
        slots, (alpha, sigma) = numbers[:, 0].long(), numbers[:, 1:].view(-1, 2, 1, 1, 1).unbind(1)
        parts = tuple(torch.stack(part) for part in zip(*encoded, strict=True))
        noisy = samplers.add_noise(self._codec.draw(parts, rest.pop(0) if posterior else None), noise, alpha, sigma)
        if shelf.latents is None:
            shelf.latents = Latents(noisy[0], second)
        shelf.latents.put(slots, noisy)
        conditions = shelf.conditions
        conditions.put(slots, [sample.prompt for sample in group if sample.prompt is not None])
        if guided:
            conditions.put(negatives.long(), [sample.negative for sample in guided if sample.negative is not None])
        if scales:
            conditions.put_scales(slots, [rest.pop(0).to(self._denoiser.dtype) for _ in scales])
        for sample in group:
            sample.encoded = sample.prompt = sample.negative = None
        noises = iter(rest)
        return [tuple(islice(noises, len(s.trajectory) - 1 if self.sampler == "lcm" else 0)) for s in group]

    def _decoded(self, shelf: _Shelf, free: list[int]) -> list[_Decoding]:
        """Begin to decode finished samples that fill a batch, or that have nothing left to wait for."""
        begun: list[_Decoding] = []
        while len(shelf.finished) >= self.batch_size or (shelf.finished and not shelf.pool):
            group, shelf.finished = shelf.finished[: self.batch_size], shelf.finished[self.batch_size :]
            parts = run_isolated(partial(self._decode, shelf), group, self._decode_limit)
            free += [sample.slot for sample in group]
            begun.append((group, _arrived(group, parts)))
        return begun

    def _decode(self, shelf: _Shelf, group: list[Sample]) -> list[tuple[Tensor, Tensor]]:
        """Images, uint8 ``(3, H, W)`` in the sizes of their originals, and whether they are finite, all on the device."""
        assert shelf.latents is not None
        images = self._codec.decode(torch.stack([shelf.latents.now[sample.slot] for sample in group]))
        finite = images.isfinite().flatten(1).all(1).to(torch.uint8)
        images = images.nan_to_num().clamp(0, 1)
        if all(s.request.image.shape[-2:] == images.shape[-2:] for s in group):
            return list(zip(to_uint8(images), finite, strict=True))
        own = [(s.request.image.shape[-2], s.request.image.shape[-1]) for s in group]
        return [(resized_uint8(image, size), good) for image, size, good in zip(images, own, finite, strict=True)]


def _arrived(group: list[Sample], parts: Sequence[tuple[Tensor, Tensor] | Exception]) -> Callable[[], list[Tensor | Exception]]:
    """Begin to bring decoded images to the CPU, all in one transfer; returns a function that waits for them."""
    wait = download([tensor for part in parts if not isinstance(part, Exception) for tensor in part])

    def images() -> list[Tensor | Exception]:
        there = iter(wait())
        found: list[Tensor | Exception] = []
        for sample, part in zip(group, parts, strict=True):
            if isinstance(part, Exception):
                found.append(part)
                continue
            image, finite = next(there), next(there)
            found.append(image if bool(finite) else RejectedImageError.not_finite(sample.request))
        return found

    return images
