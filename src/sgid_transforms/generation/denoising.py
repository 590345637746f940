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
from sgid_transforms.models.transfer import upload

# Aesthetic scores that diffusers' SDXL pipelines give a refiner for the prompt and for the negative prompt.
_AESTHETIC_SCORES = (6.0, 2.5)


@dataclass(eq=False)
class Sample:
    """One request on its way through the model. Its tensors are at ``slot`` in a `Latents` and in the `Conditions`."""

    request: GenerationRequest
    size: tuple[int, int]
    trajectory: Trajectory
    guided: tuple[bool, ...]  # for each step, whether the unconditional half is evaluated
    slot: int
    prompt: PromptEmbedding | None = None
    negative: PromptEmbedding | None = None
    encoded: tuple[Tensor, ...] | None = None
    noises: tuple[Tensor, ...] = ()  # for each step but the last, where the sampler draws some
    step: int = 0

    @property
    def remaining(self) -> int:
        return len(self.trajectory) - self.step

    @property
    def rows(self) -> int:
        return 1 + self.guided[self.step]


class Latents:
    """Latents of samples of one size, a row of one tensor for each.

    Args:
        like: latents ``(C, h, w)`` of one sample.
        capacity: number of rows.
    """

    def __init__(self, like: Tensor, capacity: int) -> None:
        self.now = like.new_zeros(capacity, *like.shape)
        self.previous_x0 = torch.zeros_like(self.now)  # the estimate of the step before, for samplers of second order
        self.nothing = like.new_zeros(like.shape)

    def put(self, slots: Tensor, latents: Tensor) -> None:
        """Start samples: ``(B,)`` and ``(B, C, h, w)``."""
        self.now.index_copy_(0, slots, latents)
        self.previous_x0.index_fill_(0, slots, 0)  # of earlier samples: they have no weight, but NaN times zero is NaN


