"""What a UNet is told beside the latents: prompt embeddings, SDXL's added conditions, LCM's guidance embedding."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgid_transforms.generation.batching import BatchLimit, run_isolated
from sgid_transforms.generation.requests import check_text

# Aesthetic scores that diffusers' SDXL pipelines give a refiner for the prompt and for the negative prompt.
_AESTHETIC_SCORES = (6.0, 2.5)


@dataclass(frozen=True, eq=False)
class PromptEmbedding:
    """One text as the UNet reads it: ``sequence`` is ``(L, D)``, ``pooled`` is ``(P,)`` where the model takes one."""

    sequence: Tensor
    pooled: Tensor | None


class PromptEncoder:
    """Encodes each distinct text once and keeps the last ``capacity`` of them.

    Args:
        pipeline: a diffusers pipeline with the ``encode_prompt`` of the Stable Diffusion family.
        capacity: number of texts that are kept.
    """

    def __init__(self, pipeline: Any, capacity: int) -> None:
        self._pipeline = pipeline
        self._capacity = capacity
        self._kept: OrderedDict[tuple[str, bool], PromptEmbedding] = OrderedDict()
        self._is_xl = "negative_pooled_prompt_embeds" in inspect.signature(pipeline.encode_prompt).parameters
        self.encoded = 0

    @property
    def tokenizer(self) -> Any:
        """The tokenizer with the tightest limit."""
        return min(self._tokenizers(), key=lambda t: int(t.model_max_length))

    @property
    def max_tokens(self) -> int:
        """Tokens that every text encoder of the pipeline reads, start and end included."""
        return min(int(t.model_max_length) for t in self._tokenizers())

    def get(self, texts: Sequence[tuple[str, bool]], limit: BatchLimit) -> list[PromptEmbedding | Exception]:
        """Embeddings of ``(text, is negative)`` pairs, or the exception that a text met.

        The empty negative text stands for "no negative prompt", which some SDXL models replace by zeros.
        """
        # Only SDXL treats the two kinds differently; elsewhere one entry serves both.
        keys = [(text, negative and not text and self._is_xl) for text, negative in texts]
        found: dict[tuple[str, bool], PromptEmbedding | Exception] = {}
        missing = []
        for key in dict.fromkeys(keys):
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
                continue
            try:
                for tokenizer in self._tokenizers():
                    check_text(key[0], tokenizer, int(tokenizer.model_max_length))
            except Exception as error:
                found[key] = error
                continue
            missing.append(key)
        for unconditional in (False, True):
            group = [key for key in missing if key[1] is unconditional]
            encode = self._encode_unconditional if unconditional else self._encode
            for key, embedding in zip(group, run_isolated(encode, group, limit), strict=True):
                found[key] = embedding
                if isinstance(embedding, PromptEmbedding):
                    self._kept[key] = embedding
                    self.encoded += 1
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return [found[key] for key in keys]

    def clear(self) -> None:
        """Forget all texts: needed after the text encoder's weights change."""
        self._kept.clear()

    def _tokenizers(self) -> list[Any]:
        names = ("tokenizer", "tokenizer_2")
        return [t for t in (getattr(self._pipeline, name, None) for name in names) if t is not None]

    def _encode(self, keys: list[tuple[str, bool]]) -> list[PromptEmbedding]:
        return self._call([text for text, _ in keys], guided=False)

    def _encode_unconditional(self, keys: list[tuple[str, bool]]) -> list[PromptEmbedding]:
        return self._call([text for text, _ in keys], guided=True)

    def _call(self, texts: list[str], guided: bool) -> list[PromptEmbedding]:
        device = self._pipeline._execution_device
        out = self._pipeline.encode_prompt(
            prompt=texts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=guided
        )
        dtype = self._pipeline.unet.dtype
        sequences = out[1 if guided else 0].to(dtype)
        pooled = out[3 if guided else 2].to(dtype) if self._is_xl else [None] * len(texts)
        return [PromptEmbedding(s, p) for s, p in zip(sequences, pooled, strict=True)]


def time_ids(size: tuple[int, int], *, aesthetic: bool, negative: bool) -> tuple[float, ...]:
    """SDXL's size conditions for an uncropped image of ``size`` (height, width), as diffusers' pipelines set them."""
    height, width = size
    if aesthetic:
        return (height, width, 0, 0, _AESTHETIC_SCORES[1 if negative else 0])
    return (height, width, 0, 0, height, width)


def guidance_embedding(scales: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding ``(B, dim)`` of guidance scales ``(B,)``, for models distilled with guidance (LCM).

    The scale enters as ``scale - 1``, as in diffusers' pipelines.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=scales.device) * -(math.log(10000.0) / (half - 1)))
    angles = (scales.float() - 1)[:, None] * 1000.0 * frequencies
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, dim % 2))
