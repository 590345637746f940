"""Captions from pixels, by BLIP, Florence-2, or a vision-language chat model of transformers (SmolVLM, Qwen-VL)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sgid_transforms.errors import ModelLoadError
from sgid_transforms.models.checkpoints import check_weights, first_sentence, resolve_model
from sgid_transforms.recipe.checks import choice
from sgid_transforms.recipe.prompts import CAPTION_MODES, with_article, without_name

BLIP = "Salesforce/blip-image-captioning-base"
"""The captioner of the SGID paper's family (Li et al. 2022, arXiv 2201.12086); the default for every model but ``tiny``."""


_PREFIX = "a photo of "
_FLORENCE_TASK = "<CAPTION>"  # Florence-2 was trained on such tokens, and takes no other text with them
_ASKED = {
    "free": "Describe this picture in one short sentence.",
    "label": "This is a photo of {label}. In one short sentence, describe its pose, its colours and what is around it.",
    "context": (
        "This is a photo of {label}. In one short phrase, describe only the background, the light, the viewpoint, the pose and "
        "the colours. Do not name what the photo shows."
    ),
}
"""The instruction for chat models, by mode."""


class Captioner:
    """Writes one caption per image, always the same one, so that captions can be stored.

    There are three modes. ``free`` captions come from the pixels alone. ``label`` captions describe the image and name its
    label: "a tabby cat sitting on a couch". ``context`` captions describe everything but the object, and never name it:
    "sitting on a couch". BLIP and other models without a chat template continue the text "a photo of a tabby cat"
    (conditional captioning); chat models get an instruction through their own template. Florence-2 writes only ``free``
    captions.

    Args:
        path: ``"tiny"`` (bundled), a checkpoint id, or a local folder. Only safetensors are loaded, never remote code.
        device: Where the model runs.
        batch_size: Images per forward pass.
        num_beams: Beams of the search; 1 is greedy.
        max_new_tokens: Longest caption, in tokens; fewer where the model's decoder has no room for them.
        dtype: Data type of the weights; None: float32 on a CPU, else bfloat16, or float16 where bfloat16 is not supported.
        mode: ``"free"``, ``"label"`` or ``"context"``.

    Raises:
        ModelLoadError: The model cannot be loaded, or ``mode`` needs text input and the model takes none.
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
        mode: str = "free",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        choice("mode", mode, CAPTION_MODES)
        from sgid_transforms.models.loading import default_dtype, quiet

        dtype = default_dtype(device) if dtype is None else dtype

        source = resolve_model(path, "captioner")
        if Path(source).is_dir():
            check_weights(Path(source), source)
        try:
            with quiet():
                from transformers import AutoModelForImageTextToText, AutoProcessor

                self._processor: Any = AutoProcessor.from_pretrained(source, trust_remote_code=False)
                model: Any = AutoModelForImageTextToText.from_pretrained(
                    source, use_safetensors=True, trust_remote_code=False, dtype=dtype
                )
        except (OSError, ValueError, ImportError) as error:
            raise ModelLoadError(f"the captioner {path!r} cannot be loaded: {first_sentence(error)}") from error
        self._model = model.eval().to(device)
        self._device, self._dtype = torch.device(device), dtype
        self._chats = getattr(self._processor, "chat_template", None) is not None
        self._has_tasks = "Florence2" in type(self._processor).__name__
        if self._has_tasks and mode != "free":
            raise ModelLoadError(
                f"the captioner {path!r} is a Florence-2, which takes no text beside its task, so caption_mode={mode!r} cannot "
                "work; use caption_mode='free', or another captioner"
            )
        # A decoder has a fixed number of positions: the bundled one has 40, including the start token.
        text = getattr(model.config, "text_config", None)
        self._positions: int | None = None if self._chats else getattr(text, "max_position_embeddings", None)
        self._length = max_new_tokens
        self._options = {"num_beams": num_beams, "do_sample": False}
        self.batch_size = batch_size
        self.mode = mode
        self.id = path

    @torch.inference_mode()
    def caption(self, images: Sequence[torch.Tensor], labels: Sequence[str] | None = None) -> list[str]:
        """Captions of uint8 RGB images ``(3, H, W)``, of any sizes; one line each, possibly empty.

        Args:
            images: The images to describe.
            labels: The class name of each, in words; not used in mode ``free``.

        Raises:
            ValueError: The mode needs labels, and some are missing.
        """
        if self.mode == "free":
            labels = [""] * len(images)
        elif labels is None or len(labels) != len(images) or not all(labels):
            raise ValueError(
                f"caption_mode={self.mode!r} needs the label of each image; pass labels, or use caption_mode='free'"
            )
        captions = [""] * len(images)
        # Images with the same label share a batch: their texts have equal length, and padding differs from model to model.
        order = sorted(range(len(images)), key=lambda index: labels[index])
        for label, group in itertools.groupby(order, key=lambda index: labels[index]):
            same = list(group)
            for start in range(0, len(same), self.batch_size):
                chunk = same[start : start + self.batch_size]
                for index, text in zip(chunk, self._write([images[index] for index in chunk], label), strict=True):
                    captions[index] = text
        return captions

    def _write(self, images: Sequence[torch.Tensor], label: str) -> list[str]:
        from torchvision.transforms.v2.functional import to_pil_image

        # PIL images make the axes clear: in an array 3 pixels high, processors mistake rows for channels.
        pictures = [to_pil_image(image) for image in images]
        options: dict[str, Any] = {"return_tensors": "pt"}
        if self._chats:
            asked = {"type": "text", "text": _ASKED[self.mode].format(label=with_article(label))}
            chats = [[{"role": "user", "content": [{"type": "image", "image": picture}, asked]}] for picture in pictures]
            texts = self._processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
            # Generation continues from the end of each text, so shorter ones are padded on the left.
            self._processor.tokenizer.padding_side = "left"
            inputs = self._processor(images=[[picture] for picture in pictures], text=texts, padding=True, **options)
        elif self._has_tasks or self.mode != "free":
            given_text = _FLORENCE_TASK if self._has_tasks else _PREFIX + with_article(label)
            if self._positions is not None and not self._has_tasks:  # a long label must leave room for the caption
                options |= {"truncation": True, "max_length": self._positions // 2}
            inputs = self._processor(images=pictures, text=[given_text] * len(pictures), **options)
        else:
            inputs = self._processor(images=pictures, **options)
        inputs = inputs.to(self._device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
        given = inputs["input_ids"].shape[1] if "input_ids" in inputs and not self._has_tasks else 0
        length = self._length if self._positions is None else min(self._length, self._positions - max(given, 1) - 1)
        tokens = self._model.generate(**inputs, **self._options, max_new_tokens=length)
        if self._chats:
            tokens = tokens[:, given:]
        texts = [" ".join(text.split()) for text in self._decode(tokens)]
        if self.mode == "free":
            return texts
        if not self._chats:
            said = " ".join(self._decode(inputs["input_ids"])[0].split())
            texts = [text.removeprefix(said).strip() for text in texts]
            if self.mode == "label":
                return [
                    with_article(label) + ("" if text[:1] in ",.;" else " ") + text if text else with_article(label)
                    for text in texts
                ]
        return [without_name(text, label) for text in texts] if self.mode == "context" else texts

    def _decode(self, tokens: torch.Tensor) -> list[str]:
        texts: list[str] = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return texts
