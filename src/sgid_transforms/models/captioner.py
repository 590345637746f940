"""Captions from pixels, by BLIP or another image-to-text model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sgid_transforms.errors import ModelLoadError
from sgid_transforms.models.checkpoints import check_weights, first_sentence, resolve_model

BLIP = "Salesforce/blip-image-captioning-base"
"""The captioner of the SGID paper's family (Li et al. 2022, arXiv 2201.12086); the default next to any real model."""


class Captioner:
    """Writes one caption per image, the same one every time, so that captions can be kept.

    Args:
        path: ``"tiny"`` (bundled), a checkpoint id, or a local folder. Only safetensors are loaded, never remote code.
        device: Where the model runs.
        batch_size: Images per forward pass.
        num_beams: Beams of the search; 1 is greedy.
        max_new_tokens: Longest caption, in tokens; fewer where the model's decoder has no room for them.
        dtype: Of the weights; float32 by default.

    Raises:
        ModelLoadError: The model cannot be loaded.
    """

    def __init__(
        self,
        path: str = "tiny",
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 32,
        num_beams: int = 1,
        max_new_tokens: int = 40,
        dtype: torch.dtype | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        from sgid_transforms.models.loading import quiet

        source = resolve_model(path, "captioner")
        if Path(source).is_dir():
            check_weights(Path(source), source)
        try:
            with quiet():
                from transformers import AutoModelForImageTextToText, AutoProcessor

                self._processor: Any = AutoProcessor.from_pretrained(source, trust_remote_code=False)
                model: Any = AutoModelForImageTextToText.from_pretrained(
                    source, use_safetensors=True, trust_remote_code=False, dtype=dtype or torch.float32
                )
        except (OSError, ValueError, ImportError) as error:
            raise ModelLoadError(f"the captioner {path!r} cannot be loaded: {first_sentence(error)}") from error
        self._model = model.eval().to(device)
        self._device, self._dtype = torch.device(device), dtype or torch.float32
        # A decoder has no positions beyond its last: the bundled one ends at 24, with the start token among them.
        limit = getattr(getattr(model.config, "text_config", None), "max_position_embeddings", None)
        length = max_new_tokens if limit is None else min(max_new_tokens, limit - 2)
        self._options = {"num_beams": num_beams, "max_new_tokens": length, "do_sample": False}
        self.batch_size = batch_size
        self.id = path

    @torch.inference_mode()
    def caption(self, images: Sequence[torch.Tensor]) -> list[str]:
        """Captions of uint8 RGB images ``(3, H, W)``, of any sizes; one line each, possibly empty."""
        from torchvision.transforms.v2.functional import to_pil_image

        captions: list[str] = []
        for start in range(0, len(images), self.batch_size):
            # PIL says which axis is which; of an array 3 pixels high, processors take the rows for channels.
            chunk = [to_pil_image(image) for image in images[start : start + self.batch_size]]
            inputs = self._processor(images=chunk, return_tensors="pt").to(self._device)
            inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
            tokens = self._model.generate(**inputs, **self._options)
            captions += self._processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(caption.split()) for caption in captions]
