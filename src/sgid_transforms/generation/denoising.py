"""One denoising step for heterogeneous samples: the UNet's rows, guidance, and the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgid_transforms.generation import samplers
from sgid_transforms.generation.batching import BatchLimit
from sgid_transforms.generation.encoding import PromptEmbedding
from sgid_transforms.generation.requests import GenerationRequest
from sgid_transforms.generation.schedule import Schedule, Step, Trajectory

# Aesthetic scores that diffusers' SDXL pipelines give a refiner for the prompt and for the negative prompt.
_AESTHETIC_SCORES = (6.0, 2.5)


@dataclass(eq=False)
class Sample:
    """One request on its way through the model."""

    request: GenerationRequest
    size: tuple[int, int]
    trajectory: Trajectory
    guided: tuple[bool, ...]  # for each step, whether the unconditional half is evaluated
    generator: torch.Generator
    prompt: PromptEmbedding | None = None
    negative: PromptEmbedding | None = None
    encoded: tuple[Tensor, ...] | None = None
    latents: Tensor | None = None
    previous_x0: Tensor | None = None
    noise: Tensor | None = None
    step: int = 0

    @property
    def remaining(self) -> int:
        return len(self.trajectory) - self.step

    @property
    def rows(self) -> int:
        return 1 + self.guided[self.step]


class Denoiser:
    """Takes samples one step further, each from its own timestep.

    Args:
        pipeline: the pipeline whose ``unet`` is called.
        schedule: the sampler and its noise levels.
        limit: maximum rows of one call.
        memory_format: memory format of the UNet's input.
        row_sizes: row counts to which calls are padded; if empty, no padding.

    Attributes:
        device: where the pipeline ran when it was last located.
        dtype: the UNet's dtype at that time.
        calls: calls of the UNet so far.
        rows: rows that these evaluated for samples, without padding.
        capacity: rows that the calls had room for.
    """

    def __init__(
        self, pipeline: Any, schedule: Schedule, limit: BatchLimit, memory_format: torch.memory_format, row_sizes: Sequence[int]
    ) -> None:
        self._pipeline = pipeline
        self._schedule = schedule
        self._format = memory_format
        self._row_sizes = sorted(row_sizes)
        self._embeds_guidance = pipeline.unet.config.time_cond_proj_dim is not None
        self.limit = limit
        self.locate()
        self.calls = self.rows = self.capacity = 0

    def locate(self) -> None:
        """Look up ``device`` and ``dtype``: diffusers walks over all modules for each, which is too slow for every step."""
        self.device = torch.device(self._pipeline._execution_device)
        self.dtype: torch.dtype = self._pipeline.unet.dtype

    def step(self, active: list[Sample]) -> list[tuple[Tensor, Tensor]]:
        """One step for each sample: its new latents and its estimate of the clean ones."""
        schedule = self._schedule
        step = Step.of([s.trajectory.table[s.step] for s in active], self.device)
        x = torch.stack([s.latents for s in active if s.latents is not None])
        output = self._predict(active, x, step.timestep)
        x0 = samplers.predict_x0(schedule.prediction_type, output, x, step.alpha, step.sigma)
        if schedule.clip is not None:
            x0 = x0.clamp(-schedule.clip, schedule.clip)
        if schedule.sampler == "ddim":
            noise = samplers.predict_noise(schedule.prediction_type, output, x, step.alpha, step.sigma)
            x = samplers.ddim_step(x0, noise, step.next_alpha, step.next_sigma)
        elif schedule.sampler == "euler":
            x = samplers.euler_step(x, x0, step.alpha, step.sigma, step.next_alpha, step.next_sigma)
        elif schedule.sampler == "dpmsolver++":
            previous = torch.stack([x0[i] if s.previous_x0 is None else s.previous_x0 for i, s in enumerate(active)])
            x = samplers.dpmpp_2m_step(
                x, x0, previous, step.alpha, step.sigma, step.next_alpha, step.next_sigma, step.extrapolation
            )
        else:
            x = samplers.lcm_step(x, x0, self._step_noise(active), step.c_skip, step.c_out, step.next_alpha, step.next_sigma)
        return list(zip(x.unbind(), x0.unbind(), strict=True))

    def _predict(self, active: list[Sample], x: Tensor, timestep: Tensor) -> Tensor:
        """The UNet's output for each sample, guided where the sample is guided at its step; float32."""
        guided = [i for i, s in enumerate(active) if s.guided[s.step]]
        order = torch.tensor([*range(len(active)), *guided], device=x.device)
        embeddings = [s.prompt for s in active] + [active[i].negative for i in guided]
        negative = [False] * len(active) + [True] * len(guided)
        rows = len(embeddings)
        capacity = next((size for size in self._row_sizes if size >= rows), rows)
        if capacity > rows:  # repeat the first sample: any valid row will do
            order = torch.cat([order, order.new_zeros(capacity - rows)])
            embeddings += [embeddings[0]] * (capacity - rows)
            negative += [False] * (capacity - rows)
        unet = self._pipeline.unet
        kwargs: dict[str, Any] = {}
        if self._embeds_guidance:
            scales = torch.tensor([s.request.guidance_scale for s in active])
            embedding = self._pipeline.get_guidance_scale_embedding(scales - 1, unet.config.time_cond_proj_dim)
            kwargs["timestep_cond"] = embedding.to(x.device, self.dtype)[order]
        if unet.config.addition_embed_type == "text_time":
            ids = [self._time_ids(active[0].size, n) for n in negative]
            kwargs["added_cond_kwargs"] = {
                "text_embeds": torch.stack([e.pooled for e in embeddings if e is not None and e.pooled is not None]),
                "time_ids": torch.tensor(ids, device=x.device, dtype=self.dtype),
            }
        output: Tensor = unet(
            x.to(self.dtype)[order].contiguous(memory_format=self._format),
            timestep[order],
            encoder_hidden_states=torch.stack([e.sequence for e in embeddings if e is not None]),
            return_dict=False,
            **kwargs,
        )[0].float()
        self.calls += 1
        self.rows += rows
        self.capacity += max(self.limit.value, rows)
        if not guided:
            return output[: len(active)]
        conditional, unconditional = output[: len(active)], output[len(active) : rows]
        index = order[len(active) : rows]
        scale = torch.tensor([active[i].request.guidance_scale for i in guided], device=x.device).view(-1, 1, 1, 1)
        return conditional.index_copy(0, index, samplers.guide(conditional[index], unconditional, scale))

    def _time_ids(self, size: tuple[int, int], negative: bool) -> tuple[float, ...]:
        """SDXL's size conditions for an uncropped image of a height and width, as diffusers' pipelines set them."""
        if self._pipeline.config.get("requires_aesthetics_score", False):
            return (*size, 0, 0, _AESTHETIC_SCORES[negative])
        return (*size, 0, 0, *size)

    def _step_noise(self, active: list[Sample]) -> Tensor:
        """Fresh noise for each sample with further steps, from its own generator; drawn once, even if a call is repeated."""
        for sample in active:
            if sample.noise is None:
                shape = sample.latents.shape if sample.latents is not None else ()
                last = sample.remaining == 1
                sample.noise = torch.zeros(shape) if last else torch.randn(shape, generator=sample.generator)
        return torch.stack([s.noise for s in active if s.noise is not None]).to(self.device, non_blocking=True)