class Conditions:
    """What the UNet is told about each sample besides its latents: a row for the prompt, and one for the negative prompt.

    Args:
        capacity: number of samples.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._sequences: Tensor | None = None
        self._pooled: Tensor | None = None
        self._scales: Tensor | None = None

    def put(self, rows: Tensor, embeddings: Sequence[PromptEmbedding]) -> None:
        """Set rows ``(R,)``: a sample's prompt is at its slot, its negative prompt at its slot plus ``capacity``."""
        self._sequences = self._set(self._sequences, rows, [embedding.sequence for embedding in embeddings])
        pooled = [embedding.pooled for embedding in embeddings if embedding.pooled is not None]
        if pooled:
            self._pooled = self._set(self._pooled, rows, pooled)

    def put_scales(self, slots: Tensor, scales: Sequence[Tensor]) -> None:
        """Set the embeddings ``(D,)`` of guidance scales."""
        self._scales = self._set(self._scales, slots, scales)

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sequences ``(R, L, D)``, and pooled embeddings ``(R, P)`` where the model takes them."""
        assert self._sequences is not None
        pooled = None if self._pooled is None else self._pooled.index_select(0, index)
        return self._sequences.index_select(0, index), pooled

    def scales(self, slots: Tensor) -> Tensor | None:
        """Embeddings ``(R, D)`` of guidance scales."""
        return None if self._scales is None else self._scales.index_select(0, slots)

    def _set(self, table: Tensor | None, rows: Tensor, values: Sequence[Tensor]) -> Tensor:
        new = torch.stack(list(values))
        if table is None or table.shape[1:] != new.shape[1:] or table.device != new.device or table.dtype != new.dtype:
            table = new.new_zeros(2 * self.capacity, *new.shape[1:])
        return table.index_copy_(0, rows, new)


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
        self,
        pipeline: Any,
        schedule: Schedule,
        limit: BatchLimit,
        memory_format: torch.memory_format,
        row_sizes: Sequence[int],
    ) -> None:
        self._pipeline = pipeline
        self._schedule = schedule
        self._format = memory_format
        self._row_sizes = sorted(row_sizes)
        self._times: dict[tuple[int, int], Tensor] = {}
        self._width = pipeline.unet.config.time_cond_proj_dim
        self.limit = limit
        self.locate()
        self.calls = self.rows = self.capacity = 0

    def locate(self) -> None:
        """Look up ``device`` and ``dtype``: diffusers walks over all modules for each, which is too slow for every step."""
        self.device = torch.device(self._pipeline._execution_device)
        self.dtype: torch.dtype = self._pipeline.unet.dtype

    @property
    def embeds_guidance(self) -> bool:
        """Whether the UNet takes its guidance scale as an input, so that guidance needs no second half."""
        return self._width is not None

    def scale_embeddings(self, group: Sequence[Sample]) -> list[Tensor]:
        """Embeddings ``(D,)`` of the samples' guidance scales, on the CPU."""
        scales = torch.tensor([sample.request.guidance_scale for sample in group])
        embeddings: Tensor = self._pipeline.get_guidance_scale_embedding(scales - 1, self._width)
        return list(embeddings)

    def step(self, conditions: Conditions, pool: Latents, active: list[Sample]) -> list[None]:
        """One step for each sample."""
        schedule = self._schedule
        guided = [i for i, sample in enumerate(active) if sample.guided[sample.step]]
        # All that the host knows goes over in one transfer: whole numbers below 2**24 are exact in float32.
        second = conditions.capacity
        told = [(s.slot, s.slot, 0, i, s.request.guidance_scale, *s.trajectory.table[s.step]) for i, s in enumerate(active)]
        told += [(told[i][0], second + told[i][0], 1, *told[i][3:]) for i in guided]
        rows = len(told)
        capacity = next((size for size in self._row_sizes if size >= rows), rows)
        told += [told[0]] * (capacity - rows)  # any valid row will do
        (numbers,) = upload([torch.tensor(told, dtype=torch.float32)], self.device)
        index, step = numbers[:, :4].long().unbind(1), Step.of(numbers[: len(active), 5:])
        slots = index[0][: len(active)]

        samples = pool.now.index_select(0, index[0])
        x = samples[: len(active)]
        output = self._predict(conditions, samples, numbers[:, 5], index, active[0].size)
        self.calls += 1
        self.rows += rows
        self.capacity += max(self.limit.value, rows)
        if guided:
            partners, scale = index[3][len(active) : rows], numbers[len(active) : rows, 4].view(-1, 1, 1, 1)
            unconditional, conditional = output[len(active) : rows], output[: len(active)]
            if len(guided) == len(active):
                output = samplers.guide(conditional, unconditional, scale)
            else:
                guidance = samplers.guide(conditional.index_select(0, partners), unconditional, scale)
                output = conditional.index_copy(0, partners, guidance)
        else:
            output = output[: len(active)]

        x0 = samplers.predict_x0(schedule.prediction_type, output, x, step.alpha, step.sigma)
        if schedule.clip is not None:
            x0 = x0.clamp(-schedule.clip, schedule.clip)
        if schedule.sampler == "ddim":
            noise = samplers.predict_noise(schedule.prediction_type, output, x, step.alpha, step.sigma)
            x = samplers.ddim_step(x0, noise, step.next_alpha, step.next_sigma)
        elif schedule.sampler == "euler":
            x = samplers.euler_step(x, x0, step.alpha, step.sigma, step.next_alpha, step.next_sigma)
        elif schedule.sampler == "dpmsolver++":
            previous = pool.previous_x0.index_select(0, slots)
            x = samplers.dpmpp_2m_step(
                x, x0, previous, step.alpha, step.sigma, step.next_alpha, step.next_sigma, step.extrapolation
            )
            pool.previous_x0.index_copy_(0, slots, x0)
        else:
            noise = torch.stack([s.noises[s.step] if s.remaining > 1 else pool.nothing for s in active])
            x = samplers.lcm_step(x, x0, noise, step.c_skip, step.c_out, step.next_alpha, step.next_sigma)
        pool.now.index_copy_(0, slots, x)
        return [None] * len(active)

    def _predict(
        self, conditions: Conditions, x: Tensor, timestep: Tensor, index: Sequence[Tensor], size: tuple[int, int]
    ) -> Tensor:
        """The UNet's output for each row, float32. ``index`` has each row's slot, text, and whether it is negative."""
        sequences, pooled = conditions.rows(index[1])
        kwargs: dict[str, Any] = {}
        if self.embeds_guidance:
            kwargs["timestep_cond"] = conditions.scales(index[0])
        if self._pipeline.unet.config.addition_embed_type == "text_time":
            kwargs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": self._time_ids(size).index_select(0, index[2])}
        output: Tensor = self._pipeline.unet(
            x.to(self.dtype).contiguous(memory_format=self._format),
            timestep,
            encoder_hidden_states=sequences,
            return_dict=False,
            **kwargs,
        )[0]
        return output.float()

    def _time_ids(self, size: tuple[int, int]) -> Tensor:
        """SDXL's size conditions for an uncropped image of a height and width, for prompt and negative prompt, as diffusers'
        pipelines set them."""
        known = self._times.get(size)
        if known is None or known.device != self.device or known.dtype != self.dtype:
            scores = self._pipeline.config.get("requires_aesthetics_score", False)
            ids = [(*size, 0, 0, score) if scores else (*size, 0, 0, *size) for score in _AESTHETIC_SCORES]
            self._times[size] = known = torch.tensor(ids, dtype=self.dtype).to(self.device)
        return known
