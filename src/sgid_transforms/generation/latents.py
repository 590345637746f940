"""Between pixels and latents: a VAE in whole batches, with a cache of what it made of each input image."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class LatentCodec:
    """Encodes and decodes batches with the VAE of a diffusers pipeline (``AutoencoderKL`` or ``AutoencoderTiny``).

    Args:
        vae: the autoencoder.
        memory_format: in which to feed it.
    """

    def __init__(self, vae: Any, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        self._vae = vae
        self._format = memory_format
        config = vae.config
        self._scale = float(config.scaling_factor)
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        both = mean is not None and std is not None
        self._mean = torch.tensor(mean).view(1, -1, 1, 1) if both else None
        self._std = torch.tensor(std).view(1, -1, 1, 1) if both else None
        self.encoded = 0
        self.decoded = 0

    def encode(self, images: Tensor) -> list[tuple[Tensor, ...]]:
        """What the encoder says about images ``(B, 3, H, W)`` in [0, 1], per image, before anything random.

        One float32 entry ``(latents,)`` for a deterministic encoder, ``(mean, std)`` for a variational one.
        """
        pixels = (images * 2 - 1).to(self._vae.dtype).contiguous(memory_format=self._format)
        out = self._vae.encode(pixels)
        self.encoded += len(images)
        if hasattr(out, "latent_dist"):
            return list(zip(out.latent_dist.mean.float(), out.latent_dist.std.float(), strict=True))
        return [(latents,) for latents in out.latents.float()]

    def draw(self, encoded: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
        """Scaled latents ``(C, h, w)``, float32: a sample of the posterior, where the encoder has one."""
        latents = encoded[0]
        if len(encoded) == 2:
            noise = torch.randn(latents.shape, generator=generator).to(latents.device, non_blocking=True)
            latents = latents + encoded[1] * noise
        if self._mean is not None and self._std is not None:
            mean, std = (t[0].to(latents.device) for t in (self._mean, self._std))
            return (latents - mean) * self._scale / std
        return latents * self._scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)``, float32 around [0, 1], from scaled latents ``(B, C, h, w)``."""
        if self._mean is not None and self._std is not None:
            mean, std = (t.to(latents.device) for t in (self._mean, self._std))
            latents = latents * std / self._scale + mean
        else:
            latents = latents / self._scale
        latents = latents.to(self._vae.dtype).contiguous(memory_format=self._format)
        images: Tensor = self._vae.decode(latents, return_dict=False)[0]
        self.decoded += len(images)
        return images.float() / 2 + 0.5


class LatentCache:
    """Encoder outputs on disk, so that further variants of an image, in this run or a later one, skip the encoder.

    One safetensors file for each image, named by a digest of the pixels, the working size and the encoder's weights. The
    posterior's mean and deviation are kept, not a sample of it: variants still differ as they would without the cache.

    Args:
        folder: where the files lie; made on the first write.
        vae: the autoencoder, whose config and weights go into the digest.
    """

    def __init__(self, folder: str | os.PathLike[str], vae: Any) -> None:
        self.folder = Path(folder)
        self.hits = 0
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
            encoded = (tensors["mean"], tensors["std"]) if "std" in tensors else (tensors["mean"],)
        except (OSError, SafetensorError, KeyError):
            return None
        self.hits += 1
        return encoded

    def put(self, key: str, encoded: Sequence[Tensor]) -> None:
        """Keep an encoder's output; writers on one folder do not disturb each other."""
        from safetensors.torch import save_file

        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            # copied, since an entry is a view into its whole batch
            own = [t.cpu().clone(memory_format=torch.contiguous_format) for t in encoded]
            save_file(dict(zip(("mean", "std"), own, strict=False)), temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"
