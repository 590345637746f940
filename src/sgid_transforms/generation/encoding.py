"""Encode texts and images for the UNet, and decode its latents: in whole batches, and nothing is encoded twice."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgid_transforms.files import replacing
from sgid_transforms.generation.batching import BatchLimit, run_isolated
from sgid_transforms.generation.requests import check_text


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
        self._tokenizers = [t for name in ("tokenizer", "tokenizer_2") if (t := getattr(pipeline, name, None)) is not None]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer with the tightest limit."""
        return min(self._tokenizers, key=lambda t: int(t.model_max_length))

    @property
    def max_tokens(self) -> int:
        """Tokens that every text encoder of the pipeline reads, start and end included."""
        return int(self.tokenizer.model_max_length)

    def get(self, texts: Sequence[tuple[str, bool]], limit: BatchLimit) -> list[PromptEmbedding | Exception]:
        """Embeddings of ``(text, is negative)`` pairs, or the exception that a text raised.

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
                for tokenizer in self._tokenizers:
                    check_text(key[0], tokenizer, int(tokenizer.model_max_length))
            except Exception as error:
                found[key] = error
                continue
            missing.append(key)
        for unconditional in (False, True):
            group = [key for key in missing if key[1] is unconditional]
            encode = partial(self._encode, unconditional=unconditional)
            for key, embedding in zip(group, run_isolated(encode, group, limit), strict=True):
                found[key] = embedding
                if isinstance(embedding, PromptEmbedding):
                    self._kept[key] = embedding
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return [found[key] for key in keys]

    def clear(self) -> None:
        """Forget all texts: needed after the text encoder's weights change."""
        self._kept.clear()

    def _encode(self, keys: list[tuple[str, bool]], unconditional: bool) -> list[PromptEmbedding]:
        out = self._pipeline.encode_prompt(
            prompt=[text for text, _ in keys],
            device=self._pipeline._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=unconditional,
        )
        dtype = self._pipeline.unet.dtype
        sequences = out[1 if unconditional else 0].to(dtype)
        pooled = out[3 if unconditional else 2].to(dtype) if self._is_xl else [None] * len(keys)
        return [PromptEmbedding(s, p) for s, p in zip(sequences, pooled, strict=True)]


class LatentCodec:
    """Encodes and decodes batches with the VAE of a diffusers pipeline (``AutoencoderKL`` or ``AutoencoderTiny``).

    Args:
        vae: the autoencoder.
        memory_format: memory format of its inputs.
    """

    def __init__(self, vae: Any, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        self._vae = vae
        self._format = memory_format
        config = vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            mean, std = [0.0], [1.0]
        self._mean = torch.tensor(mean).view(-1, 1, 1)
        self._factor = float(config.scaling_factor) / torch.tensor(std).view(-1, 1, 1)

    def to(self, device: torch.device) -> None:
        """Keep the scale of the latents on the device where they are."""
        self._mean, self._factor = self._mean.to(device), self._factor.to(device)

    def encode(self, images: Tensor) -> list[tuple[Tensor, ...]]:
        """The encoder's output for each of the images ``(B, 3, H, W)`` in [0, 1], before anything random.

        One float32 entry ``(latents,)`` for a deterministic encoder, ``(mean, std)`` for a variational one.
        """
        pixels = (images * 2 - 1).to(self._vae.dtype).contiguous(memory_format=self._format)
        out = self._vae.encode(pixels)
        if hasattr(out, "latent_dist"):
            return list(zip(out.latent_dist.mean.float(), out.latent_dist.std.float(), strict=True))
        return [(latents,) for latents in out.latents.float()]

    def draw(self, encoded: tuple[Tensor, ...], noise: Tensor | None) -> Tensor:
        """Scaled latents ``(..., C, h, w)``, float32: a sample of the posterior by unit ``noise``, where there is one."""
        latents = encoded[0]
        if len(encoded) == 2 and noise is not None:
            latents = latents + encoded[1] * noise
        return (latents - self._mean) * self._factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)``, float32 around [0, 1], from scaled latents ``(B, C, h, w)``."""
        latents = latents / self._factor + self._mean
        latents = latents.to(self._vae.dtype).contiguous(memory_format=self._format)
        images: Tensor = self._vae.decode(latents, return_dict=False)[0]
        return images.float() / 2 + 0.5


class LatentCache:
    """Encoder outputs on disk, so that further variants of an image, in this run or a later one, skip the encoder.

    One safetensors file for each image, named by a digest of the pixels, the working size and the encoder's weights. The
    posterior's mean and deviation are kept, not a sample of it: variants still differ as they would without the cache.

    Args:
        folder: where the files are; created on the first write.
        vae: the autoencoder, whose config and weights go into the digest.
    """

    def __init__(self, folder: str | os.PathLike[str], vae: Any) -> None:
        self.folder = Path(folder)
        digest = hashlib.sha256(json.dumps(dict(vae.config), sort_keys=True, default=str).encode())
        for name, tensor in vae.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())  # whatever the memory format
        self._model = digest.digest()

    def key(self, image: Tensor, size: tuple[int, int]) -> str:
        """Digest of an image, uint8 ``(3, H, W)``, at a working size under this encoder."""
        digest = hashlib.sha256(self._model)
        digest.update(repr((tuple(image.shape), size)).encode())
        digest.update(image.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def get(self, key: str, device: torch.device | str) -> tuple[Tensor, ...] | None:
        """The encoder's output for an image, or ``None``; a file that cannot be read counts as absent."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(self._path(key), device=str(device))
            return (tensors["mean"], tensors["std"]) if "std" in tensors else (tensors["mean"],)
        except (OSError, SafetensorError, KeyError):
            return None

    def put(self, key: str, encoded: Sequence[Tensor]) -> None:
        """Store an encoder's output; several processes may write to one folder."""
        from safetensors.torch import save_file

        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        # copied, since an entry is a view into its whole batch
        own = [t.cpu().clone(memory_format=torch.contiguous_format) for t in encoded]
        with replacing(path) as temporary:
            save_file(dict(zip(("mean", "std"), own, strict=False)), temporary)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"
